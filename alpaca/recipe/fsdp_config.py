"""`--fsdp_config` as transformers reads it: a JSON file, or the JSON itself.

Settings of layers, offloading and recomputation are copied into the flags. Settings that FSDP2
decides by itself are accepted with a notice. Any other is refused, with its nearest match.
"""

import dataclasses
import difflib
import json
from pathlib import Path
from typing import Any

from alpaca.errors import UserError
from alpaca.recipe.arguments import Arguments

LAYERS = "transformer_layer_cls_to_wrap"
TAKEN = {LAYERS, "offload_params", "cpu_offload", "activation_checkpointing"}
DECIDED_HERE = {
    "auto_wrap_policy", "backward_prefetch", "backward_prefetch_policy",
    "cpu_ram_efficient_loading", "forward_prefetch", "limit_all_gathers", "min_num_params",
    "mixed_precision_policy", "reshard_after_forward", "sharding_strategy", "state_dict_type",
    "sync_module_states", "use_orig_params", "version",
}  # fmt: skip


def apply(arguments: Arguments) -> tuple[Arguments, list[str]]:
    """Merge `fsdp_config` into the flags; returns them and the notices to print.

    Raises:
        UserError: the file is missing or not a JSON object, or it has a key that FSDP does not.
    """
    if not arguments.fsdp_config:
        return arguments, []
    given = {
        key.removeprefix("fsdp_"): value for key, value in _read(arguments.fsdp_config).items()
    }
    unknown = sorted(set(given) - TAKEN - DECIDED_HERE)
    if unknown:
        match = difflib.get_close_matches(unknown[0], TAKEN | DECIDED_HERE, n=1)
        raise UserError(
            f"--fsdp_config: there is no setting {unknown[0]}.",
            f"Did you mean {match[0]}?"
            if match
            else f"Known settings: {', '.join(sorted(TAKEN))}.",
        )
    notices = [
        f"--fsdp_config: {name} has no effect: it is decided from --fsdp and the model"
        for name in sorted(set(given) & DECIDED_HERE)
    ]
    changed: dict[str, Any] = {}
    layers = given.get(LAYERS)
    if layers and not arguments.fsdp_transformer_layer_cls_to_wrap:
        changed["fsdp_transformer_layer_cls_to_wrap"] = (
            layers if isinstance(layers, str) else layers[0]
        )
    offloads = given.get("offload_params") or given.get("cpu_offload")
    if offloads and not arguments.offload:
        changed["fsdp"] = f"{arguments.fsdp} offload"
    if given.get("activation_checkpointing"):
        changed["gradient_checkpointing"] = True
    return dataclasses.replace(arguments, **changed), notices


def _read(given: str) -> dict[str, Any]:
    text = given
    if not given.lstrip().startswith("{"):
        path = Path(given)
        if not path.is_file():
            raise UserError(f"--fsdp_config: there is no file {path}.")
        text = path.read_text(encoding="utf-8")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"--fsdp_config is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError("--fsdp_config must be a JSON object of settings.")
    return found
