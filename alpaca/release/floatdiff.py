"""The published diff of 2023: a model folder whose numbers are the tuned ones minus the base's.

The tuned model is the sum of both in fp32. Its vocabulary has one row more than the base's, for a
pad token; the base's row there is the mean of its others (stanford_alpaca, weight_diff.py). Its one
check is the sum of all numbers of the result. transformers of 2023 counted the rotary frequencies
of each layer among them, today's does not, so there are two such sums.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from alpaca import atomic
from alpaca.convert import huggingface
from alpaca.convert.conversion import Layout, convert
from alpaca.convert.source import Source, Tensor
from alpaca.errors import UserError

PUBLISHED = 50637.1836  # of Alpaca 7B, frequencies included (weight_diff.py)
ALPACA_7B = {"num_hidden_layers": 32, "hidden_size": 4096, "vocab_size": 32001}
TOLERANCE = 0.01  # as there


class Sums:
    """The sum of each tensor of the result, in fp32 as in 2023."""

    def __init__(self) -> None:
        """Start with none."""
        self.by_name: dict[str, torch.Tensor] = {}

    def add(self, name: str, value: torch.Tensor) -> None:
        """Add a tensor."""
        self.by_name[name] = value.sum()

    def total(self) -> float:
        """The sum over all tensors, in fp32."""
        return float(sum(self.by_name.values(), torch.zeros(())))


def apply(base: Path, diff: Path, tuned: Path, *, force: bool = False) -> list[str]:
    """Write the tuned folder in fp32; returns lines about the two sums.

    Raises:
        UserError: a folder is damaged, they are not of the same model, or neither sum is the
            published one.
    """
    theirs, ours = (
        huggingface.open_folder(base, base.name),
        huggingface.open_folder(diff, tuned.name),
    )
    for left in (atomic.partial_path(tuned), tuned.with_name(f".{tuned.name}.journal.json")):
        atomic.remove(left)  # of an interrupted run, whose tensors would be in no sum
    sums = Sums()
    source = _sum(theirs, ours, sums, base, diff)
    convert(source, tuned.parent, Layout(torch.float32), force=force)
    return check(source.config, sums.total(), base, diff)


def _sum(theirs: Source, ours: Source, sums: Sums, base: Path, diff: Path) -> Source:
    """A source whose tensors are the sums of both."""
    known = {tensor.name: tensor for tensor in theirs.tensors}
    for tensor in ours.tensors:
        other = known.get(tensor.name)
        if other is None or other.shape[1:] != tensor.shape[1:] or other.shape > tensor.shape:
            shape = "lacks it" if other is None else f"has {list(other.shape)} there"
            raise UserError(
                f"{diff} holds {tensor.name} of shape {list(tensor.shape)}, {base} {shape}.",
                "Give the folder of the base model that the diff was made from.",
            )
    tensors = tuple(
        Tensor(tensor.name, tensor.shape, None, partial(_read, tensor, known[tensor.name], sums))
        for tensor in ours.tensors
    )
    return replace(
        ours,
        dtype=torch.float32,
        tensors=tensors,
        files={**theirs.files, **ours.files},
        facts={**ours.facts, "base": {"folder": base.resolve().name}, "diff": diff.resolve().name},
    )


def _read(ours: Tensor, theirs: Tensor, sums: Sums, dtype: torch.dtype) -> torch.Tensor:
    value = ours.read(torch.float32).clone()  # else pages of the mapped file, kept to the end
    other = theirs.read(torch.float32)
    rows = other.shape[0]
    if value.shape[0] > rows:
        value[rows:] += other.mean(0)
    value[:rows] += other
    sums.add(ours.name, value)
    return value.to(dtype)


def check(config: dict[str, object], weights: float, base: Path, diff: Path) -> list[str]:
    """Compare the two sums with the published one, where the model is Alpaca 7B.

    Raises:
        UserError: neither is; the message gives both, and what may be the reason.
    """
    frequencies = _frequencies(config)
    both = weights + frequencies
    told = [
        f"Sum of all weights: {weights:.4f}; with the rotary frequencies, as transformers of 2023 "
        f"counted: {both:.4f}."
    ]
    if any(config.get(key) != value for key, value in ALPACA_7B.items()):
        return [*told, "No sum is published for a model of this size."]
    if abs(both - PUBLISHED) <= TOLERANCE:
        return [*told, f"The second is the published sum, {PUBLISHED}."]
    if abs(weights - PUBLISHED) <= TOLERANCE:
        return [*told, f"The first is the published sum, {PUBLISHED}."]
    raise UserError(
        f"Neither sum is the published one, {PUBLISHED}: {weights:.4f} without and {both:.4f} with "
        f"the rotary frequencies ({frequencies:.4f}).",
        f"A sum that is near but not equal means another conversion of the base, or rounded "
        f"weights: {base} must hold Meta's LLaMA 7B in fp16 or fp32. One that is far away means a "
        f"damaged or missing file there or in {diff}. The folder was written; compare its answers.",
    )


def _frequencies(config: dict[str, object]) -> float:
    """The sum of the rotary frequencies over all layers, as buffers of 2023 held them."""
    layers, width, heads = (
        int(str(config[key])) for key in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    exponents = torch.arange(0, width // heads, 2).float() / (width // heads)
    return layers * float((1.0 / 10000.0**exponents).sum())
