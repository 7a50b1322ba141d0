"""The plans in the documents are what the command prints."""

import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "    $ python -m alpaca plan "


def shown(document: str) -> list[tuple[str, str]]:
    """Each command and the output below it."""
    found = []
    lines = (ROOT / document).read_text(encoding="utf-8").splitlines()
    for at, line in enumerate(lines):
        if not line.startswith(PROMPT):
            continue
        command, rest = line, lines[at + 1 :]
        while command.endswith("\\"):
            command, rest = command[:-1] + rest[0].strip(), rest[1:]
        output = []
        for below in rest:
            if not below.startswith("    "):
                break
            output.append(below.removeprefix("    "))
        found.append((command.removeprefix(PROMPT), "\n".join(output)))
    return found


def test_the_documents_show_what_plan_prints() -> None:
    plans = shown("README.md") + shown("docs/plan.md")
    assert len(plans) == 2
    for flags, output in plans:
        assert "It fits." in output
        done = subprocess.run(
            [sys.executable, "-m", "alpaca", "plan", *shlex.split(flags)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == output.strip()
