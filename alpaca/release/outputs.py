"""Where an export or a diff may be written: never over what it is made from."""

from pathlib import Path

from alpaca import passport
from alpaca.errors import UserError


def check(output: Path, inputs: list[Path], *, force: bool, folder: bool) -> None:
    """Refuse an output that would replace an input, or something of another kind.

    `folder`: whether a folder will be written. `force`: what is there may be replaced.

    Raises:
        UserError: the output is an input, holds one or is in one, is there already, or is of
            another kind.
    """
    for one in inputs:
        if one.resolve().is_relative_to(output.resolve()):
            raise UserError(
                f"{output} would replace {one}, which is to be read.", "Name another --output."
            )
        if (one / passport.NAME).is_file() and output.resolve().is_relative_to(one.resolve()):
            raise UserError(
                f"{output} would be in {one}, whose passport lists all that is in it.",
                "Name another --output.",
            )
    if not output.exists():
        return
    if output.is_dir() != folder:
        kind = "folder" if output.is_dir() else "file"
        raise UserError(f"{output} is a {kind} that is already there.", "Name another --output.")
    if not force:
        raise UserError(f"{output} is already there.", "--force replaces it.")
