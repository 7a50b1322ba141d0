"""`python -m alpaca verify FOLDER`: is every file, and every weight, what the passport says?

Hashes find whatever changed by accident; golden logits find a changed weight whose hash was
written anew. Everything that differs is named, not only the first thing.
"""

import argparse
from pathlib import Path
from typing import Any

from tqdm import tqdm

from alpaca import passport, stored
from alpaca.errors import UserError

# Written into a folder after its passport; a checkpoint has its own checks.
BESIDE = {"log.jsonl", "loss.png", "loss.svg", "demo.json"}
# What loaders look for by its name: one that was added changes what is loaded.
LOADED = {".safetensors", ".bin", ".json", ".model", ".jinja", ".py", ".txt", ".gguf", ".pth"}


def parser() -> argparse.ArgumentParser:
    """Flags of the verb."""
    made = argparse.ArgumentParser(
        description="Compare a model folder with its passport: every file's hash, and the logits "
        "it answers three golden prompts with.",
        epilog="Exit code 0: all as written. 2: something differs, and is named.",
    )
    made.add_argument("folder", type=Path, help="a model or tokenizer folder")
    made.add_argument("--no-golden", action="store_true", help="hashes only")
    made.add_argument(
        "--add-golden", action="store_true",
        help="compute golden logits for a folder that has none, once its hashes are right",
    )  # fmt: skip
    return made


def run(arguments: argparse.Namespace) -> None:
    """Verify, and say what was.

    Raises:
        UserError: something differs; the message names every file, tensor and prompt.
    """
    folder: Path = arguments.folder
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.")
    held = passport.read(folder)
    if held is None:
        raise UserError(
            f"{folder} has no passport: it was made by another program, or before there were any.",
            "Only folders written by convert and train.py can be verified.",
        )
    found = sealed(folder, held) + files(folder, held)
    golden = held.get("golden")
    if not found and golden and not arguments.no_golden:
        found = golden_logits(folder, held)
    if found:
        raise UserError(
            f"{folder} is not what its passport says:\n    " + "\n    ".join(found),
            "Copy, convert or train the folder again; nothing else can mend it.",
        )
    if not golden and arguments.add_golden:
        golden = add_golden(folder, held)
    print(summary(folder, held, checked=bool(golden) and not arguments.no_golden))


def sealed(folder: Path, held: dict[str, Any]) -> list[str]:
    """What is wrong with the passport itself."""
    text = (folder / passport.NAME).read_text(encoding="utf-8")
    if held[passport.SEAL] == passport.seal(held) and text == passport.render(held):
        return []
    return [f"{passport.NAME} was changed after it was written"]


def files(folder: Path, held: dict[str, Any]) -> list[str]:
    """What is wrong with the files: one line for each that is missing, changed or too many."""
    wanted: dict[str, str] = held["files"]
    beside = {name: value for name, value in held.get("beside", {}).items()
              if (folder / name).is_file()}  # fmt: skip
    there = [name for name in wanted if (folder / name).is_file()]
    told = [f"{name} is missing" for name in wanted if name not in there]
    names = [*there, *beside]
    # The largest first: a thread that ends late should have begun early.
    names.sort(key=lambda name: -(folder / name).stat().st_size)
    total = sum((folder / name).stat().st_size for name in names)
    with tqdm(total=total, unit="B", unit_scale=True, desc="hashing", disable=None) as bar:
        hashes = passport.hash_files([folder / name for name in names], bar.update)
    for name, value in zip(names, hashes, strict=True):
        if value != {**wanted, **beside}[name]:
            told += [f"{name} differs", *tensors(folder / name, held)]
    return told + [f"{name} was added" for name in added(folder, wanted)] + foreign(folder, wanted)


def foreign(folder: Path, wanted: dict[str, str]) -> list[str]:
    """Weight files that are none of the model's, though its passport knows them."""
    if not (folder / "config.json").is_file():  # a tokenizer's folder
        return []
    try:
        names = stored.foreign_files(folder)
    except UserError as error:
        return [error.happened]
    return [f"{name} holds other weights than the model's" for name in names if name in wanted]


def added(folder: Path, wanted: dict[str, str]) -> list[str]:
    """Files that a loader would read and the passport doesn't know."""
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.is_file()
        and path.suffix in LOADED
        and path.name not in {*wanted, *BESIDE, passport.NAME}
    )


def tensors(path: Path, held: dict[str, Any]) -> list[str]:
    """Which tensors of a changed file differ, where the passport knows them one by one."""
    known: dict[str, str] = held.get("tensors", {})
    if path.suffix != ".safetensors" or not known:
        return []
    from alpaca.golden import tensor_hashes

    try:
        now = tensor_hashes(path)
    except Exception as error:  # whatever a damaged header makes the library say
        return [f"  {path.name} can't be read any more: {error}"]
    return [f"  tensor {name} differs" for name in now if known.get(name) != now[name]]


def golden_logits(folder: Path, held: dict[str, Any]) -> list[str]:
    """What the model answers differently from when it was written, and which tensors are why."""
    from alpaca import golden  # imports torch, which hashing need not wait for

    weights = golden.Float64Weights(folder)
    try:
        found = golden.differences(held["golden"], golden.answers(folder, weights))
    except (KeyError, ValueError, RuntimeError, IndexError) as error:  # weights of another model
        found = [f"golden prompts can't be answered: {error}"]
    if found:
        found += [f"  tensor {name} is missing" for name in held.get("tensors", {})
                  if name not in weights]  # fmt: skip
        for path in stored.weight_files(folder):
            found += tensors(path, held)
    return found


def add_golden(folder: Path, held: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Compute golden logits, however long it takes, and write them into the passport."""
    from alpaca import atomic, golden

    if not (folder / "config.json").is_file():
        raise UserError(f"No golden logits can be added: {folder} holds no model.")
    weights = golden.Float64Weights(folder)
    reason = golden.unsupported(weights.config)
    if reason is not None:
        raise UserError(f"No golden logits can be added: {reason}.")
    held["golden"] = golden.answers(folder, weights)
    held[passport.SEAL] = passport.seal(held)
    atomic.write_text(folder / passport.NAME, passport.render(held))
    return list(held["golden"])


def summary(folder: Path, held: dict[str, Any], *, checked: bool) -> str:
    """What was verified, in a line."""
    size = sum((folder / name).stat().st_size for name in held["files"])
    logits = f", {len(held.get('golden') or [])} golden prompts" if checked else ""
    return (
        f"{folder} is as it was written: {len(held['files'])} files, {size / 1e9:,.2f} GB"
        f"{logits} (made by {held['made_by']})"
    )
