"""The data commands without the libraries: help all the same, and what to install."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SEEDS = "data/seed_tasks.jsonl"
COMMANDS = {
    "generate": ["--teacher", "http://127.0.0.1:9", "--model", "m", "--num_instructions", "1"],
    "audit": [SEEDS],
    "diversity": [SEEDS, "-o", "plot.svg"],
}


def without(library: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process in which `library` cannot be imported."""
    program = f"import sys; sys.modules[{library!r}] = None; from alpaca.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, *command], cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("verb", "library"),
    [("generate", "openai"), ("generate", "rapidfuzz"), ("audit", "ftfy"), ("audit", "py3langid"),
     ("diversity", "spacy"), ("diversity", "rapidfuzz")],
)  # fmt: skip
def test_a_missing_library_is_named_with_its_remedy(
    verb: str, library: str, tmp_path: Path
) -> None:
    output = ["--output", str(tmp_path / "x.svg")] if verb != "audit" else []
    done = without(library, verb, *COMMANDS[verb], *output)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "pip install -e '.[data]'" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", COMMANDS)
def test_help_needs_no_library(verb: str) -> None:
    for library in ("openai", "rapidfuzz", "spacy", "torch"):
        done = without(library, verb, "--help")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"usage: python -m alpaca {verb}")
        assert done.stdout.count("\n") < 80


def test_a_seed_task_without_an_answer_is_refused(tmp_path: Path) -> None:
    seeds = tmp_path / "seeds.jsonl"
    seeds.write_text('{"instruction": "Count.", "output": ""}\n')
    flags = [
        *COMMANDS["generate"],
        "--seed_tasks",
        str(seeds),
        "--output",
        str(tmp_path / "x.json"),
    ]
    done = without("torch", "generate", *flags)
    assert done.returncode == 2
    assert f"{seeds}: seed task 0 has an empty output." in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [seeds.name]
