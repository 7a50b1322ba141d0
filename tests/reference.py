"""Meta's LLaMA, from the papers, in plain PyTorch, and tiny checkpoints of every family of it.

The rotary form is the original one: channels (0, 1), (2, 3), ... of a head are the real and
imaginary parts of a number that is turned (Su et al. 2021). Grouped-query attention: Ainslie et al.
2023. The conversion must turn these files into folders in which transformers computes the same.
"""

import base64
import contextlib
import io
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F

from alpaca.cli import main

ROOT = Path(__file__).resolve().parent.parent
# Names, and the axis that a shard holds a slice of.
LAYER_AXES = {
    "attention.wq": 0,
    "attention.wk": 0,
    "attention.wv": 0,
    "attention.wo": 1,
    "feed_forward.w1": 0,
    "feed_forward.w2": 1,
    "feed_forward.w3": 0,
}


@dataclass(frozen=True)
class Shape:
    """A tiny model of one family."""

    family: str
    norm_eps: float = 1e-6
    kv_heads: int = 4
    theta: float | None = None
    scaled: bool = False
    tied: bool = False
    multiplier: float | None = None
    dim: int = 64
    layers: int = 2
    heads: int = 4
    multiple_of: int = 32
    vocab: int = 512  # of the tiny tokenizer; Llama 3's counts its control tokens

    @property
    def tiktoken(self) -> bool:
        return self.family.startswith("Llama 3")

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def intermediate(self) -> int:
        width = int(2 * (4 * self.dim) / 3)
        if self.multiplier is not None:
            width = int(self.multiplier * width)
        return self.multiple_of * math.ceil(width / self.multiple_of)

    @property
    def params(self) -> dict[str, object]:
        content: dict[str, object] = {
            "dim": self.dim,
            "multiple_of": self.multiple_of,
            "n_heads": self.heads,
            "n_layers": self.layers,
            "norm_eps": self.norm_eps,
            "vocab_size": self.vocab if self.tiktoken else -1,
        }
        if self.kv_heads != self.heads:
            content["n_kv_heads"] = self.kv_heads
        if self.multiplier is not None:
            content["ffn_dim_multiplier"] = self.multiplier
        if self.theta is not None:
            content["rope_theta"] = self.theta
        if self.scaled:
            content["use_scaled_rope"] = True
        return content


LLAMA_1 = Shape("LLaMA 1")
LLAMA_2 = Shape("Llama 2", norm_eps=1e-5)
LLAMA_2_GQA = Shape("Llama 2", norm_eps=1e-5, heads=8, kv_heads=4, multiplier=1.3)
LLAMA_3 = Shape("Llama 3", 1e-5, heads=8, theta=500000.0, multiplier=1.3, vocab=544)
LLAMA_3_1 = replace(LLAMA_3, family="Llama 3.1", scaled=True, dim=128)
LLAMA_3_2 = replace(LLAMA_3, family="Llama 3.2", scaled=True, tied=True)


def weights(shape: Shape, dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights by Meta's names; the norms are not all ones, so that mix-ups show."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        return (torch.randn(*size, generator=generator) / math.sqrt(size[-1])).to(dtype)

    kv_width, vocab = shape.kv_heads * shape.head_dim, shape.vocab
    held = {"tok_embeddings.weight": draw(vocab, shape.dim)}
    for layer in range(shape.layers):
        prefix = f"layers.{layer}."
        held |= {
            f"{prefix}attention.wq.weight": draw(shape.dim, shape.dim),
            f"{prefix}attention.wk.weight": draw(kv_width, shape.dim),
            f"{prefix}attention.wv.weight": draw(kv_width, shape.dim),
            f"{prefix}attention.wo.weight": draw(shape.dim, shape.dim),
            f"{prefix}feed_forward.w1.weight": draw(shape.intermediate, shape.dim),
            f"{prefix}feed_forward.w2.weight": draw(shape.dim, shape.intermediate),
            f"{prefix}feed_forward.w3.weight": draw(shape.intermediate, shape.dim),
            f"{prefix}attention_norm.weight": 1 + draw(shape.dim),
            f"{prefix}ffn_norm.weight": 1 + draw(shape.dim),
        }
    held["norm.weight"] = 1 + draw(shape.dim)
    if not shape.tied:
        held["output.weight"] = draw(vocab, shape.dim)
    return held


def logits(shape: Shape, held: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """The model itself, fp32: ids (batch, length) to logits (batch, length, vocabulary)."""
    held = {name: tensor.float() for name, tensor in held.items()}
    x = held["tok_embeddings.weight"][ids]
    turns = rotations(shape, ids.shape[1])
    for layer in range(shape.layers):
        own = {
            name.removeprefix(f"layers.{layer}."): tensor
            for name, tensor in held.items()
            if name.startswith(f"layers.{layer}.")
        }
        x = x + attention(shape, own, rms_norm(x, own["attention_norm.weight"], shape), turns)
        y = rms_norm(x, own["ffn_norm.weight"], shape)
        gate = F.silu(y @ own["feed_forward.w1.weight"].T)
        x = x + (gate * (y @ own["feed_forward.w3.weight"].T)) @ own["feed_forward.w2.weight"].T
    x = rms_norm(x, held["norm.weight"], shape)
    return x @ held.get("output.weight", held["tok_embeddings.weight"]).T


def rms_norm(x: torch.Tensor, weight: torch.Tensor, shape: Shape) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + shape.norm_eps) * weight


def attention(
    shape: Shape, own: dict[str, torch.Tensor], x: torch.Tensor, turns: torch.Tensor
) -> torch.Tensor:
    batch, length, _ = x.shape

    def heads(name: str, count: int) -> torch.Tensor:
        return (x @ own[f"attention.{name}.weight"].T).view(batch, length, count, shape.head_dim)

    q = turn(heads("wq", shape.heads), turns)
    k = turn(heads("wk", shape.kv_heads), turns)
    v = heads("wv", shape.kv_heads)
    groups = shape.heads // shape.kv_heads
    k, v = (part.repeat_interleave(groups, dim=2) for part in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(shape.head_dim)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    mixed = scores.masked_fill(future, -math.inf).softmax(-1)
    out = torch.einsum("bhqk,bkhd->bqhd", mixed, v).reshape(batch, length, -1)
    return out @ own["attention.wo.weight"].T


def rotations(shape: Shape, length: int) -> torch.Tensor:
    """(length, head_dim / 2) complex numbers of modulus 1."""
    theta = shape.theta or 10000.0
    speeds = [theta ** (-2 * i / shape.head_dim) for i in range(shape.head_dim // 2)]
    if shape.scaled:
        factor = 32.0 if shape.family == "Llama 3.2" else 8.0
        speeds = [slowed(speed, factor) for speed in speeds]
    angles = torch.outer(torch.arange(length, dtype=torch.float64), torch.tensor(speeds).double())
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)


def slowed(speed: float, factor: float) -> float:
    """Llama 3.1's scaling: long wavelengths are stretched, short ones kept, between: blended."""
    wavelength = 2 * math.pi / speed
    if wavelength < 8192 / 4:
        return speed
    if wavelength > 8192 / 1:
        return speed / factor
    blend = (8192 / wavelength - 1) / (4 - 1)
    return (1 - blend) * speed / factor + blend * speed


def turn(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Rotate (batch, length, heads, head_dim) by position: neighbours are one complex number."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns[:, None, :]).flatten(-2)


def split(
    shape: Shape, held: dict[str, torch.Tensor], shards: int
) -> list[dict[str, torch.Tensor]]:
    """Deal weights to model-parallel shards as Meta does."""
    dealt: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]
    for name, tensor in held.items():
        kind = name.removesuffix(".weight")
        axis = LAYER_AXES.get(".".join(kind.split(".")[-2:]))
        if kind == "tok_embeddings":
            axis = 0 if shape.tiktoken else 1
        elif kind == "output":
            axis = 0
        parts = [tensor] * shards if axis is None else tensor.chunk(shards, axis)
        for shard, part in zip(dealt, parts, strict=True):
            shard[name] = part.clone()
    if not shape.tiktoken:
        for shard in dealt:
            shard["rope.freqs"] = torch.ones(shape.head_dim // 2)
    return dealt


def save(folder: Path, shape: Shape, held: dict[str, torch.Tensor], shards: int = 1) -> Path:
    """Write a checkpoint folder as Meta publishes it, its tokenizer inside."""
    folder.mkdir(parents=True)
    for number, shard in enumerate(split(shape, held, shards)):
        torch.save(shard, folder / f"consolidated.{number:02}.pth")
    (folder / "params.json").write_text(json.dumps(shape.params))
    (folder / "tokenizer.model").write_bytes(tokenizer_model(shape.tiktoken))
    return folder


def tokenizer_model(tiktoken: bool) -> bytes:
    """A tiny tokenizer file of either kind."""
    if tiktoken:
        extra = [bytes([first, second]) for first in b"etaoinsh" for second in b"rdlu"]
        words = [*(bytes([byte]) for byte in range(256)), *extra]
        lines = [f"{base64.b64encode(word).decode()} {i}" for i, word in enumerate(words)]
        return "\n".join(lines).encode() + b"\n"
    return _sentencepiece_model()


_trained: list[bytes] = []


def _sentencepiece_model() -> bytes:
    """Trained once, on this package's sources, with LLaMA's settings."""
    if not _trained:
        text = [path.read_text() for path in sorted((ROOT / "alpaca").glob("*.py"))]
        lines = [line for source in text for line in source.splitlines() if line.strip()]
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=512,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            character_coverage=0.999,
            num_threads=1,
            minloglevel=2,
        )
        _trained.append(model.getvalue())
    return _trained[0]


def convert(*arguments: object) -> tuple[int, str]:
    """`python -m alpaca convert ...` in this process: its exit code, and all it printed."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main(["convert", *map(str, arguments)])
        except SystemExit as end:
            return int(end.code or 0), said.getvalue()
    raise AssertionError("the command did not end by itself")
