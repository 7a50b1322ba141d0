"""One table of tensor names in Hugging Face, Meta and GGUF files, and how shards split each.

Hugging Face names are written; Meta and GGUF names are read. Shards are model-parallel.
Sources: Meta's `llama` reference code (parallel layers), the GGUF specification.
"""

from dataclasses import dataclass
from typing import Literal

Dialect = Literal["meta", "gguf"]


@dataclass(frozen=True)
class Row:
    """One kind of tensor. `axis`: what shards split (0: rows, 1: columns, None: nothing).

    `rotary`: query or key heads; Meta and GGUF files store their channels in another order.
    """

    hf: str
    meta: str
    gguf: str
    axis: int | None
    rotary: bool = False


LAYER = (
    Row("self_attn.q_proj", "attention.wq", "attn_q", 0, rotary=True),
    Row("self_attn.k_proj", "attention.wk", "attn_k", 0, rotary=True),
    Row("self_attn.v_proj", "attention.wv", "attn_v", 0),
    Row("self_attn.o_proj", "attention.wo", "attn_output", 1),
    Row("mlp.gate_proj", "feed_forward.w1", "ffn_gate", 0),
    Row("mlp.up_proj", "feed_forward.w3", "ffn_up", 0),
    Row("mlp.down_proj", "feed_forward.w2", "ffn_down", 1),
    Row("input_layernorm", "attention_norm", "attn_norm", None),
    Row("post_attention_layernorm", "ffn_norm", "ffn_norm", None),
)
# LLaMA 1 and 2 split the embedding by columns, Llama 3 by rows; the reader decides by shape.
EMBEDDING = Row("model.embed_tokens", "tok_embeddings", "token_embd", None)
NORM = Row("model.norm", "norm", "output_norm", None)
OUTPUT = Row("lm_head", "output", "output", 0)

_LAYER_PREFIX = {"hf": "model.layers.{}.", "meta": "layers.{}.", "gguf": "blk.{}."}


def rows(layers: int, tied: bool) -> dict[str, Row]:
    """HF name -> row, for every tensor of a model with `layers` layers, in file order."""
    table = {f"{EMBEDDING.hf}.weight": EMBEDDING}
    for layer in range(layers):
        prefix = _LAYER_PREFIX["hf"].format(layer)
        table |= {f"{prefix}{row.hf}.weight": row for row in LAYER}
    table[f"{NORM.hf}.weight"] = NORM
    if not tied:
        table[f"{OUTPUT.hf}.weight"] = OUTPUT
    return table


def to_dialect(layers: int, tied: bool, dialect: Dialect) -> dict[str, str]:
    """HF name -> the name in another dialect, for every tensor of a model."""
    translated = {}
    for name, row in rows(layers, tied).items():
        prefix = ""
        if row in LAYER:
            prefix = _LAYER_PREFIX[dialect].format(name.split(".")[2])
        translated[name] = f"{prefix}{getattr(row, dialect)}.weight"
    return translated
