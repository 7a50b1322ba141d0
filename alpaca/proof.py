"""Does a merged model compute what its base and adapter compute? Measured, and put on record.

The golden prompts are answered in float64 in three ways: base + adapter, W x + s B (A x) without
any rounding; merged in fp32; merged and rounded to 16 bits. The largest difference of a logit from
the first is what the rounding made. Tensors are merged as they are needed: nothing is written.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alpaca import adapter as adapters
from alpaca import golden, merging, shards
from alpaca.adapter import Adapter
from alpaca.golden import Float64Weights
from alpaca.merging import Base, BaseWeight, Merge

TOLERANCE = 0.01  # relative: of a figure that was computed on another machine
NEGLIGIBLE = 1e-9  # in logits: a difference below it is equality in float64
WAYS = {"fp32": torch.float32, "bf16": torch.bfloat16}  # the merges of an adapter's passport


class AdaptedWeights(Float64Weights):
    """Base and adapter, in float64, as they are used without a merge."""

    def __init__(self, base: Path, adapter: Adapter, base_weight: BaseWeight | None = None) -> None:
        """`base_weight`: what the adapter was trained on in place of a base tensor."""
        super().__init__(base)
        self.adapter, self.base_weight = adapter, base_weight
        self.parameters += adapter.parameters
        self._base = Base(self.entries, base_weight)

    def rows(self, name: str, rows: slice) -> Tensor:
        """Some rows of a tensor of the base."""
        return golden.checked(name, self._base.rows(name, rows))

    def product(self, module: str, x: Tensor) -> Tensor:
        """W x + s B (A x), each row times DoRA's factor; x: (tokens, in) to (tokens, out)."""
        y = super().product(module, x)
        change = self.adapter.change(module)
        if change is None:
            return y
        change = change.double()
        y = y + change.scaling * ((x @ change.down.T) @ change.up.T)
        if change.magnitude is None:
            return y
        name = f"{module}.weight"
        for rows in shards.row_slices(self.entries[name].shape):
            y[:, rows] *= change.rows(rows).row_factors(self.rows(name, rows))
        return y


class MergedWeights(Float64Weights):
    """Base and adapter merged in `dtype`, in float64; tensors are merged when they are used."""

    def __init__(self, base: Path, merge: Merge, dtype: torch.dtype) -> None:
        """`base`: the folder that `merge` reads."""
        super().__init__(base)
        self._merge, self._dtype = merge, dtype

    def rows(self, name: str, rows: slice) -> Tensor:
        """Some rows of a merged tensor."""
        return self._merge.rows(name, rows, self._dtype).double()


@dataclass(frozen=True)
class Rounded:
    """How far the logits of merged models are from those of base + adapter, (vocabulary,) each.

    differences: the largest absolute difference of a logit, by the type that was merged in.
    rounding: how 16-bit types were rounded.
    """

    differences: Mapping[str, float]
    rounding: str

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> "Rounded":
        """What a passport holds."""
        return cls({k: v for k, v in facts.items() if k != "rounding"}, facts["rounding"])

    @property
    def facts(self) -> dict[str, Any]:
        """For the passport."""
        return {**self.differences, "rounding": self.rounding}

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"merged in {name}"
            + (f", rounding {self.rounding}" if name != "fp32" else "")
            + (": equal" if value <= NEGLIGIBLE else f": largest logit difference {value:.3g}")
            for name, value in self.differences.items()
        ]


def unfit(weights: Float64Weights, models: int) -> str | None:
    """Why logits of so many models of this kind are not computed here, or None."""
    return golden.unsupported(weights.config) or golden.too_slow(weights, models)


def record(base: Path, adapter: Adapter, base_weight: BaseWeight | None = None) -> dict[str, Any]:
    """`golden` and `proof` for an adapter's passport; None each, with a note, if they take long.

    golden: the answers of base + adapter, as `golden.answers`. proof: the facts of a `Rounded`.
    """
    weights = AdaptedWeights(base, adapter, base_weight)
    if reason := unfit(weights, 1 + len(WAYS)):
        print(f"note: no golden logits and no proof of merging were saved: {reason}")
        return {"golden": None, "proof": None}
    return facts(weights)


def facts(weights: AdaptedWeights) -> dict[str, Any]:
    """What `record` returns, however long it takes."""
    base, adapter = weights.folder, weights.adapter
    ids = golden.prompt_ids(tokenizer_folder(base, adapter))
    logits = golden.forward(weights, ids)
    found = measure(base, adapter, ids, logits, merging.ROUNDING, weights.base_weight)
    return {"golden": golden.described(ids, logits), "proof": found.facts}


def measure(
    base: Path,
    adapter: Adapter,
    ids: Sequence[Sequence[int]],
    logits: Sequence[Tensor],
    way: str,
    base_weight: BaseWeight | None = None,
    ways: Mapping[str, torch.dtype] = WAYS,
) -> Rounded:
    """The largest difference of the merged models' logits from `logits`, those of base + adapter.

    `way`: a rounding, as in `merging.seed_of`. `ways`: the types to merge in, by name.
    """
    found = {}
    for name, dtype in ways.items():
        entries = Float64Weights(base).entries
        merge = Merge(Base(entries, base_weight), adapter, merging.seed_of(way))
        found[name] = largest(golden.forward(MergedWeights(base, merge, dtype), ids), logits)
    return Rounded(found, way)


def largest(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The largest absolute difference of a logit, over all prompts."""
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def tokenizer_folder(base: Path, adapter: Adapter) -> Path:
    """Where the tokenizer of base + adapter is: in the adapter's folder, if it has one."""
    return adapter.folder if (adapter.folder / "tokenizer.json").is_file() else base


def repeat(
    recorded: Mapping[str, Any], base: Path, adapter: Adapter
) -> tuple[list[str], Rounded | None]:
    """Compare an adapter's logits, and those of its merges, with what its passport holds of them.

    Returns one line for each difference, and the figures that were computed.
    """
    if not recorded.get("golden"):
        return [], None
    ids = golden.prompt_ids(tokenizer_folder(base, adapter))
    base_weight = merging.as_trained(adapter.quantized)
    logits = golden.forward(AdaptedWeights(base, adapter, base_weight), ids)
    problems = golden.differences(recorded["golden"], golden.described(ids, logits))
    kept = recorded.get("proof")
    if problems or not kept:
        return problems, None
    ways = {name: dtype for name, dtype in WAYS.items() if name in kept}
    found = measure(base, adapter, ids, logits, kept["rounding"], base_weight, ways)
    return differences(kept, found), found


def repeat_merge(
    folder: Path, recorded: Mapping[str, Any], base: Path, adapter: Adapter
) -> tuple[list[str], Rounded | None]:
    """Compare a merged folder again with the base and adapter that its passport names."""
    for what, where, files in (
        ("adapter", adapter.folder, adapters.hashed(adapter.folder)),
        ("base", base, adapters.base_files(base)),
    ):
        weights = {k: v for k, v in recorded[what]["files"].items() if k.endswith(".safetensors")}
        if any(files.get(name) != value for name, value in weights.items()):
            return [f"{where} is not the {what} that {folder} was merged from"], None
    kept = recorded["proof"]
    base_weight = merging.as_trained(recorded.get("base_quantized"))
    ids = golden.prompt_ids(folder)
    logits = golden.forward(AdaptedWeights(base, adapter, base_weight), ids)
    written = largest(golden.forward(Float64Weights(folder), ids), logits)
    exact = {"fp32": torch.float32}
    found = measure(base, adapter, ids, logits, kept["rounding"], base_weight, exact)
    found = replace(found, differences={**found.differences, recorded["export"]["dtype"]: written})
    return differences(kept, found), found


def differences(kept: Mapping[str, Any], found: Rounded) -> list[str]:
    """One line for each figure that differs from a passport's."""
    return [
        f"merged in {name}: the largest logit difference was {kept[name]:.6g}, is {now:.6g}"
        for name, now in found.differences.items()
        if not math.isclose(kept[name], now, rel_tol=TOLERANCE, abs_tol=NEGLIGIBLE)
    ]
