"""Load and save a model folder.

A model folder is one that transformers reads: `config.json`, safetensors shards, a tokenizer.
Weights are loaded from safetensors only, never from pickles, and code in a folder is never run.
"""

from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)

from alpaca import stored
from alpaca.errors import UserError
from alpaca.folder import check_folder
from alpaca.recipe import rules
from alpaca.shards import TYPES


def check_weights(folder: Path) -> dict[str, stored.Entry]:
    """Raise UserError unless a folder holds exactly the tensors that its config.json implies.

    Returns the tensors. The model is built on the meta device, which takes no memory.
    """
    found = check_folder(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # a wrong entry can make transformers raise anything
        raise UserError(
            f"{folder / 'config.json'} does not describe a model that transformers can "
            f"build: {error}",
            "Fetch the file again.",
        ) from None
    model.tie_weights()
    wanted = {name: tuple(value.shape) for name, value in model.named_parameters()}
    skipped = "|".join(model._keys_to_ignore_on_load_unexpected or ()) or "(?!)"
    stored.check_fit(folder, found, wanted, skipped)
    return found


def load_model(
    folder: Path, dtype: torch.dtype | None, device_map: str | None = None
) -> PreTrainedModel:
    """Load a model folder in evaluation mode, to CPU memory or by `device_map`.

    `dtype` is the type of the weights in memory. None means their type in the files, or fp32 if
    the tensors have several; the dtype in config.json is not used, because it may differ and would
    round them. `device_map` is a device, to which the weights are loaded straight from disk, or
    "auto" to spread them over all GPUs.
    """
    found = check_weights(folder)
    kinds = {entry.dtype for name, entry in found.items() if not name.endswith(stored.BUFFERS)}
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype or (TYPES[kinds.pop()] if len(kinds) == 1 else torch.float32),
        device_map=device_map,
        local_files_only=True,
        use_safetensors=True,
    )


def compute_dtype(device: torch.device) -> torch.dtype:
    """The type to compute in: bf16 if the hardware multiplies it fast, else fp32."""
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device)[0] >= 8
    else:
        fast = rules.cpu_multiplies_bf16()
    return torch.bfloat16 if fast else torch.float32
