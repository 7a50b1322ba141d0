"""The input of a conversion, in one form for Meta checkpoints, GGUF files and HF folders.

Describing a source loads no tensors: each knows its shape and has a function that reads it. The
writer reads one at a time, so a 405B model needs little more memory than a 1B one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from alpaca import rounding
from alpaca.description import Vocabulary
from alpaca.errors import UserError
from alpaca.shards import finite


@dataclass(frozen=True)
class Tensor:
    """One tensor of the output: `read(dtype)` returns it, contiguous, of `shape`.

    `stored` is its type in the source; None if it is dequantized.
    """

    name: str
    shape: tuple[int, ...]
    stored: torch.dtype | None
    read: Callable[[torch.dtype], torch.Tensor]

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()

    def value(self, dtype: torch.dtype, error: rounding.Error | None = None) -> torch.Tensor:
        """The tensor in `dtype`; `error` accumulates the rounding error, if any.

        Raises:
            UserError: it holds NaN or infinite numbers, or numbers too large for fp16.
        """
        value = self._rounded(dtype, error) if error is not None else self.read(dtype)
        if finite(value):
            return value
        if dtype == torch.float16 and self.stored != dtype and finite(self.read(torch.float32)):
            raise UserError(
                f"{self.name} holds numbers too large for fp16.",
                "Convert with --dtype bf16 or fp32.",
            )
        raise UserError(
            f"{self.name} holds NaN or infinite numbers.",
            "The source was damaged before it was published or copied: fetch it again.",
        )

    def _rounded(self, dtype: torch.dtype, error: rounding.Error) -> torch.Tensor:
        if dtype in (self.stored, torch.float32):
            return self.read(dtype)
        exact = self.read(torch.float32)
        value = exact.to(dtype)
        error.add(exact, value)
        return value

    def exact(self, dtype: torch.dtype) -> torch.dtype:
        """`dtype` if it represents every stored number exactly, else the stored type."""
        if self.stored in (None, dtype):
            return dtype
        value = self.read(self.stored)
        return dtype if torch.equal(value.to(dtype).to(self.stored), value) else self.stored


@dataclass(frozen=True)
class Source:
    """A model found on disk, ready to be converted.

    Attributes:
        name: of the folder to write.
        found: one line that describes the model to the user.
        files: every file read, with its MD5 if a checklist gives one.
        config: config.json without token ids and dtype, which follow from the vocabulary and dtype.
        dtype: the type of most numbers.
        facts: what the passport records about the model.
        generation: generation_config.json, also without token ids.
        notes: lines for the user about settings that are not used or not copied.
    """

    name: str
    found: str
    files: dict[Path, str | None]
    config: dict[str, Any]
    dtype: torch.dtype
    tensors: tuple[Tensor, ...]
    vocabulary: Vocabulary
    facts: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Number of parameters; tied ones count once."""
        return sum(tensor.parameters for tensor in self.tensors)


def llama_config(**shape: Any) -> dict[str, Any]:
    """config.json of a LLaMA-architecture model, with keys that transformers 4 and 5 both read."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "use_cache": True,
        **shape,
    }


def unpermute(heads: torch.Tensor, count: int) -> torch.Tensor:
    """Reorder the rows of query or key weights from Meta's rotary layout to Hugging Face's.

    Meta rotates channels (0, 1), (2, 3), ... of each head (Su et al., "RoFormer", 2021);
    transformers rotates (0, d/2), (1, d/2 + 1), ... So the even channels go first.

    Args:
        heads: (count * head_dim, ...) weights or biases; a view is returned.
        count: number of heads in it.
    """
    rest = heads.shape[1:]
    half = heads.shape[0] // count // 2
    return heads.view(count, half, 2, *rest).transpose(1, 2)  # (heads, 2, half, ...)


def permute(heads: torch.Tensor, count: int) -> torch.Tensor:
    """Undo `unpermute`: from Hugging Face's rotary layout to Meta's, as GGUF keeps it; a view."""
    rest = heads.shape[1:]
    half = heads.shape[0] // count // 2
    return heads.view(count, 2, half, *rest).transpose(1, 2)  # (heads, half, 2, ...)
