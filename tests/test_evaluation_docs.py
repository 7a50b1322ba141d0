"""README.md's evaluation, line by line: two models answer, people and a judge compare them."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from http_server import ROOT
from pages import serving_page
from scripted_endpoint import Said, scripted_endpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from alpaca.evaluation import annotations, statistics

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
[BLOCK] = re.findall(r"## Is it better\?\n\n```sh\n(.*?)```", README, flags=re.DOTALL)
LINES = BLOCK.splitlines()
SMALL = {"answer": ["--limit", "24", "--max_new_tokens", "16"]}


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a person would type the lines: a base model and one trained from it."""
    made = tmp_path_factory.mktemp("readme")
    for name, seed in (("weights/llama-7b", 1), ("alpaca_out", 2)):
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
        model.save_pretrained(made / name)
        AutoTokenizer.from_pretrained(tiny_model).save_pretrained(made / name)
    return made


@pytest.fixture(scope="module")
def judge() -> Iterator[str]:
    """One that always prefers the second answer."""
    with scripted_endpoint(lambda body: Said("2")) as running:
        yield running.url


def test_the_readme_shows_the_whole_path_in_few_lines() -> None:
    assert [line.split()[3] for line in LINES] == ["answer", "answer", "score", "compare", "judge"]
    section = README.partition("## Is it better?")[2].partition("\n## ")[0]
    assert section.strip().count("\n") + 1 <= 15
    [picture] = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", section)
    assert (ROOT / picture).is_file()


def test_each_line_runs(folder: Path, judge: str, browser: Any) -> None:
    told: dict[str, str] = {}
    for line in LINES:
        words = shlex.split(line.replace("http://127.0.0.1:9000/v1", judge))
        assert words[:3] == ["python", "-m", "alpaca"]
        command = [sys.executable, *words[1:], *SMALL.get(words[3], [])]
        run = voted if words[3] == "compare" else finished
        told[words[3]] = run(command, folder, browser)
    scores = (folder / "scores.html").read_text(encoding="utf-8")
    assert "llama-7b" in scores
    assert "alpaca_out" in scores
    assert "loss of the references" in told["score"]
    votes = annotations.read(folder / "base-vs-tuned.votes.json")
    assert {vote.annotator for vote in votes} == {"ada"}
    assert len(votes) == 20
    judged = annotations.read(folder / "judged.json")
    assert len(judged) == 24
    # who always prefers the second answer prefers none
    assert statistics.win_rate([one.preference for one in judged]).rate == 50


def finished(command: list[str], folder: Path, browser: Any) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def voted(command: list[str], folder: Path, browser: Any) -> str:
    """Votes for the left answer until the page has no more pairs."""
    with serving_page([*command, "--no-browser"], folder) as (process, url, said):
        page = browser.new_page()
        page.goto(url)
        for _ in range(200):
            if process.poll() is not None or not page.locator("#left").is_visible():
                break
            page.keyboard.press("1")
            page.wait_for_timeout(50)
        page.close()
        rest, _ = process.communicate(timeout=30)
    assert process.returncode == 0, rest
    return said + rest


def test_the_power_table_is_computed() -> None:
    rows = {p.pairs: p for p in statistics.power_table()}
    table = [
        line.split("|")[1:-1]
        for line in PAGE.splitlines()
        if line.startswith(("| pairs", "| win rate that", "| half the"))
    ]
    pairs, found, half = ([cell.strip() for cell in row[1:]] for row in table)
    assert len(pairs) == 9
    for count, rate, width in zip(pairs, found, half, strict=True):
        power = rows[int(count.replace(",", ""))]
        assert (rate, width) == (f"{power.detectable:.1f}", f"{power.half_width:.1f}")
