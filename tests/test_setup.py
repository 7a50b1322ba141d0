"""script/setup: what goes wrong is said, and does not stand in the way of the next try.

The interpreter is a stand-in that makes the environments real ones would leave; pip's is real
nowhere here, since installing takes minutes.
"""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
READ = ("requirements.txt", "pyproject.toml", "tests/requirements.txt", "tests/apart.txt")
# What Debian's python3 without python3-venv leaves behind: an interpreter, no pip.
HALF = 'mkdir -p .venv/bin; printf "#!/bin/sh\\nexit 1" > .venv/bin/python; code=1'
WHOLE = 'mkdir -p .venv/bin; printf "#!/bin/sh\\nexit 0" > .venv/bin/python; code=0'


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in (*READ, "script/setup"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def setup(tree: Path, leaves: str) -> subprocess.CompletedProcess[str]:
    """Run it with an interpreter whose `-m venv` does what `leaves` says."""
    python = tree / "python3.11"
    python.write_text(f"#!/bin/sh\n{leaves}; chmod +x .venv/bin/python; exit $code\n")
    python.chmod(0o755)
    return subprocess.run(
        [tree / "script/setup"],
        env={**os.environ, "PYTHON": str(python)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_environment_that_was_half_made_is_made_again(tree: Path) -> None:
    first = setup(tree, HALF)
    assert first.returncode == 2
    assert "apt-get install python3.11-venv" in first.stderr
    second = setup(tree, WHOLE)
    assert second.returncode == 0, second.stderr
    assert (tree / ".venv/installed-demo").is_file()
    third = setup(tree, HALF)  # nothing is left to do
    assert (third.returncode, third.stdout) == (0, "")


def test_pins_that_stand_in_two_places_agree() -> None:
    requirements = (ROOT / "requirements.txt").read_text()
    cog = yaml.safe_load((ROOT / "cog.yaml").read_text())["build"]["sdk_version"]
    assert re.findall(r"^cog==(\S+)$", requirements, flags=re.MULTILINE) == [cog]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (optim,) = extras["optional-dependencies"]["optim"]
    assert (ROOT / "tests/apart.txt").read_text().split() == [optim]
    assert "torchao==" not in (ROOT / "docs/training.md").read_text()  # it names the extra
