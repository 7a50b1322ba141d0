"""Golden logits: a model's logits for three prompts, to ten digits, stored in its passport.

A file hash proves nothing if someone rewrites the hash too; the logits of the first answer token
check the weights themselves. They are computed in float64, so that a change of 1% in one weight is
larger than rounding errors. The forward pass is written here, independent of transformers, so it
also checks what transformers computes. Weights are read some rows at a time, whatever their size.
"""

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from alpaca import shards, stored
from alpaca.errors import UserError
from alpaca.folder import load_tokenizer
from alpaca.tokens import Codec

PROMPTS = (
    ("Name three colours of the rainbow.", ""),
    ("Count the words of the sentence.", "The sea is calm tonight."),
    ("What is the capital of Thailand?", ""),
)
KINDS = ("llama", "mistral", "qwen2", "qwen3")  # model_type of the decoders computed here
ROPES = ("default", "linear", "llama3")
LIKELIEST = 8  # logits stored individually; all others are checked through one sum
TOLERANCE = 1e-9  # relative; float64 results on other hardware differ by about 1e-13
RATE = 1.5e10  # float64 operations per second and core; a conservative estimate
PATIENCE = 60.0  # seconds: the most that writing a folder spends on golden logits
TOKENS = 150  # of the three prompts together


def record(folder: Path) -> list[dict[str, Any]] | None:
    """The golden answers of a complete model folder, for its passport.

    Returns None and prints why if the model's type is not supported here, or if this machine would
    need more than a minute.
    """
    weights = Float64Weights(folder)
    reason = unsupported(weights.config) or too_slow(weights)
    if reason is not None:
        print(f"note: no golden logits were saved: {reason}")
        return None
    return answers(folder, weights)


def too_slow(weights: "Float64Weights", models: int = 1) -> str | None:
    """Why so many models of this size would need more than a minute each here, or None."""
    seconds = 2 * TOKENS * weights.parameters / (RATE * cores())
    if seconds <= PATIENCE:
        return None
    return f"they would take {models * seconds / 60:.0f} minutes here"


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def all_cores() -> Iterator[None]:
    """Compute on all cores: torchrun gives each rank one thread, and the other ranks wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def answers(folder: Path, weights: "Float64Weights") -> list[dict[str, Any]]:
    """For each prompt: ids, logits of the likeliest first tokens, and a sum over all logits."""
    ids = prompt_ids(folder)
    return described(ids, forward(weights, ids))


def prompt_ids(folder: Path) -> list[list[int]]:
    """The ids of each prompt, by the tokenizer in `folder`."""
    codec = Codec(load_tokenizer(folder))
    return [codec.prompt(instruction, given) for instruction, given in PROMPTS]


def described(ids: Sequence[list[int]], each: Sequence[Tensor]) -> list[dict[str, Any]]:
    """What a passport keeps of each prompt's ids and logits, (vocabulary,) in float64."""
    found = []
    for (instruction, given), prompt, logits in zip(PROMPTS, ids, each, strict=True):
        top = logits.topk(min(LIKELIEST, len(logits)))
        found.append(
            {
                "instruction": instruction,
                "input": given,
                "ids": prompt,
                "logits": dict(
                    zip(map(str, top.indices.tolist()), top.values.tolist(), strict=True)
                ),
                "sum": float((logits * signs(len(logits))).sum()),
            }
        )
    return found


def differences(kept: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]]) -> list[str]:
    """One line for each prompt whose logits differ; empty when all agree."""
    lines = []
    for number, (old, new) in enumerate(zip(kept, found, strict=False), start=1):
        if old["ids"] != new["ids"]:
            lines.append(f"golden prompt {number}: its token ids differ")
            continue
        pairs = [
            (f"logit of token {name}", value, new["logits"].get(name))
            for name, value in old["logits"].items()
        ]
        for what, was, now in [*pairs, ("sum of all logits", old["sum"], new["sum"])]:
            if now is None or not math.isclose(was, now, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
                shown = "no longer among the likeliest" if now is None else f"{now:.12g} now"
                lines.append(f"golden prompt {number}: {what} was {was:.12g}, is {shown}")
                break
    if len(kept) != len(found):
        lines.append(f"the passport holds {len(kept)} golden prompts, not {len(found)}")
    return lines


def signs(size: int) -> Tensor:
    """A fixed pattern of +1 and -1, (size,), float64: a sum with these signs includes every logit.

    One bit of Knuth's multiplicative hash (The Art of Computer Programming, vol. 3, 6.4).
    """
    return 1.0 - 2.0 * ((torch.arange(size) * 2654435761 >> 16) & 1).double()


def all_tensor_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each tensor of a folder, for its passport; files are read in parallel."""
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(tensor_hashes, stored.weight_files(folder)))
    return {name: value for part in found for name, value in part.items()}


def tensor_hashes(path: Path) -> dict[str, str]:
    """SHA-256 of each tensor in a file."""
    return {name: tensor_sha256(entry) for name, entry in stored.header(path).items()}


def tensor_sha256(entry: stored.Entry) -> str:
    """SHA-256 of a stored tensor's dtype (as torch names it), shape and bytes."""
    digest = hashlib.sha256(f"{shards.TYPES[entry.dtype]}{list(entry.shape)}\0".encode())
    for rows in shards.read(entry):
        digest.update(rows.view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Float64Weights:
    """A folder's tensors by name, in float64; rows are read from disk when they are used.

    A subclass may change the weights: all are read by `rows`, and multiplied by `product`.
    """

    def __init__(self, folder: Path) -> None:
        """Read the headers; using a missing tensor later raises KeyError."""
        self.folder = folder
        self.config: dict[str, Any] = stored.read_json(folder / "config.json")
        self.entries = stored.tensors(folder)
        self.parameters = sum(entry.elements for entry in self.entries.values())

    def __contains__(self, name: str) -> bool:
        """Whether the folder has a tensor of this name."""
        return name in self.entries

    def whole(self, name: str) -> Tensor:
        """One tensor."""
        return self.rows(name, slice(None))

    def rows(self, name: str, rows: slice) -> Tensor:
        """Some rows of one tensor."""
        return checked(name, shards.rows_of(self.entries[name], rows))

    def product(self, module: str, x: Tensor) -> Tensor:
        """x: (tokens, in), multiplied by a module's matrix: (tokens, out)."""
        name = f"{module}.weight"
        shape = self.entries[name].shape
        # Pieces that are kept would lie between those that are freed, and keep their memory.
        y = torch.empty(len(x), shape[0], dtype=torch.float64)
        for rows in shards.row_slices(shape):
            y[:, rows] = x @ self.rows(name, rows).T
        return y

    def linear(self, name: str, x: Tensor) -> Tensor:
        """x: (tokens, in) to (tokens, out)."""
        y = self.product(name, x)
        return y + self.whole(f"{name}.bias") if f"{name}.bias" in self else y

    def norm(self, name: str, x: Tensor) -> Tensor:
        """RMSNorm over the last dimension (Zhang and Sennrich, 2019)."""
        scale = (x.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"]).rsqrt()
        normed: Tensor = x * scale * self.whole(f"{name}.weight")
        return normed


def checked(name: str, tensor: Tensor) -> Tensor:
    """Convert to float64; refuses NaN and infinity, because JSON cannot hold such logits."""
    if not shards.finite(tensor):
        raise UserError(
            f"{name} holds NaN or infinite numbers.", "Fetch, convert or train the weights again."
        )
    return tensor.double()


def unsupported(config: dict[str, Any]) -> str | None:
    """Why this model is not supported here, or None."""
    if config.get("model_type") not in KINDS:
        return f"models of type {config.get('model_type')} are not supported"
    if config.get("hidden_act") != "silu":
        return f"the activation {config.get('hidden_act')} is not supported"
    window = config.get("sliding_window")
    if window and window < TOKENS and config.get("use_sliding_window", True):
        return f"a sliding window of {window} tokens is not supported"
    kind = rope_kind(rope(config))
    return None if kind in ROPES else f"rotary positions of type {kind} are not supported"


@torch.no_grad()
def forward(weights: Float64Weights, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits, (vocabulary,) in float64, of the token after each prompt."""
    with all_cores():
        return _forward(weights, prompts)


def _forward(weights: Float64Weights, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    sizes = [len(prompt) for prompt in prompts]
    table = "model.embed_tokens.weight"
    x = torch.cat([weights.rows(table, slice(i, i + 1)) for prompt in prompts for i in prompt])
    rotation = angles(weights.config, max(sizes))
    layers = range(weights.config["num_hidden_layers"])
    for number in tqdm(layers, desc="golden logits", unit="layer", disable=None):
        name = f"model.layers.{number}"
        normed = weights.norm(f"{name}.input_layernorm", x)
        x = x + attention(weights, f"{name}.self_attn", normed, sizes, rotation)
        normed = weights.norm(f"{name}.post_attention_layernorm", x)
        gate = torch.nn.functional.silu(weights.linear(f"{name}.mlp.gate_proj", normed))
        inner = gate * weights.linear(f"{name}.mlp.up_proj", normed)
        x = x + weights.linear(f"{name}.mlp.down_proj", inner)
    ends = torch.tensor(sizes).cumsum(0) - 1
    last = weights.norm("model.norm", x[ends])  # (prompts, width)
    head = "lm_head" if "lm_head.weight" in weights else table.removesuffix(".weight")
    return list(weights.product(head, last))


def attention(
    weights: Float64Weights, name: str, x: Tensor, sizes: Sequence[int], rotation: Tensor
) -> Tensor:
    """Causal attention within each prompt; x: (tokens, width), rotation: (positions, head / 2)."""
    config = weights.config
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads

    def split(part: str, count: int) -> Tensor:
        y = weights.linear(f"{name}.{part}_proj", x).unflatten(1, (count, -1))
        return (
            weights.norm(f"{name}.{part}_norm", y) if f"{name}.{part}_norm.weight" in weights else y
        )

    query, key, value = split("q", heads), split("k", kv_heads), split("v", kv_heads)
    results = []
    for q, k, v in zip(*(t.split(list(sizes)) for t in (query, key, value)), strict=True):
        q, k, v = (t.transpose(0, 1)[None] for t in (rotated(q, rotation), rotated(k, rotation), v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=heads != kv_heads
        )
        results.append(out[0].transpose(0, 1).flatten(1))  # (own tokens, heads * head)
    return weights.linear(f"{name}.o_proj", torch.cat(results))


def rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """Apply rotary positions in transformers' layout: halves are paired, not neighbours."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = (f(rotation[: len(x)])[:, None] for f in (torch.cos, torch.sin))
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rope(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary settings, read under the names of transformers 5 or of transformers 4."""
    theta = {"rope_theta": config.get("rope_theta") or 10000.0}
    return theta | (config.get("rope_parameters") or config.get("rope_scaling") or {})


def rope_kind(settings: dict[str, Any]) -> str:
    """The kind of rotary positions, read under its current name or that of 2023."""
    return str(settings.get("rope_type", settings.get("type", "default")))


def angles(config: dict[str, Any], positions: int) -> Tensor:
    """Angle of each position and pair, (positions, head / 2), float64.

    Su et al., "RoFormer", 2021. Type llama3 follows `apply_scaling` in Meta's llama-models: long
    wavelengths are stretched by `factor`, short ones are kept, those in between are blended.
    """
    settings = rope(config)
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    exponents = torch.arange(0, head, 2, dtype=torch.float64) / head
    frequencies = float(settings["rope_theta"]) ** -exponents
    kind = rope_kind(settings)
    if kind == "linear":
        frequencies = frequencies / settings["factor"]
    if kind == "llama3":
        low, high = settings["low_freq_factor"], settings["high_freq_factor"]
        waves = settings["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        kept = ((waves - low) / (high - low)).clamp(0, 1)
        frequencies = kept * frequencies + (1 - kept) * frequencies / settings["factor"]
    result: Tensor = torch.arange(positions, dtype=torch.float64)[:, None] * frequencies
    return result
