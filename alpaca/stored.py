"""The contents of a model folder: which files are its weights, and which tensors they hold.

All programs use this module, so that they train, plan, serve and convert the same weights, which
are those that transformers loads. It reads only config.json and file headers and imports no torch,
so plans and refusals are immediate.
"""

import json
import math
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alpaca.errors import UserError
from alpaca.layout import INDEX, ITEM_BYTES

PIECE = 1 << 20  # bytes compared at a time
LONGEST_HEADER = 100_000_000  # bytes, as in the safetensors library
ADAPTER = "adapter_config.json"  # peft's settings of an adapter
ADAPTER_WEIGHTS = "adapter_model.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/"
# Stored by older programs. The model computes them itself, and transformers skips them.
BUFFERS = (".rotary_emb.inv_freq", ".attn.bias", ".masked_bias")


@dataclass(frozen=True)
class Entry:
    """One tensor in a file: type (safetensors' name), shape, offset of its first byte, size."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


# model_type of the decoders whose loss and logits the tests compare with transformers'.
# phi is not one: its output layer has a bias, which the loss over target tokens does not add.
DECODERS = (
    "arcee", "ernie4_5", "exaone4", "gemma", "gemma3_text", "glm", "glm4", "helium",
    "hunyuan_v1_dense", "llama", "ministral", "ministral3", "mistral", "olmo", "olmo2", "olmo3",
    "phi3", "qwen2", "qwen3", "seed_oss", "smollm3", "starcoder2",
)  # fmt: skip
# Models of these types are tied unless config.json says otherwise.
TIED = ("ernie4_5", "gemma", "gemma3_text", "smollm3", "starcoder2")
CAPPED = ("final_logit_softcapping", "attn_logit_softcapping", "logit_scale", "logits_scaling")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
ROPES = ("default", "linear", "llama3", "yarn")
LENGTH_DEPENDENT = ("dynamic", "longrope", "su")
ADVICE = (
    "LLaMA, SmolLM, Mistral and Qwen models can, and these by their model_type: "
    + ", ".join(DECODERS)
    + "."
)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and not a model."""
    return (folder / ADAPTER).is_file() and not (folder / "config.json").is_file()


def check_adapter(folder: Path) -> None:
    """Refuse a folder with a LoRA or other adapter: transformers would also load its base model."""
    if not (folder / ADAPTER).is_file():
        return
    lora = read_json(folder / ADAPTER).get("peft_type") == "LORA"
    raise UserError(
        f"{folder} holds an adapter ({ADAPTER}): a change to a model, not a model.",
        f"Merge it into its base first: python -m alpaca merge {folder} -o "
        f"{folder.with_name(folder.resolve().name + '-merged')}"
        if lora
        else "Merge it into its base model with the program that made it (in peft: "
        "merge_and_unload, then save_pretrained into a new folder).",
    )


def check_config(config: dict[str, Any], where: Path) -> None:
    """Refuse a config.json whose model would not be computed here as transformers computes it.

    Raises:
        UserError: quantized weights, weights in another file, or an unsupported architecture.
    """
    if config.get("transformers_weights"):
        raise UserError(
            f"{where} names another weights file (transformers_weights).",
            "Rename that file to model.safetensors and remove the key.",
        )
    if method := quantization(config):
        raise UserError(
            f"{where} describes quantized weights ({method}): without their scales the numbers are "
            "wrong.",
            f"Dequantize them: python -m alpaca convert --input_dir {where.parent}"
            if method.endswith(CONVERTIBLE)
            else PLAIN,
        )
    kind = config.get("model_type")
    feature = _unsupported(config)
    if kind not in DECODERS or feature:
        raise UserError(
            f"{where} describes a model of type {kind}{feature}, which cannot be trained or served "
            "here.",
            ADVICE,
        )
    check_rope(config)


def _unsupported(config: dict[str, Any]) -> str:
    """A phrase for the feature of a model that is not supported; empty if none is found."""
    for name in EXPERTS:
        if isinstance(config.get(name), int) and config[name] > 1:
            return f" with {config[name]} experts ({name})"
    for name in ("vision_config", "audio_config", "text_config"):
        if name in config:
            return f" that reads more than text ({name})"
    for name in CAPPED:
        if config.get(name):
            return f" with {name} {config[name]}"
    own_code = config.get("auto_map") and config.get("model_type") not in DECODERS
    return " that brings its own code (auto_map)" if own_code else ""


CONVERTIBLE = ("fp8", "compressed-tensors")  # only in formats with one number per weight
PLAIN = "Use the folder it was quantized from, in bf16, fp16 or fp32."


def quantization(config: dict[str, Any]) -> str | None:
    """The quantization that config.json names, or None."""
    for key in ("quantization_config", "compression_config"):
        if settings := config.get(key):
            method = settings.get("quant_method") if isinstance(settings, dict) else None
            return f"{key}: {method or 'unnamed'}"
    return None


def check_rope(config: dict[str, Any]) -> None:
    """Refuse rotary embeddings that are unknown or depend on the other sequences of a batch.

    transformers 5 stores the settings in `rope_parameters`, for some models one set per type of
    layer. transformers 4 stored them in `rope_scaling`. `rope_type` was named `type` in 2023.
    """
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    for part in [settings, *settings.values()] if isinstance(settings, dict) else [settings]:
        kind = part.get("rope_type", part.get("type")) if isinstance(part, dict) else None
        if kind in LENGTH_DEPENDENT:
            raise UserError(
                f"The model's rotary embedding ({kind}) changes with the longest sequence of a "
                "pass, so it cannot be trained or served here.",
                ADVICE,
            )
        if kind not in (None, *ROPES):
            raise UserError(f"The model's rotary embedding ({kind}) is not supported.", ADVICE)


def is_tied(config: dict[str, Any]) -> bool:
    """Whether the output matrix is the embedding."""
    return bool(config.get("tie_word_embeddings", config.get("model_type") in TIED))


def weight_files(folder: Path, stem: str = "model", ending: str = ".safetensors") -> list[Path]:
    """The weight files of a folder: those that the index lists, or else the single file.

    If a folder has both, transformers loads the single file and vLLM the files of the index. Such a
    folder is refused, unless the index lists just that file. For old folders, give `pytorch_model`
    and `.bin`.

    Raises:
        UserError: there are no weights or two sets, or the index is damaged or lists a missing
            file.
    """
    check_adapter(folder)
    single, index = folder / f"{stem}{ending}", folder / f"{stem}{ending}.index.json"
    if not index.is_file():
        if single.is_file():
            return [single]
        raise _no_weights(folder, single.name, index.name, ending)
    listed = _listed(index, ending)
    if single.is_file() and listed != [single.name]:
        raise UserError(
            f"{folder} holds two sets of weights: {single.name}, which transformers loads, and "
            f"{index.name} with {_several(listed)}, which vLLM loads.",
            f"Delete the one you do not want: {single.name}, or {index.name} and its files.",
        )
    missing = [name for name in listed if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{index} names {len(listed)} files: {_several(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing.",
            f"Put the missing files into {folder}.",
        )
    return [folder / name for name in listed]


def _listed(index: Path, ending: str) -> list[str]:
    """The files that an index lists, sorted."""
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise UserError(f"{index} lists no files (weight_map).", "Fetch the file again.")
    for name in table.values():
        if not isinstance(name, str) or not name.endswith(ending) or "\0" in name:
            raise UserError(
                f"{index} names {name!r}, which is not a file.", "Fetch the file again."
            )
        if Path(name).name != name:
            raise UserError(
                f"{index} names {name!r}, which is outside {index.parent}.", "Fetch the file again."
            )
    return sorted(set(table.values()))


def _several(names: Iterable[str], shown: int = 4) -> str:
    listed = list(names)
    more = f" and {len(listed) - shown} more" if len(listed) > shown else ""
    return ", ".join(listed[:shown]) + more


def _no_weights(folder: Path, single: str, index: str, ending: str) -> UserError:
    found = sorted(path.name for path in folder.glob(f"*{ending}"))
    if not found:
        return UserError(
            f"{folder} holds no *{ending} files.",
            f"Convert it first: python -m alpaca convert --input_dir {folder}",
        )
    return UserError(
        f"{folder} holds {_several(found)}, but neither {single} nor {index}, so it is unclear "
        "which of them are the weights.",
        f"Fetch {index} as well; a single file with all weights must be named {single}.",
    )


def foreign_files(folder: Path) -> list[str]:
    """Names of other weight files in a folder, which are not read (perhaps another program's)."""
    own = {path.name for path in weight_files(folder)}
    kinds = ("*.safetensors", "*.bin", "*.pth", "*.pt", "*.gguf", "*.safetensors.index.json")
    if len(own) > 1 or (folder / INDEX).is_file():
        own.add(INDEX)
    return sorted({path.name for kind in kinds for path in folder.glob(kind)} - own)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; raises UserError if it is not one."""
    check_pointer(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise UserError(f"{path} is damaged: {error}", "Fetch the file again.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it is not a JSON object.", "Fetch the file again.")
    return value


def check_pointer(path: Path) -> None:
    """Refuse a Git LFS pointer, which stands for a file that was not downloaded."""
    with open(path, "rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise UserError(
                f"{path} is a Git LFS pointer: a note about the file, not the file.",
                f"Fetch the file itself: git -C {path.parent} lfs pull",
            )


def tensors(folder: Path) -> dict[str, Entry]:
    """Every tensor of a folder's plain weights, by name, from the files' headers.

    Raises:
        UserError: as `check_config`, `weight_files` and `header`; or two files hold the same
            tensor, a type is not bf16, fp16 or fp32, or an output matrix differs from the
            embedding that it is tied to.
    """
    config = read_json(folder / "config.json")
    check_config(config, folder / "config.json")
    found = entries(folder)
    check_types(found)
    head, table = found.get("lm_head.weight"), found.get("model.embed_tokens.weight")
    if head and table and is_tied(config) and not same(head, table):
        raise UserError(*differing_head(folder))
    return found


def check_types(found: dict[str, Entry]) -> None:
    """Refuse weights that are not bf16, fp16 or fp32."""
    for name, entry in found.items():
        if entry.dtype not in ITEM_BYTES and not name.endswith(BUFFERS):
            raise UserError(
                f"{entry.path}: {name} is {entry.dtype}; weights are {', '.join(ITEM_BYTES)}.",
                PLAIN,
            )


def differing_head(folder: Path) -> tuple[str, str]:
    """Message and remedy for a tied output matrix that is stored and differs from the embedding."""
    return (
        f"{folder}: config.json says tie_word_embeddings, but the stored lm_head.weight is not "
        "model.embed_tokens.weight: transformers 4 uses the second for both, transformers 5 uses "
        "each where it belongs.",
        'To keep both, write "tie_word_embeddings": false into config.json.',
    )


def entries(folder: Path) -> dict[str, Entry]:
    """Every tensor of a folder's weight files, of any type.

    Raises:
        UserError: as `weight_files` and `header`; or two files hold the same tensor.
    """
    found: dict[str, Entry] = {}
    for path in weight_files(folder):
        for name, entry in header(path).items():
            if name in found:
                raise UserError(
                    f"{found[name].path.name} and {path.name} in {folder} both hold {name}.",
                    f"Delete {INDEX} and the files of the model that you do not want.",
                )
            found[name] = entry
    return found


def check_fit(
    folder: Path, found: dict[str, Entry], wanted: dict[str, tuple[int, ...]], skipped: str = "(?!)"
) -> None:
    """Refuse weights with a tensor that is missing, has the wrong shape, or is not in the model.

    transformers only warns: it initializes a missing tensor at random and ignores an extra one.
    `skipped` is a pattern for names of tensors that the model does not read.
    """
    if missing := [name for name in wanted if name not in found]:
        raise UserError(
            f"{folder} lacks {len(missing)} tensor(s) (first: {min(missing)}).",
            "Is a shard missing? Fetch or convert the weights again.",
        )
    for name, shape in wanted.items():
        if found[name].shape != shape:
            raise UserError(
                f"{found[name].path}: {name} has shape {list(found[name].shape)}, config.json "
                f"implies {list(shape)}.",
                MISMATCH,
            )
    # A tied output matrix may be stored: `tensors` has checked that it equals the embedding.
    own = {*wanted, "lm_head.weight"}
    more = [name for name in found if name not in own and not name.endswith(BUFFERS)]
    if more := [name for name in more if not re.search(skipped, name)]:
        raise UserError(
            f"{folder} holds {len(more)} tensor(s) that a model of its config.json does not have "
            f"(first: {min(more)}).",
            MISMATCH,
        )


MISMATCH = "The weights and config.json belong to different models."


def same(one: Entry, other: Entry) -> bool:
    """Whether two tensors hold the same bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with open(one.path, "rb") as first, open(other.path, "rb") as second:
        first.seek(one.start)
        second.seek(other.start)
        left = one.size
        while left > 0:
            piece = min(left, PIECE)
            if first.read(piece) != second.read(piece):
                return False
            left -= piece
    return True


def header(path: Path) -> dict[str, Entry]:
    """The tensors of one file, by name (huggingface/safetensors, README, "Format").

    Raises:
        UserError: the file is truncated, damaged, or a Git LFS pointer.
    """
    check_pointer(path)
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(LONGEST_HEADER, size):
                raise ValueError("it is cut short, or not a safetensors file")
            table = json.loads(file.read(length))
        found = {}
        for name, entry in table.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            if not all(type(number) is int and number >= 0 for number in (start, end, *shape)):
                raise ValueError(f"{name} has an impossible shape or offset")
            found[name] = Entry(path, str(entry["dtype"]), shape, 8 + length + start, end - start)
        wanted = 8 + length
        for name, entry in sorted(found.items(), key=lambda item: (item[1].start, item[1].size)):
            bytes_each = ITEM_BYTES.get(entry.dtype)
            if entry.start != wanted or (bytes_each and entry.elements * bytes_each != entry.size):
                raise ValueError(f"the offsets of {name} do not fit its shape or the other tensors")
            wanted += entry.size
        if wanted != size:
            raise ValueError(f"it has {size:,} bytes, but its header says {wanted:,}")
    except (struct.error, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"{path} is damaged: {reason}.", "Copy or convert it again.") from None
    return found
