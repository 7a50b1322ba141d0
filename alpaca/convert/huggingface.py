"""Hugging Face folders, old and new: `.bin` or safetensors shards, the class names of early 2023.

Tensors already have their names; what changes is everything around them: pickles become
safetensors, buffers that are no weights are dropped, class names and token ids are put right.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from alpaca.convert import names, quantized
from alpaca.convert.families import size_name
from alpaca.convert.folders import inside
from alpaca.convert.hftokenizer import read_tokenizer
from alpaca.convert.pickles import check_type, open_pickle
from alpaca.convert.source import SHORT_NAMES, Source, Tensor, llama_config
from alpaca.errors import UserError
from alpaca.stored import (
    INDEX,
    check_config,
    check_pointer,
    check_types,
    differing_head,
    entries,
    weight_files,
)

# Old name in config.json -> today's.
RENAMED = {"max_sequence_length": "max_position_embeddings"}
SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "rms_norm_eps",
)
BUFFERS = (".rotary_emb.inv_freq", ".attn.bias", ".masked_bias")


def open_folder(folder: Path, name: str) -> Source:
    """Describe a Hugging Face folder as a source; `name` is the folder to write.

    Raises:
        UserError: a file is missing or damaged, or the model is not of the LLaMA architecture.
    """
    raw = read_json(folder / "config.json")
    quantization = quantized.settings(raw, folder / "config.json")
    check_config(raw, folder / "config.json")
    config = _config(folder, raw)
    files = _weight_files(folder, plain=quantization is None)
    stored: dict[str, tuple[Path, torch.Tensor]] = {}
    held: dict[str, torch.Tensor] = {}
    for path in files:
        for key, tensor in _open_weights(path).items():
            held[key] = tensor
            if not key.endswith(BUFFERS) and not (quantization and quantized.is_scale(key)):
                stored[key] = (path, tensor)
    readers = quantized.readers(held, quantization, folder) if quantization else {}
    for key, (path, tensor) in stored.items():
        if key not in readers:
            check_type(path, key, tensor)
    tied = bool(raw.get("tie_word_embeddings")) or "lm_head.weight" not in stored
    config["tie_word_embeddings"] = tied
    tensors = _tensors(folder, stored, config, tied, readers)
    vocabulary, tokenizer_files = read_tokenizer(folder, raw, config["vocab_size"])
    totals: dict[torch.dtype, int] = {}
    for _, tensor in stored.values():
        totals[tensor.dtype] = totals.get(tensor.dtype, 0) + tensor.numel()
    dtype = torch.bfloat16 if readers else max(totals, key=lambda kind: totals[kind])
    told = f", of {len(readers)} quantized tensors each times its scale" if readers else ""
    count = sum(tensor.parameters for tensor in tensors)
    return Source(
        name=name,
        found=f"Hugging Face folder: {size_name(count)}, {len(files)} file(s), {count:,} "
        f"parameters, {SHORT_NAMES[dtype]}{told}, tokenizer {vocabulary.pieces:,} pieces",
        files=dict.fromkeys([folder / "config.json", *tokenizer_files, *files]),
        config=config,
        dtype=dtype,
        tensors=tensors,
        vocabulary=vocabulary,
        facts={"family": "Hugging Face", "size": size_name(count), "parameters": count},
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the folder; raises UserError when it is not one."""
    if not path.is_file():
        raise UserError(f"{path} is missing.", "It belongs to a Hugging Face folder.")
    check_pointer(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON: {error}", "Fetch the file again.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object.", "Fetch the file again.")
    return value


def _config(folder: Path, raw: dict[str, Any]) -> dict[str, Any]:
    raw |= {new: raw[old] for old, new in RENAMED.items() if old in raw and new not in raw}
    kind = str(raw.get("model_type", "")).lower()
    if kind != "llama":
        raise UserError(
            f"{folder / 'config.json'} describes a {kind or 'nameless'} model with settings that "
            "are not plain LLaMA.",
            "Folders of another architecture need no conversion when they hold safetensors.",
        )
    for key in SHAPE:
        if not isinstance(raw.get(key), int | float):
            raise UserError(f"{folder / 'config.json'} lacks {key}.", "Fetch the file again.")
    rope = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or {k: v for k, v in rope.items() if k != "rope_theta"}
    plain = scaling.get("rope_type", scaling.get("type", "default")) == "default"
    return llama_config(
        **{key: raw[key] for key in SHAPE},
        num_key_value_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
        head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
        max_position_embeddings=raw.get("max_position_embeddings", 2048),
        rope_theta=float(raw.get("rope_theta") or rope.get("rope_theta") or 10_000.0),
        rope_scaling=None if plain else scaling,
        attention_bias=bool(raw.get("attention_bias")),
        mlp_bias=bool(raw.get("mlp_bias")),
    )


def _weight_files(folder: Path, *, plain: bool) -> list[Path]:
    """The weight files that transformers would load: safetensors, else pickles."""
    kind = ("pytorch_model", ".bin")
    safe = any((folder / name).is_file() for name in ("model.safetensors", INDEX))
    old = any((folder / f"pytorch_model.bin{end}").is_file() for end in ("", ".index.json"))
    if not safe and not old and not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder} holds no weights (*.safetensors or pytorch_model*.bin).")
    files = weight_files(folder, *kind) if old and not safe else weight_files(folder)
    for path in files:
        check_pointer(path)
    if safe and plain:
        check_types(entries(folder))
    return [inside(folder, path.name) for path in files]


def _open_weights(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix != ".safetensors":
        return open_pickle(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged: {error}", "Fetch it again.") from None


def _tensors(
    folder: Path,
    stored: dict[str, tuple[Path, torch.Tensor]],
    config: dict[str, Any],
    tied: bool,
    readers: dict[str, quantized.Read],
) -> tuple[Tensor, ...]:
    biased = [part for part in ("attention", "mlp") if config[f"{part}_bias"]]
    wanted = names.with_biases(names.rows(config["num_hidden_layers"], tied), biased)
    missing = [name for name in wanted if name not in stored]
    unknown = sorted(set(stored) - set(wanted) - ({"lm_head.weight"} if tied else set()))
    if tied and "lm_head.weight" in stored:
        (_, head), (_, table) = stored["lm_head.weight"], stored["model.embed_tokens.weight"]
        if not torch.equal(head, table):
            raise UserError(*differing_head(folder))
    if missing:
        raise UserError(f"{folder} lacks the tensor {missing[0]}.", "Is config.json its own?")
    if unknown:
        raise UserError(f"{folder} holds the tensor {unknown[0]}, which is not known.")
    return tuple(
        Tensor(
            name,
            tuple(tensor.shape),
            torch.float32 if name in readers else tensor.dtype,
            readers.get(name) or partial(_read, tensor),
        )
        for name in wanted
        for _, tensor in [stored[name]]
    )


def _read(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype).contiguous()
