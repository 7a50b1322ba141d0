"""The published models: family, size, shape and exact number of parameters.

`params.json` names neither family nor context length, so a model is recognized by its shape. The
table also catches a `params.json` that belongs to another model: some numbers, like the head count,
cannot be checked against tensor shapes, so they must agree with the published ones.
Sources: Touvron et al. 2023 (LLaMA, Llama 2), Grattafiori et al. 2024 (Llama 3), model cards.
"""

from dataclasses import dataclass
from typing import Literal

Tokenizer = Literal["sentencepiece", "tiktoken"]


@dataclass(frozen=True)
class Published:
    """One published model."""

    family: str
    size: str
    dim: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    norm_eps: float
    parameters: int
    tied: bool = False
    rope_factor: float | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """Its kind of tokenizer file."""
        return "tiktoken" if self.family.startswith("Llama 3") else "sentencepiece"


PUBLISHED = (
    Published("LLaMA 1", "7B", 4096, 32, 32, 32, 11008, 1e-6, 6_738_415_616),
    Published("LLaMA 1", "13B", 5120, 40, 40, 40, 13824, 1e-6, 13_015_864_320),
    Published("LLaMA 1", "30B", 6656, 60, 52, 52, 17920, 1e-6, 32_528_943_616),
    Published("LLaMA 1", "65B", 8192, 80, 64, 64, 22016, 1e-5, 65_285_660_672),
    Published("Llama 2", "7B", 4096, 32, 32, 32, 11008, 1e-5, 6_738_415_616),
    Published("Llama 2", "13B", 5120, 40, 40, 40, 13824, 1e-5, 13_015_864_320),
    Published("Llama 2", "70B", 8192, 80, 64, 8, 28672, 1e-5, 68_976_648_192),
    Published("Llama 3", "8B", 4096, 32, 32, 8, 14336, 1e-5, 8_030_261_248),
    Published("Llama 3", "70B", 8192, 80, 64, 8, 28672, 1e-5, 70_553_706_496),
    Published("Llama 3.1", "8B", 4096, 32, 32, 8, 14336, 1e-5, 8_030_261_248, False, 8.0),
    Published("Llama 3.1", "70B", 8192, 80, 64, 8, 28672, 1e-5, 70_553_706_496, False, 8.0),
    Published("Llama 3.1", "405B", 16384, 126, 128, 8, 53248, 1e-5, 405_853_388_800, False, 8.0),
    Published("Llama 3.2", "1B", 2048, 16, 32, 8, 8192, 1e-5, 1_235_814_400, True, 32.0),
    Published("Llama 3.2", "3B", 3072, 28, 24, 8, 8192, 1e-5, 3_212_749_824, True, 32.0),
    Published("Llama 3.3", "70B", 8192, 80, 64, 8, 28672, 1e-5, 70_553_706_496, False, 8.0),
)

CONTEXT = {"LLaMA 1": 2048, "Llama 2": 4096, "Llama 3": 8192}
SCALED_CONTEXT = 131072  # Llama 3.1 and later, where RoPE is scaled
THETA: dict[Tokenizer, float] = {"sentencepiece": 10_000.0, "tiktoken": 500_000.0}


def context(family: str) -> int:
    """Context length of a family, in tokens."""
    return CONTEXT.get(family, SCALED_CONTEXT)


def similar(dim: int, layers: int, tokenizer: Tokenizer) -> list[Published]:
    """The published models with this width, depth and kind of tokenizer."""
    return [
        model
        for model in PUBLISHED
        if (model.dim, model.layers, model.tokenizer) == (dim, layers, tokenizer)
    ]


def guess_family(
    *, tokenizer: Tokenizer, dim: int, kv_heads: int, norm_eps: float, scaled: bool, name: str
) -> str:
    """The family of a checkpoint, from `params.json` and, if that is ambiguous, the folder's name.

    At 7B and 13B, LLaMA 1 and Llama 2 differ only in norm_eps. Llama 3.1 70B and 3.3 70B do not
    differ at all.
    """
    plain = name.lower().replace("_", "-").replace("llama", "llama-").replace("--", "-")
    if tokenizer == "tiktoken":
        if not scaled:
            return "Llama 3"
        candidates = [f"Llama 3.{minor}" for minor in (1, 2, 3)]
        if dim in (2048, 3072):
            return "Llama 3.2"
        return next((one for one in candidates if one[-3:] in plain), candidates[0])
    if "llama-2" in plain or kv_heads == 8:
        return "Llama 2"
    return "LLaMA 1" if norm_eps < 5e-6 or dim == 8192 else "Llama 2"


def size_name(parameters: int) -> str:
    """A model's size in the usual short form: 7B, 135M."""
    if parameters < 1_000_000:
        return f"{parameters:,}"
    if parameters < 950_000_000:
        return f"{parameters / 1e6:.0f}M"
    return f"{parameters / 1e9:.1f}".removesuffix(".0") + "B"
