"""Read config.json and generation_config.json of a Hugging Face folder; no key is silently lost.

Each key is copied, used, dropped for a reason given in the tables below, or refused. A key that
transformers has no setting for is copied, and a note says that it has no effect.
"""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig

from alpaca import stored
from alpaca.convert import quantized
from alpaca.errors import UserError

# Key name in early 2023 -> key name today.
RENAMED = {"max_sequence_length": "max_position_embeddings"}
# Required for every architecture: for a missing key, transformers would use the default of some
# other model.
NEEDED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "rms_norm_eps",
)  # fmt: skip
# Key of config.json -> why it is not copied.
DROPPED = {
    "_name_or_path": "the path that its writer loaded it from",
    "architectures": "written for model_type",
    "auto_map": "code in a folder is never run; transformers has this architecture itself",
    "dtype": "written for the weights",
    "torch_dtype": "written for the weights",
    "transformers_version": "about the program that wrote the file",
    "eos_token_id": "replaced: the tokenizer's EOS first, then these",
    "_attn_implementation": "about the program that wrote the file",
    "_flash_attn_2_enabled": "about the program that wrote the file",
}


@dataclass(frozen=True)
class Settings:
    """The content of both files. `ends`: ids that end an answer. `notes`: printed to the user."""

    files: tuple[Path, ...]
    config: dict[str, Any]
    generation: dict[str, Any]
    ends: tuple[int, ...]
    quantization: dict[str, Any] | None
    notes: tuple[str, ...]


def read_settings(folder: Path) -> Settings:
    """Read both files of a folder; only config.json is required.

    Raises:
        UserError: a file is damaged, or the model is of an unsupported kind.
    """
    path = folder / "config.json"
    raw = read_json(path)
    quantization = quantized.settings(raw, path)  # removes it from `raw`
    raw |= {new: raw[old] for old, new in RENAMED.items() if old in raw and new not in raw}
    config = {key: value for key, value in raw.items() if key not in DROPPED and key not in RENAMED}
    if isinstance(raw.get("model_type"), str):
        config["model_type"] = raw["model_type"].lower()
    stored.check_config(config | {"auto_map": raw.get("auto_map")}, path)
    known = _config_keys(path, config)
    files, generation = [path], {}
    if (folder / "generation_config.json").is_file():
        files.append(folder / "generation_config.json")
        generation = read_json(files[-1])
    unknown = {
        path.name: [key for key in config if key not in known],
        "generation_config.json": sorted(set(generation) - set(GenerationConfig().to_dict())),
    }
    generated = {key: value for key, value in generation.items() if key not in DROPPED}
    return Settings(
        files=tuple(files),
        config=config,
        generation=generated,
        ends=tuple(_ids(generation) + _ids(raw)),
        quantization=quantization,
        notes=tuple(
            f"note: copied from {name} but unknown to transformers: {', '.join(keys)}"
            for name, keys in unknown.items()
            if keys
        ),
    )


def _config_keys(path: Path, config: dict[str, Any]) -> set[str]:
    """Keys that this architecture has a setting for; also checks and completes `config`."""
    kind = config["model_type"]
    known = set(AutoConfig.for_model(kind).to_dict())
    for key in NEEDED:
        if key in known and (
            not isinstance(config.get(key), int | float) or isinstance(config[key], bool)
        ):
            raise UserError(f"{path} lacks {key}.", "Fetch the file again.")
    pad = config.get("pad_token_id")
    if pad is not None and not (isinstance(pad, int) and 0 <= pad < config["vocab_size"]):
        del config["pad_token_id"]  # -1 in early 2023
    try:
        # A deep copy, because transformers modifies the dictionaries it is given.
        made = AutoConfig.for_model(**deepcopy(config))
    except Exception as error:  # each architecture raises its own errors
        reason = str(error).strip().splitlines()[-1] if str(error) else type(error).__name__
        raise UserError(
            f"{path} does not describe a model: {reason}", "Fetch the file again."
        ) from None
    config["tie_word_embeddings"] = bool(made.tie_word_embeddings)
    config["max_position_embeddings"] = made.max_position_embeddings
    old = {"rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq"}
    return known | old | set(type(made).attribute_map)


def _ids(settings: dict[str, Any]) -> list[int]:
    """The ids in a file's eos_token_id."""
    named = settings.get("eos_token_id")
    return [
        index
        for index in (named if isinstance(named, list) else [named])
        if isinstance(index, int) and not isinstance(index, bool)
    ]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; raises UserError if it is missing or not an object."""
    if not path.is_file():
        raise UserError(f"{path} is missing.", "Every Hugging Face model folder needs it.")
    return stored.read_json(path)
