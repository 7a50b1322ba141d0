"""How a model's tensors are laid out in safetensors files, without torch.

A file is eight bytes (the header's length), a JSON header padded to a multiple of eight, and the
tensors' bytes in the header's order (huggingface/safetensors, README, "Format"). What writes model
folders and what plans their size both ask here.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000  # largest file of a model, unless one tensor alone is larger
ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4}  # by safetensors' names of types
TYPE_NAMES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}  # by the names that flags use
T = TypeVar("T")


def tensor_bytes(shape: Sequence[int], kind: str) -> int:
    """Size of a tensor of `shape` whose type safetensors calls `kind`."""
    return ITEM_BYTES[kind] * math.prod(shape)


def header(tensors: Mapping[str, tuple[Sequence[int], str]]) -> bytes:
    """The first bytes of a file that holds tensors of these shapes and types, in this order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (shape, kind) in tensors.items():
        end = start + tensor_bytes(shape, kind)
        entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def deal(tensors: Sequence[T], size: Callable[[T], int], limit: int) -> list[list[T]]:
    """Tensors, in order, dealt to files of at most `limit` bytes; one tensor may exceed it."""
    files: list[list[T]] = [[]]
    filled = 0
    for tensor in tensors:
        if files[-1] and filled + size(tensor) > limit:
            files.append([])
            filled = 0
        files[-1].append(tensor)
        filled += size(tensor)
    return files


def file_names(count: int) -> list[str]:
    """The names of a model's `count` files."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def index(files: Mapping[str, Sequence[str]], data_bytes: int) -> str:
    """The text of `INDEX` for the tensors of each file, as transformers writes it.

    `data_bytes`: size of all tensors, without headers.
    """
    places = {tensor: name for name, tensors in files.items() for tensor in tensors}
    content = {"metadata": {"total_size": data_bytes}, "weight_map": places}
    return json.dumps(content, indent=2, sort_keys=True) + "\n"
