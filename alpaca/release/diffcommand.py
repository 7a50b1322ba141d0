"""`python -m alpaca diff make|apply`: publish what training changed, without the base itself."""

import argparse
from pathlib import Path

from alpaca.release import outputs, streams


def parser() -> argparse.ArgumentParser:
    """Flags of the verb."""
    made = argparse.ArgumentParser(
        description="Write the difference of a tuned model folder from its base, or make the tuned "
        "folder from both, bit for bit."
    )
    ways = made.add_subparsers(
        dest="way", required=True, metavar="make|apply", prog="python -m alpaca diff"
    )
    make = ways.add_parser("make", help="TUNED BASE -o DIFF", description="Write a diff.")
    make.add_argument("tuned", type=Path, help="the trained folder")
    make.add_argument("base", type=Path, help="the folder it was trained from")
    make.add_argument("-o", "--output", type=Path, required=True, help="file to write")
    back = ways.add_parser("apply", help="BASE DIFF -o TUNED", description="Apply a diff.")
    back.add_argument("base", type=Path, help="the folder that the diff was made from")
    back.add_argument(
        "diff", type=Path, help="a diff; or the folder of a diff of 2023, whose numbers are added"
    )
    back.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    for one in (make, back):
        one.add_argument("--force", action="store_true", help="replace what is there")
    return made


def run(arguments: argparse.Namespace) -> None:
    """Make or apply a diff, and say what was done."""
    output: Path = arguments.output
    making = arguments.way == "make"
    inputs = [arguments.base, arguments.tuned if making else arguments.diff]
    outputs.check(output, inputs, force=arguments.force, folder=not making)
    streams.keep_freed_memory()
    if making:
        _make(arguments.tuned, arguments.base, output)
    elif arguments.diff.is_dir():
        from alpaca.release import floatdiff

        print("\n".join(floatdiff.apply(arguments.base, arguments.diff, output, force=True)))
        print(f"{output}: the sum of {arguments.base} and {arguments.diff}, in fp32")
    else:
        _apply(arguments.base, arguments.diff, output)


def _make(tuned: Path, base: Path, output: Path) -> None:
    from alpaca import folder, passport
    from alpaca.release import diff

    for one in (tuned, base):
        folder.check_folder(one)
        passport.check_loaded(one)
    made = diff.make(tuned, base, output)
    print(
        f"{made.path}: {made.size / 1e9:.2f} GB, {made.size / made.whole:.0%} of the tuned weights'"
        f"\n  python -m alpaca diff apply {base} {made.path} -o {tuned.name}"
    )


def _apply(base: Path, path: Path, output: Path) -> None:
    from alpaca.release import diff

    index = diff.apply(base, path, output)
    print(f"{output}: {len(index['tensors'])} tensors, each with the SHA-256 of the tuned one")
    print(f"  python -m alpaca verify {output}")
