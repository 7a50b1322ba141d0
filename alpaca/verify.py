"""`python -m alpaca verify FOLDER`: does every file and every weight match the passport?

Hashes find accidental changes. Golden logits find a changed weight even if its hash was rewritten.
An adapter's logits are those of base + adapter; with them, the proof of its merges is repeated. All
differences are reported, not only the first.
"""

import argparse
from pathlib import Path
from typing import Any

from tqdm import tqdm

from alpaca import passport, stored
from alpaca.errors import UserError

# Files written into a folder after its passport. A checkpoint has its own checks.
WRITTEN_LATER = {"log.jsonl", "log.previous.jsonl", "loss.png", "loss.svg", "demo.json"}
# Loaders look for files with these suffixes, so an added one may change what is loaded.
RUN = {
    ".safetensors", ".bin", ".model", ".jinja", ".py", ".so", ".gguf", ".pth", ".pt", ".pkl",
    ".pickle", ".ckpt", ".h5", ".msgpack", ".onnx",
}  # fmt: skip
LOADED = {*RUN, ".json", ".txt"}
READ_BY_PEOPLE = ("license", "notice", "use_policy", "readme")


def parser() -> argparse.ArgumentParser:
    """Flags of the verb."""
    made = argparse.ArgumentParser(
        description="Compare a model folder with its passport: every file's hash, and its "
        "logits for three golden prompts.",
        epilog="Exit code 0: all as written. 2: something differs; the output names it.",
    )
    made.add_argument("folder", type=Path, help="a model, adapter or tokenizer folder")
    made.add_argument("--no-golden", action="store_true", help="hashes only")
    made.add_argument(
        "--base",
        type=Path,
        help="an adapter's base model (default: the folder that the adapter names)",
    )
    made.add_argument(
        "--adapter",
        type=Path,
        help="of a merged folder: repeat the comparison with base + adapter, too",
    )
    made.add_argument(
        "--add-golden",
        action="store_true",
        help="compute golden logits for a folder that has none, if its hashes match",
    )
    made.add_argument(
        "--accept",
        nargs="+",
        default=[],
        metavar="FILE",
        help="record files that you added on purpose, by their path in the folder",
    )
    return made


def run(arguments: argparse.Namespace) -> None:
    """Verify a folder and print a summary.

    Raises:
        UserError: something differs; the message names each file, tensor and prompt that does.
    """
    folder: Path = arguments.folder
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.")
    recorded = passport.read(folder)
    if recorded is None:
        raise UserError(
            f"{folder} has no passport: it was made by another program, or before "
            "passports existed.",
            "Only folders written by convert, train.py and merge can be verified.",
        )
    if arguments.accept:
        accept(folder, recorded, arguments.accept)
    check_flags(arguments, recorded)
    problems = sealed(folder, recorded) + files(folder, recorded)
    golden = recorded.get("golden")
    unchecked = None if golden else "the passport holds none"
    if arguments.no_golden:
        unchecked = "--no-golden"
    if not problems and (unchecked is None or arguments.base):
        count = len(recorded["files"])
        print(f"{folder}: {count} files have the passport's hashes; computing logits", flush=True)
        problems = logits(arguments, recorded)
    if problems:
        raise UserError(
            f"{folder} does not match its passport:\n    " + "\n    ".join(problems),
            "Copy, convert or train the folder again; it cannot be fixed in place.",
        )
    if not golden and arguments.add_golden:
        add_golden(folder, recorded, arguments.base)
        unchecked = None
    print(summary(folder, recorded, unchecked=unchecked))


def check_flags(arguments: argparse.Namespace, recorded: dict[str, Any]) -> None:
    """Refuse --base and --adapter where they would not be used."""
    folder: Path = arguments.folder
    if arguments.no_golden and (arguments.base or arguments.adapter):
        raise UserError("--base and --adapter are for comparing logits, --no-golden omits it.")
    if arguments.adapter and not (recorded.get("adapter") and recorded.get("proof")):
        raise UserError(
            f"{folder} was not merged from an adapter with a comparison of its logits.",
            "Leave --adapter out.",
        )
    if arguments.base and not (stored.is_adapter(folder) or arguments.adapter):
        raise UserError(f"{folder} is not an adapter.", "Leave --base out.")


def logits(arguments: argparse.Namespace, recorded: dict[str, Any]) -> list[str]:
    """Problems of the logits, and of the comparison of a merge where it can be repeated."""
    folder: Path = arguments.folder
    if not stored.is_adapter(folder) and not arguments.adapter:
        return golden_logits(folder, recorded)
    from alpaca import adapter as adapters
    from alpaca import proof  # imports torch, which is slow and not needed for hashing

    adapter = adapters.Adapter(arguments.adapter or folder)
    base = arguments.base or passport.find_base(adapter.folder)
    adapter.check_base(base, hashes=adapters.hashed(base))
    if arguments.adapter:
        problems, found = proof.repeat_merge(folder, recorded, base, adapter)
        problems = golden_logits(folder, recorded) + problems
    else:
        problems, found = proof.repeat(recorded, base, adapter)
    if found is not None:
        print("\n".join(found.lines()), flush=True)
    return problems


def accept(folder: Path, recorded: dict[str, Any], names: list[str]) -> None:
    """Add the owner's files to the passport.

    Raises:
        UserError: one is missing, or is a file of the model as it was written.
    """
    names = [Path(name).as_posix() for name in names]
    for name in names:
        if name in {passport.NAME, *WRITTEN_LATER}:
            raise UserError(f"{name} is written by this program.", "Accept your own files.")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{name} is not a file of the folder.", "Give its path in the folder.")
        if not (folder / name).is_file():
            raise UserError(f"There is no file {folder / name}.", "Give its path in the folder.")
        if name in recorded["files"]:
            raise UserError(
                f"{name} is part of the model that {recorded['made_by']} wrote.",
                "A changed model is another one: convert or train the folder again.",
            )
    if problems := sealed(folder, recorded):
        raise UserError(f"{folder}: {problems[0]}.", "Nothing can be accepted there.")
    passport.add_extras(folder, names, kind="accepted")
    recorded.update(passport.read(folder) or {})


def sealed(folder: Path, recorded: dict[str, Any]) -> list[str]:
    """Problems of the passport itself."""
    text = (folder / passport.NAME).read_text(encoding="utf-8")
    if recorded[passport.SEAL] == passport.seal(recorded) and text == passport.render(recorded):
        return []
    return [f"{passport.NAME} was changed after it was written"]


def files(folder: Path, recorded: dict[str, Any]) -> list[str]:
    """Problems of the files: one line for each that is missing, changed or unexpected."""
    wanted: dict[str, str] = recorded["files"]
    extra = {
        name: value
        for kind in passport.EXTRAS
        for name, value in recorded.get(kind, {}).items()
        if (folder / name).is_file()
    }
    present = [name for name in wanted if (folder / name).is_file()]
    problems = [f"{name} is missing" for name in wanted if name not in present]
    names = [*present, *extra]
    # The largest first: the last thread to finish should have started early.
    names.sort(key=lambda name: -(folder / name).stat().st_size)
    total = sum((folder / name).stat().st_size for name in names)
    with tqdm(total=total, unit="B", unit_scale=True, desc="hashing", disable=None) as bar:
        hashes = passport.hash_files([folder / name for name in names], bar.update)
    for name, value in zip(names, hashes, strict=True):
        if value != {**wanted, **extra}[name]:
            problems += [f"{name} differs", *tensors(folder / name, recorded)]
    problems += [f"{name} was added" for name in added(folder, {**wanted, **extra})]
    return problems + foreign(folder, wanted)


def foreign(folder: Path, wanted: dict[str, str]) -> list[str]:
    """Weight files that are listed in the passport but do not belong to the model."""
    if not (folder / "config.json").is_file():  # a tokenizer folder
        return []
    try:
        names = stored.foreign_files(folder)
    except UserError as error:
        return [error.happened]
    return [f"{name} holds other weights than the model's" for name in names if name in wanted]


def added(folder: Path, wanted: dict[str, str]) -> list[str]:
    """Files that a loader would read and the passport does not list, also below subfolders.

    A subfolder is read where another file names it, so only weights, code and templates count
    there. Checkpoints have their own hashes.
    """
    known = {*wanted, *WRITTEN_LATER, passport.NAME}
    found = []
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        top = name.parts[0]
        if len(name.parts) > 1 and top.startswith((".", "checkpoint-")):
            continue
        loaded = LOADED if len(name.parts) == 1 else RUN
        if path.name.lower().startswith(READ_BY_PEOPLE) and path.suffix == ".txt":
            continue
        if path.is_file() and path.suffix in loaded and name.as_posix() not in known:
            found.append(name.as_posix())
    return sorted(found)


def tensors(path: Path, recorded: dict[str, Any]) -> list[str]:
    """Which tensors of a changed file differ, if the passport has a hash of each tensor."""
    known: dict[str, str] = recorded.get("tensors", {})
    if path.suffix != ".safetensors" or not known:
        return []
    from alpaca.golden import tensor_hashes

    try:
        now = tensor_hashes(path)
    except Exception as error:  # a damaged header can raise anything
        return [f"  {path.name} can't be read any more: {error}"]
    return [f"  tensor {name} differs" for name in now if known.get(name) != now[name]]


def golden_logits(folder: Path, recorded: dict[str, Any]) -> list[str]:
    """Prompts whose logits differ from the passport's, and the tensors that differ."""
    from alpaca import golden  # imports torch, which is slow and not needed for hashing

    weights = golden.Float64Weights(folder)
    try:
        problems = golden.differences(recorded["golden"], golden.answers(folder, weights))
    except (KeyError, ValueError, RuntimeError, IndexError) as error:  # of another model
        problems = [f"golden prompts can't be answered: {error}"]
    if problems:
        problems += [
            f"  tensor {name} is missing"
            for name in recorded.get("tensors", {})
            if name not in weights
        ]
        for path in stored.weight_files(folder):
            problems += tensors(path, recorded)
    return problems


def add_golden(folder: Path, recorded: dict[str, Any], base: Path | None) -> None:
    """Compute golden logits, without a time limit, and write them into the passport.

    An adapter's are those of base + adapter; the proof of its merges is added with them.
    """
    from alpaca import adapter as adapters
    from alpaca import atomic, golden, merging, proof

    if stored.is_adapter(folder):
        adapter = adapters.Adapter(folder)
        own = base or passport.find_base(folder)
        adapter.check_base(own)
        trained = merging.as_trained(adapter.quantized)
        weights: golden.Float64Weights = proof.AdaptedWeights(own, adapter, trained)
    elif (folder / "config.json").is_file():
        weights = golden.Float64Weights(folder)
    else:
        raise UserError(f"No golden logits can be added: {folder} holds no model.")
    reason = golden.unsupported(weights.config)
    if reason is not None:
        raise UserError(f"No golden logits can be added: {reason}.")
    if isinstance(weights, proof.AdaptedWeights):
        recorded |= proof.facts(weights)
    else:
        recorded["golden"] = golden.answers(folder, weights)
    recorded[passport.SEAL] = passport.seal(recorded)
    atomic.write_text(folder / passport.NAME, passport.render(recorded))


def summary(folder: Path, recorded: dict[str, Any], *, unchecked: str | None) -> str:
    """One line that says what was verified, and why the logits were not, if so."""
    size = sum((folder / name).stat().st_size for name in recorded["files"])
    prompts = f"{len(recorded.get('golden') or [])} golden prompts"
    logits = f"logits NOT checked ({unchecked})" if unchecked else prompts
    return (
        f"{folder} is intact: {len(recorded['files'])} files, {size / 1e9:,.2f} GB, {logits} "
        f"(made by {recorded['made_by']})"
    )
