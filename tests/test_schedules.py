"""Learning rates equal transformers' own, step by step, for every shape and its settings."""

import json
from typing import Any

import pytest
import torch
from training_runs import lines, train
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType

from alpaca.errors import UserError
from alpaca.recipe.arguments import Arguments, parse
from alpaca.recipe.schedules import SHAPES
from alpaca.recipe.steps import schedule
from alpaca.training import optimizer

FOLLOW_THE_LOSS = {"reduce_lr_on_plateau", "greedy"}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("cosine", {}), ("cosine", {"num_cycles": 1.5}), ("linear", {}), ("constant", {}),
    ("constant_with_warmup", {}), ("polynomial", {}),
    ("polynomial", {"power": 2.0, "lr_end": 1e-5}), ("cosine_with_min_lr", {"min_lr": 1e-5}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1, "num_cycles": 1.5}),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1}),
    ("cosine_warmup_with_min_lr", {"min_lr": 1e-5, "warmup_lr_rate": 0.2}),
    ("cosine_with_restarts", {}), ("cosine_with_restarts", {"num_cycles": 3}),
    ("inverse_sqrt", {}), ("inverse_sqrt", {"timescale": 40}),
    ("warmup_stable_decay", {"num_decay_steps": 11}),
    ("warmup_stable_decay", {"num_decay_steps": 9, "decay_type": "1-sqrt", "min_lr_ratio": 0.1,
                             "warmup_type": "cosine"}),
    ("warmup_stable_decay", {"num_decay_steps": 9, "decay_type": "linear",
                             "warmup_type": "1-sqrt"}),
    ("warmup_stable_decay", {"num_decay_steps": 9, "num_stable_steps": 5, "num_cycles": 1.0}),
]  # fmt: skip


def flags(shape: str, settings: dict[str, Any], *more: str) -> list[str]:
    return ["--lr_scheduler_type", shape, "--lr_scheduler_kwargs", json.dumps(settings), *more]


def test_every_shape_of_transformers_that_depends_on_the_step_alone_is_there() -> None:
    assert {*SHAPES} == {item.value for item in SchedulerType} - FOLLOW_THE_LOSS
    assert {shape for shape, _ in CASES} == {*SHAPES}


@pytest.mark.filterwarnings("ignore:Both num_training_steps")
@pytest.mark.parametrize("warmup", ["0", "7", "0.2"])
@pytest.mark.parametrize(("shape", "settings"), CASES, ids=str)
def test_every_rate_equals_that_of_transformers(
    shape: str, settings: dict[str, Any], warmup: str
) -> None:
    more = ["--learning_rate", "3e-4", "--max_steps", "60", "--warmup_ratio", "0"]
    arguments, _ = parse(flags(shape, settings, *more, "--warmup_steps", warmup))
    made = schedule(arguments, 1000, world_size=1)
    steps = {"0": 0, "7": 7, "0.2": 12}[warmup]
    assert made.warmup == (0 if shape == "constant" else steps)
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    theirs = get_scheduler(shape, sgd, steps, 60, settings)
    rates = []
    for step in range(60):
        rates.append(made.learning_rate(step))
        assert rates[-1] == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-18)
        sgd.step()
        theirs.step()
    assert max(rates) <= 3e-4 * (1 + 1e-12)
    assert len({*rates}) > 1 or shape.startswith("constant")


@pytest.mark.parametrize(
    ("shape", "settings", "expected"),
    [
        ("warmup_stable_decay", "", "needs num_decay_steps.\n  For example: --lr_scheduler_kwargs"),
        ("cosine_with_min_lr", "", "needs one of min_lr and min_lr_rate"),
        ("cosine_with_min_lr", '{"min_lr": 1e-6, "min_lr_rate": 0.1}', "needs one of min_lr"),
        ("cosine", '{"min_lr": 1e-6}', "cosine has no setting min_lr.\n  It takes: num_cycles."),
        ("constant", '{"power": 1}', "It takes: none."),
        ("polynomial", '{"power": "two"}', "power is 'two'.\n  Give a number of at least 0."),
        ("polynomial", '{"lr_end": 0.1}', "needs a --learning_rate above 0.1"),
        ("warmup_stable_decay", '{"num_decay_steps": 5, "decay_type": "log"}', "one of linear"),
        ("cosine", "{num_cycles: 1}", "is not JSON"),
        ("cosine", "[1]", "is not a JSON object"),
    ],
)
def test_settings_that_a_shape_cannot_take_are_refused(
    shape: str, settings: str, expected: str
) -> None:
    with pytest.raises(UserError) as caught:
        parse(["--lr_scheduler_type", shape, "--lr_scheduler_kwargs", settings])
    assert expected in str(caught.value)


def test_a_warm_up_that_constant_does_not_have_is_said() -> None:
    _, notices = parse(["--lr_scheduler_type", "constant", "--warmup_ratio=0.03"])
    [notice] = notices
    assert "--warmup_ratio has no effect" in notice
    assert "constant_with_warmup" in notice
    assert not parse(["--lr_scheduler_type", "constant"])[1]


def test_the_optimizer_has_the_betas_and_the_epsilon_that_were_asked_for() -> None:
    words = ["--adam_beta1", "0.8", "--adam_beta2", "0.95", "--adam_epsilon", "1e-6"]
    made = optimizer.build(torch.nn.Linear(2, 2), parse(words)[0])
    assert {(group["betas"], group["eps"]) for group in made.param_groups} == {((0.8, 0.95), 1e-6)}
    usual, module = Arguments(), torch.nn.Linear(2, 2)
    ours, theirs = optimizer.build(module, usual), torch.optim.AdamW(module.parameters())
    assert [ours.defaults[key] for key in ("betas", "eps")] == [(0.9, 0.999), 1e-8]
    assert [theirs.defaults[key] for key in ("betas", "eps")] == [(0.9, 0.999), 1e-8]
    for word in (["--adam_beta1=1"], ["--adam_beta2=-0.1"], ["--adam_epsilon=-1"]):
        with pytest.raises(UserError, match=word[0].partition("=")[0]):
            parse(word)


@pytest.fixture(scope="module")
def usual(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("schedules")
    words = {
        "model_name_or_path": tiny_model,
        "output_dir": out / "usual",
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 0.01,
        "lr_scheduler_type": "polynomial",
        "lr_scheduler_kwargs": '{"power": 2, "lr_end": 0.001}',
        "warmup_ratio": 0,
        "save_strategy": "no",
    }
    flags = [f"--{name}={value}" for name, value in words.items()]
    done = train(*flags)
    assert done.returncode == 0, done.stderr
    return out / "usual", flags


def test_a_run_logs_those_rates_and_its_settings_make_it_another_run(usual: Any) -> None:
    out, flags = usual
    rates = [line["lr"] for line in lines(out) if "lr" in line]
    assert rates == pytest.approx([0.01, 0.0060625, 0.00325, 0.0015625])
    assert "already holds the model of exactly this run" in train(*flags).stdout
    for changed in ("--adam_beta2=0.95", '--lr_scheduler_kwargs={"power": 3}'):
        done = train(*flags, changed)
        assert done.returncode == 2
        assert "already holds another model" in done.stderr
