"""Files stay in their folder: links and names that lead out of it are refused.

A downloaded folder is someone else's: a link in it could make the conversion read, and publish as
weights, any file of this machine.
"""

from pathlib import Path

from alpaca.errors import UserError


def inside(folder: Path, name: str) -> Path:
    """`folder`/`name`, if that is a place below the folder when all links are followed.

    Raises:
        UserError: it leads elsewhere.
    """
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"{path} leads out of {folder}.",
            "Put the file itself there (cp -L follows links), or name its own folder "
            "with --input_dir.",
        )
    return path


def check_links(root: Path, folder: Path) -> None:
    """Raise UserError when `folder`, or an entry of it, leads out of `root`."""
    inside(root, str(folder.relative_to(root)))
    for path in folder.iterdir():
        inside(root, str(path.relative_to(root)))
