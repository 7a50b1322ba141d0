"""Refuse links and file names that lead out of a model folder.

A downloaded folder is not trusted. A link in it could make the conversion read any file of this
machine and publish it as weights.
"""

from pathlib import Path

from alpaca.errors import UserError


def inside(folder: Path, name: str) -> Path:
    """Return `folder`/`name` if it is below the folder after all links are followed.

    Raises:
        UserError: it is outside the folder.
    """
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"{path} points outside {folder}.",
            "Put the file itself there (cp -L follows links), or give its real folder "
            "with --input_dir.",
        )
    return path


def check_links(root: Path, folder: Path) -> None:
    """Raise UserError if `folder`, or an entry of it, links out of `root`."""
    inside(root, str(folder.relative_to(root)))
    for path in folder.iterdir():
        inside(root, str(path.relative_to(root)))
