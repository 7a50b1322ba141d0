"""Find, check and open the shard files of a Meta checkpoint.

A truncated or missing file is the most common fault of a large download, so this is checked first.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import torch

from alpaca.convert.params import Params
from alpaca.convert.pickles import open_pickle, saved_as
from alpaca.errors import UserError

NAME = re.compile(r"consolidated\.(\d\d)\.pth")


def shard_files(folder: Path, listed: Iterable[str], params: Params) -> list[Path]:
    """The shards in order; raises UserError if one is missing.

    The number of shards follows from the numbers in the file names, the checklist (`listed`) and
    the size of the slices in the first file.
    """
    found = {int(match[1]): path for path in folder.glob("*.pth") if (match := _match(path))}
    single = folder / "consolidated.pth"
    if not found and single.is_file():
        return [single]
    odd = sorted(path.name for path in folder.glob("*.pth") if not _match(path))
    if odd or not found:
        name = odd[0] if odd else "no consolidated.00.pth"
        raise UserError(
            f"{folder} holds {name}.", "Meta's shards are named consolidated.00.pth, .01.pth, ..."
        )
    in_list = [int(match[1]) for name in listed if (match := NAME.fullmatch(name))]
    count = max(max([*found, *in_list]) + 1, _slices(found[min(found)], params))
    missing = [number for number in range(count) if number not in found]
    if missing:
        names = ", ".join(f"consolidated.{number:02}.pth" for number in missing)
        raise UserError(
            f"found {_spoken(sorted(found))} of a {count}-shard model: "
            f"{names} {'is' if len(missing) == 1 else 'are'} missing.",
            f"Put the missing files into {folder}, or replace params.json if it is "
            "another model's.",
        )
    return [found[number] for number in range(count)]


def _slices(path: Path, params: Params) -> int:
    """Number of slices that each tensor was cut into, from one shard; 1 if it is not known."""
    try:
        rows = open_pickle(path)["layers.0.attention.wq.weight"].shape[0]
    except (UserError, KeyError, IndexError):
        return 1  # `open_shards` reports what is wrong with the file
    return params.dim // rows if 0 < rows < params.dim else 1


def _match(path: Path) -> re.Match[str] | None:
    return NAME.fullmatch(path.name)


def _spoken(numbers: list[int]) -> str:
    """[0, 1, 3] -> "consolidated.00, .01, .03"."""
    return "consolidated" + ", ".join(f".{number:02}" for number in numbers)


def check_sizes(files: list[Path], params: Params, vocab: int) -> None:
    """Raise UserError if a file is smaller than `params.json` implies at 16 bits a number."""
    kv_width = params.kv_heads * params.head_dim
    layer = 2 * params.dim * (params.dim + kv_width) + 3 * params.dim * params.intermediate
    least = 2 * (params.layers * layer + vocab * params.dim) // len(files)
    for path in files:
        size = path.stat().st_size
        if size < least:
            raise UserError(
                f"{path} is cut short: {size:,} bytes, but params.json and {len(files)} "
                f"shard(s) imply at least {least:,}.",
                "Fetch the file again.",
            )


def open_shards(files: list[Path], params: Params) -> dict[Path, dict[str, torch.Tensor]]:
    """Open every shard, memory-mapped.

    Raises:
        UserError: a file is damaged, was renamed, or does not fit `params.json`.
    """
    opened = {path: open_pickle(path) for path in files}
    for path, tensors in opened.items():
        original = saved_as(path)
        if original.startswith("consolidated.") and original != path.stem:
            raise UserError(
                f"{path} was saved as {original}.pth: the shards are swapped.",
                "Give each file its original name.",
            )
        table = tensors.get("rope.freqs")
        if table is not None and table.numel() != params.head_dim // 2:
            raise UserError(
                f"{path} rotates {2 * table.numel()} channels per head, but params.json says "
                f"n_heads {params.heads}, which gives {params.head_dim}.",
                "Check that params.json belongs to this model.",
            )
    return opened
