"""Packing changes the speed and nothing else: the same model as the padded recipe, step by step."""

import json
from pathlib import Path

import pytest
from training_runs import ROOT, distance, lines, losses, train

from alpaca.folder import load_tokenizer
from alpaca.tokens import Codec

STEPS, LENGTH = 20, 512


def edge_cases(codec: Codec) -> list[dict[str, str]]:
    """Examples cut at exactly 512 tokens, and one with a single target token."""
    made = [{"instruction": "Count.", "input": "from one", "output": "one more " * 600}]
    words = 1
    while len(codec.prompt("a " * words, "")) < LENGTH - 1:
        words += 1
    assert len(codec.prompt("a " * words, "")) == LENGTH - 1
    return [*made, {"instruction": "a " * words, "output": "b c d"}]


@pytest.fixture(scope="module")
def data(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The seed tasks (both templates) with the edge cases sprinkled in, 64 examples."""
    seeds = [json.loads(line) for line in (ROOT / "data/seed_tasks.jsonl").read_text().splitlines()]
    kept = [
        {key: seed.get(key, "") for key in ("instruction", "input", "output")} for seed in seeds
    ]
    path = tmp_path_factory.mktemp("data") / "mixed.json"
    path.write_text(json.dumps([*kept[:62], *edge_cases(Codec(load_tokenizer(tiny_model)))]))
    return path


def run(tiny_model: Path, data: Path, out: Path, batch: int, accumulation: int, ranks: int) -> Path:
    flags = {
        "model_name_or_path": tiny_model,
        "data_path": data,
        "output_dir": out,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "max_steps": STEPS,
        "keep_last_checkpoint": True,
        "learning_rate": 1e-3,
        "warmup_ratio": 0.1,
        "packing": out.name != "padded",
    }
    done = train(*(f"--{name}={value}" for name, value in flags.items()), ranks=ranks)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def padded(tiny_model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tiny_model, data, tmp_path_factory.mktemp("padded") / "padded", 4, 4, 0)


@pytest.mark.parametrize(
    ("batch", "accumulation", "ranks"),
    [
        (4, 2, 2),
        pytest.param(4, 4, 0, marks=pytest.mark.slow),
        pytest.param(8, 2, 1, marks=pytest.mark.slow),
        pytest.param(2, 2, 4, marks=pytest.mark.slow),
    ],
)
def test_twenty_steps_end_at_the_parameters_of_the_padded_recipe(
    tiny_model: Path,
    data: Path,
    padded: Path,
    tmp_path: Path,
    batch: int,
    accumulation: int,
    ranks: int,
) -> None:
    out = run(tiny_model, data, tmp_path / "packed", batch, accumulation, ranks)
    assert losses(out) == pytest.approx(losses(padded), rel=1e-5)
    assert lines(out)[0]["grad_norm"] == pytest.approx(lines(padded)[0]["grad_norm"], rel=1e-6)
    assert distance(out, padded, tmp_path) < 1e-5
