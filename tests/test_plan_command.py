"""`python -m alpaca plan` as people and programs call it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def plan(*flags: object, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "alpaca", "plan", *map(str, flags)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def test_a_named_model_on_a_named_card_needs_neither() -> None:
    shown = plan(
        "--model_name_or_path",
        "llama-7b",
        "--gpu",
        "a100-40",
        "--gpus",
        8,
        "--examples",
        52002,
        "--bf16",
        "True",
        "--price",
        2,
    )
    assert "6,738,415,616 parameters, on 8 x A100 40 GB" in shown
    assert "609 steps of 256" in shown
    assert "It fits." in shown
    assert "at 2 per device and hour" in shown


def test_what_does_not_fit_names_flags_that_make_it_fit() -> None:
    flags = ["--model_name_or_path", "llama-7b", "--gpu", "a100-40", "--gpus", 4, "--bf16", "True"]
    shown = plan(*flags)
    assert "does NOT fit: it needs" in shown
    first = shown.partition("cheapest first):\n")[2].splitlines()[0].strip()
    cheapest = first.partition("   ")[0].split()
    assert cheapest[0].startswith("--")
    assert "It fits." in plan(*flags, *cheapest)


def test_json_holds_the_whole_plan_of_a_real_folder(tiny_model: Path) -> None:
    facts = json.loads(plan("--model_name_or_path", tiny_model, "--json", "--gpus", 2))
    assert facts["fits"]
    assert facts["work"]["exact"]
    assert facts["work"]["examples"] == 240
    assert facts["machine"]["ranks"] == 2
    assert facts["headroom"] > 0
    assert set(facts["memory"]) == {
        "moment",
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "logits",
        "communication",
        "allocator",
        "runtime",
    }


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--gpu", "voodoo2"], "Unknown card 'voodoo2'"),
        (["--model_name_or_path", "llama-9b"], "no known model has that name"),
        (["--learning_rat", "1"], "Did you mean --learning_rate?"),
        (["--gpus", "0"], "--gpus must be at least 1"),
        (["--ram", "nan"], "--ram must be a number"),
        (["--examples", "-5"], "--examples must be at least 1"),
    ],
)
def test_mistakes_are_explained(flags: list[str], said: str) -> None:
    assert said in plan(*flags, code=2)


def test_what_fsdp_config_says_is_planned() -> None:
    flags = ["--model_name_or_path", "llama-7b", "--gpu", "a100-40", "--gpus", 8, "--json"]
    given = json.loads(plan(*flags, "--fsdp_config", '{"activation_checkpointing": true}'))
    assert given["setting"]["checkpointing"]
    assert given == json.loads(plan(*flags, "--gradient_checkpointing", "True")) | {
        "notices": given["notices"]
    }


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{"), ("config.json", b"[]"), ("model.safetensors", b""),
        ("model.safetensors", b"\xff" * 64), ("model.safetensors", b"\x02" + bytes(7) + b"[]"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_explained(
    name: str, content: bytes, tiny_model: Path, tmp_path: Path
) -> None:
    for path in tiny_model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_bytes(content)
    told = plan("--model_name_or_path", tmp_path, code=2)
    assert name in told
    assert "Traceback" not in told


def test_recipe_and_plan_import_no_torch() -> None:
    """Not one of their modules, nor a plan for a named model: it takes under three seconds."""
    code = (
        "import importlib, pkgutil, sys\n"
        "import alpaca.plan, alpaca.recipe\n"
        "from alpaca.plan import command as verb\n"
        "for room in (alpaca.plan, alpaca.recipe):\n"
        "    for module in pkgutil.iter_modules(room.__path__, room.__name__ + '.'):\n"
        "        importlib.import_module(module.name)\n"
        "verb.run(verb.parser().parse_args(['--model_name_or_path', 'llama-7b']))\n"
        "assert 'alpaca.plan.workload' in sys.modules\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_data_and_server_are_opened_without_torch() -> None:
    """A mistake in a path or a data set is named before torch is imported, which takes seconds."""
    code = (
        "import sys\n"
        "import alpaca.serving.command, alpaca.training.inputs\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
