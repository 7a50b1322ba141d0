"""On each shape of model and on one and two ranks, killed in between: what is kept is what answers.

An adapter that was trained, killed and resumed is merged. The proof in its passport is computed
again here by peft and transformers in float64.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import FAMILIES, allowed_warnings, make_base
from peft import PeftModel
from safetensors.torch import load_file
from training_runs import ROOT, finish, losses, start, wait_until
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from alpaca import golden
from alpaca.folder import load_tokenizer
from alpaca.recipe.arguments import Arguments
from alpaca.tokens import Codec

pytestmark = pytest.mark.slow
NEW = 16
RUN = {"max_steps": 6, "save_steps": 2, "learning_rate": 5e-3, "lora_rank": 6, "merge": True,
       "per_device_train_batch_size": 2, "keep_last_checkpoint": True}  # fmt: skip
SHAPES = [*FAMILIES, "SmolLM2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve seed tasks."""
    seeds = (ROOT / "data/seed_tasks.jsonl").read_text().splitlines()[:12]
    path = tmp_path_factory.mktemp("data") / "twelve.json"
    path.write_text(json.dumps([json.loads(line) for line in seeds]))
    return path


def command(base: Path, data: Path, out: Path, ranks: int, **more: Any) -> list[str]:
    flags = {"model_name_or_path": base, "data_path": data, "output_dir": out, **RUN, **more}
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"]
    return [*launcher, "train.py", *(f"--{name}={value}" for name, value in flags.items())]


def killed(words: list[str], out: Path) -> None:
    """Begin a run, and kill all of its processes once it has a checkpoint."""
    job = start(words)
    wait_until(lambda: (out / "checkpoint-2").is_dir(), job)
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate()


@torch.no_grad()
def logits(model: torch.nn.Module, prompts: list[list[int]]) -> list[torch.Tensor]:
    return [model(torch.tensor([one])).logits[0, -1] for one in prompts]


@torch.no_grad()
def greedy(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    return [
        model.generate(
            input_ids=torch.tensor([one]), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
        )[0].tolist()
        for one in prompts
    ]


def loaded(folder: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def largest(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_was_trained_is_what_answers_wherever_it_is_merged(
    shape: str,
    ranks: int,
    bpe: PreTrainedTokenizerBase,
    data: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    if shape == "SmolLM2":
        base = request.getfixturevalue("smollm")
    else:
        base = make_base(tmp_path / "base", bpe, shape)
    whole, out = tmp_path / "whole", tmp_path / "out"
    finish(command(base, data, whole, ranks))
    killed(command(base, data, out, ranks), out)
    finish(command(base, data, out, ranks))
    assert losses(out) == losses(whole)
    ours, theirs = (load_file(one / "adapter_model.safetensors") for one in (out, whole))
    assert all(ours[name].equal(theirs[name]) for name in theirs)

    merged = out.with_name(f"{out.name}-merged")
    exact = tmp_path / "exact"
    python = [sys.executable, "-m", "alpaca"]
    finish([*python, "merge", str(out), "-o", str(exact), "--dtype", "fp32"])
    finish([*python, "verify", str(out)])
    for folder in (merged, exact):
        finish([*python, "verify", str(folder), "--adapter", str(out)])

    ids = [list(one) for one in golden.prompt_ids(base)]
    with allowed_warnings():
        tuned = PeftModel.from_pretrained(loaded(base, torch.float64), out)
        tuned = tuned.to(torch.float64)
        answers = logits(tuned, ids)
    told = json.loads((merged / "passport.json").read_text())["proof"]
    kind = Arguments().export_dtype
    found = {
        "fp32": largest(answers, logits(loaded(exact, torch.float64), ids)),
        kind: largest(answers, logits(loaded(merged, torch.float64), ids)),
    }
    for name, value in found.items():
        assert value == pytest.approx(told[name], rel=1e-3, abs=1e-5), name
    assert largest(answers, logits(loaded(base, torch.float64), ids)) > 100 * found["fp32"]
    print(f"{shape}, {ranks} rank(s): {found}")

    codec = Codec(load_tokenizer(base))
    prompts = [codec.prompt(*one) for one in golden.PROMPTS]
    assert greedy(loaded(exact, torch.float32), prompts) == greedy(tuned.float(), prompts)
