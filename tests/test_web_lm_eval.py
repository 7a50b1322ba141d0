"""lm-eval's local-completions, a real client that scores prompts: the scores of `--model hf`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_scores_over_v1_are_those_of_transformers(smollm: Path) -> None:
    done = subprocess.run(
        [sys.executable, "bench/lm_eval_doors.py", "--model", str(smollm), "--limit", "12"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    report = json.loads(done.stdout.splitlines()[-1])
    assert set(report) == {"alpaca_choice", "alpaca_answer"}
    assert all(one["equal"] and one["served"] for one in report.values()), report
