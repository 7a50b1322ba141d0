"""Read Hugging Face folders, old and new: `.bin` or safetensors shards, class names of early 2023.

Tensor names stay as they are. Pickles become safetensors, buffers that are not weights are dropped,
and wrong class names and token ids are corrected.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from alpaca.convert import expected, quantized
from alpaca.convert.families import size_name
from alpaca.convert.folders import inside
from alpaca.convert.hfsettings import read_settings
from alpaca.convert.hftokenizer import read_tokenizer
from alpaca.convert.pickles import check_type, open_pickle
from alpaca.convert.source import Source, Tensor
from alpaca.errors import UserError
from alpaca.layout import INDEX
from alpaca.shards import SHORT_NAMES
from alpaca.stored import (
    BUFFERS,
    check_pointer,
    check_types,
    differing_head,
    entries,
    weight_files,
)


def open_folder(folder: Path, name: str) -> Source:
    """Describe a Hugging Face folder as a source; `name` is that of the folder to write.

    Raises:
        UserError: a file is missing or damaged, or the model is of an unsupported kind.
    """
    described = read_settings(folder)
    config, quantization = described.config, described.quantization
    files = _weight_files(folder, plain=quantization is None)
    stored: dict[str, tuple[Path, torch.Tensor]] = {}
    loaded: dict[str, torch.Tensor] = {}
    for path in files:
        for key, tensor in _open_weights(path).items():
            loaded[key] = tensor
            if not key.endswith(BUFFERS) and not (quantization and quantized.is_scale(key)):
                stored[key] = (path, tensor)
    readers = quantized.readers(loaded, quantization, folder) if quantization else {}
    for key, (path, tensor) in stored.items():
        if key not in readers:
            check_type(path, key, tensor)
    if "lm_head.weight" not in stored:
        config["tie_word_embeddings"] = True
    tensors = _tensors(folder, stored, config, readers)
    vocabulary, tokenizer_files, notes = read_tokenizer(folder, described)
    totals: dict[torch.dtype, int] = {}
    for _, tensor in stored.values():
        totals[tensor.dtype] = totals.get(tensor.dtype, 0) + tensor.numel()
    dtype = torch.bfloat16 if readers else max(totals, key=lambda kind: totals[kind])
    quantized_note = f" from {len(readers)} quantized tensors and their scales" if readers else ""
    count = sum(tensor.parameters for tensor in tensors)
    return Source(
        name=name,
        found=f"Hugging Face folder: {size_name(count)}, {len(files)} file(s), {count:,} "
        f"parameters, {SHORT_NAMES[dtype]}{quantized_note}, tokenizer {vocabulary.pieces:,} pieces",
        files=dict.fromkeys([*described.files, *tokenizer_files, *files]),
        config=config,
        dtype=dtype,
        tensors=tensors,
        vocabulary=vocabulary,
        facts={"family": "Hugging Face", "size": size_name(count), "parameters": count},
        generation=described.generation,
        notes=(*described.notes, *notes),
    )


def _weight_files(folder: Path, *, plain: bool) -> list[Path]:
    """The weight files that transformers would load: safetensors if there are any, else pickles."""
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
    readers: dict[str, quantized.Read],
) -> tuple[Tensor, ...]:
    wanted = expected.shapes(config)
    missing = [name for name in wanted if name not in stored]
    tied = config["tie_word_embeddings"]
    unknown = sorted(set(stored) - set(wanted) - ({"lm_head.weight"} if tied else set()))
    if tied and "lm_head.weight" in stored:
        (_, head), (_, table) = stored["lm_head.weight"], stored["model.embed_tokens.weight"]
        if not torch.equal(head, table):
            raise UserError(*differing_head(folder))
    if missing:
        raise UserError(
            f"{folder} lacks the tensor {missing[0]}.",
            "Check that config.json belongs to this model.",
        )
    if unknown:
        raise UserError(f"{folder} holds the unknown tensor {unknown[0]}.")
    return tuple(
        Tensor(
            name,
            tuple(tensor.shape),
            None if name in readers else tensor.dtype,
            readers.get(name) or partial(_read, tensor),
        )
        for name in wanted
        for _, tensor in [stored[name]]
    )


def _read(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype).contiguous()
