"""Which models are trained and served here, by what their config.json says.

convert, train, plan and serve ask here, so that all refuse the same models in the same words,
before anyone has waited or paid. No torch is imported: a plan asks too. bench/families.py compares
what is accepted with transformers, family by family, and writes docs/models.md.
"""

import json
from pathlib import Path
from typing import Any

from alpaca.errors import UserError

# model_type of the decoders whose loss and greedy text are transformers' own.
CHECKED = ("llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3")
REMEDY = "Use a LLaMA, SmolLM, Mistral or Qwen model (docs/models.md lists what was checked)."
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# Keys that change the logits after the output layer; the value that changes nothing.
LOGITS = {"final_logit_softcapping": None, "logit_scale": 1, "logits_scaling": 1}


def check(config: dict[str, Any], where: Path) -> None:
    """Raise UserError unless the model of a config.json, `where`, is one of those."""
    reason = unsupported(config)
    if reason is not None:
        raise UserError(f"{where}: {reason}.", REMEDY)


def check_file(where: Path) -> None:
    """`check` for a config.json on disk; one that can't be read is left to its reader."""
    try:
        config = json.loads(where.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if isinstance(config, dict):
        check(config, where)


def unsupported(config: dict[str, Any]) -> str | None:
    """Why a model is neither converted, trained, planned nor served here; None if it is."""
    kind = str(config.get("model_type") or "llama").lower()  # early 2023 folders may lack it
    named = f"the model ({kind})"
    for key in EXPERTS:
        if isinstance(config.get(key), int) and config[key] > 1:
            return f"{named} is a mixture of {config[key]} experts ({key})"
    if "text_config" in config or "vision_config" in config:
        return f"{named} reads more than text (text_config, vision_config)"
    for key, neutral in LOGITS.items():
        if config.get(key) not in (None, neutral):
            return f"{named} changes its logits after the output layer ({key} {config[key]})"
    if config.get("attn_logit_softcapping"):
        return f"{named} caps its attention scores (attn_logit_softcapping)"
    if config.get("quantization_config"):
        return "its weights are quantized (quantization_config)"
    if kind not in CHECKED:
        code = "; its folder brings code for it (auto_map), which is never run here"
        own = code if config.get("auto_map") else ""
        return f"models of type {kind} have not been compared with transformers here{own}"
    return None
