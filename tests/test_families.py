"""Published families train and serve as transformers computes them, or are refused by all alike."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
FEW = ("LLaMA 1", "Yi Chat", "Mistral v0.1", "Baichuan 2")  # pickles, ends, a window, a refusal


def walk(*names: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "bench/families.py", *names],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_few_families_compute_as_transformers_or_are_refused_by_all() -> None:
    found = walk(*FEW)
    assert found["families"] == len(FEW)
    assert found["faults"] == {}
    assert [name for name, reason in found["refused"].items() if reason] == ["Baichuan 2"]
    assert "brings its own code" in found["refused"]["Baichuan 2"]


@pytest.mark.slow
def test_every_family_of_the_page_is_as_the_page_says() -> None:
    found = walk()
    assert found["families"] > 40
    assert found["faults"] == {}
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == found["families"]
    for row in rows:
        name, _, _, verdict = (cell.strip() for cell in row.strip("|").split(" | "))
        reason = found["refused"][name]
        assert verdict == f"refused: {reason}" if reason else verdict.startswith("trains"), row
