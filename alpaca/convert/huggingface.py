"""Hugging Face folders, old and new: `.bin` or safetensors shards, the class names of early 2023.

Tensors already have their names, of whichever architecture is served here; what changes is
everything around them: pickles become safetensors, buffers that are no weights are dropped, class
names and token ids are put right.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from alpaca.convert import expected
from alpaca.convert.families import size_name
from alpaca.convert.folders import inside
from alpaca.convert.hfsettings import read_json, read_settings
from alpaca.convert.hftokenizer import read_tokenizer
from alpaca.convert.pickles import check_type, open_pickle
from alpaca.convert.source import SHORT_NAMES, Source, Tensor
from alpaca.errors import UserError

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
BUFFERS = (".rotary_emb.inv_freq", ".attn.bias", ".masked_bias")


def open_folder(folder: Path, name: str) -> Source:
    """Describe a Hugging Face folder as a source; `name` is the folder to write.

    Raises:
        UserError: a file is missing or damaged, or the model is of a kind that is not served here.
    """
    described = read_settings(folder)
    config = described.config
    files = _weight_files(folder)
    stored: dict[str, tuple[Path, torch.Tensor]] = {}
    for path in files:
        for key, tensor in _open_weights(path).items():
            if not key.endswith(BUFFERS):
                check_type(path, key, tensor)
                stored[key] = (path, tensor)
    if "lm_head.weight" not in stored:
        config["tie_word_embeddings"] = True
    tensors = _tensors(folder, stored, config)
    vocabulary, tokenizer_files, notes = read_tokenizer(folder, described)
    totals: dict[torch.dtype, int] = {}
    for _, tensor in stored.values():
        totals[tensor.dtype] = totals.get(tensor.dtype, 0) + tensor.numel()
    dtype = max(totals, key=lambda kind: totals[kind])
    count = sum(tensor.parameters for tensor in tensors)
    return Source(
        name=name,
        found=f"Hugging Face folder: {size_name(count)}, {len(files)} file(s), {count:,} "
        f"parameters, {SHORT_NAMES[dtype]}, tokenizer {vocabulary.pieces:,} pieces",
        files=dict.fromkeys([*described.files, *tokenizer_files, *files]),
        config=config,
        dtype=dtype,
        tensors=tensors,
        vocabulary=vocabulary,
        facts={"family": "Hugging Face", "size": size_name(count), "parameters": count},
        generation=described.generation,
        notes=(*described.notes, *notes),
    )


def _weight_files(folder: Path) -> list[Path]:
    """The weight files: those of the index where there is one, else all of the better format."""
    for name in INDEXES:
        if (folder / name).is_file():
            listed = read_json(folder / name).get("weight_map")
            if not isinstance(listed, dict) or not listed:
                raise UserError(f"{folder / name} lists no files.", "Fetch the file again.")
            files = [inside(folder, str(file)) for file in sorted(set(listed.values()))]
            missing = [path.name for path in files if not path.is_file()]
            if missing:
                raise UserError(
                    f"{name} names {len(files)} files: {', '.join(missing)} "
                    f"{'is' if len(missing) == 1 else 'are'} missing.",
                    f"Put what is missing into {folder}.",
                )
            return files
    safe = sorted(folder.glob("*.safetensors"))
    found = safe or sorted(folder.glob("pytorch_model*.bin"))
    if not found:
        raise UserError(f"{folder} holds no weights (*.safetensors or pytorch_model*.bin).")
    return [inside(folder, path.name) for path in found]


def _open_weights(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix != ".safetensors":
        return open_pickle(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged: {error}", "Fetch it again.") from None


def _tensors(
    folder: Path, stored: dict[str, tuple[Path, torch.Tensor]], config: dict[str, Any]
) -> tuple[Tensor, ...]:
    wanted = expected.shapes(config)
    missing = [name for name in wanted if name not in stored]
    copy = {"lm_head.weight"} if config["tie_word_embeddings"] else set()
    unknown = sorted(set(stored) - set(wanted) - copy)
    if missing:
        raise UserError(f"{folder} lacks the tensor {missing[0]}.", "Is config.json its own?")
    if unknown:
        raise UserError(f"{folder} holds the tensor {unknown[0]}, which is not known.")
    return tuple(
        Tensor(name, tuple(tensor.shape), tensor.dtype, partial(_read, tensor))
        for name in wanted
        for _, tensor in [stored[name]]
    )


def _read(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype).contiguous()
