"""`python -m alpaca verify`: whatever is tampered with in a model folder is named."""

import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import reference
import torch
from safetensors.torch import load_file, save_file

from alpaca import golden, passport, verify
from alpaca.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as training writes it: its passport has golden logits and every tensor's hash."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "passport.json").unlink(missing_ok=True)
    tensors = golden.tensor_hashes(folder / "model.safetensors")
    passport.write(folder, "test", golden=golden.record(folder), tensors=tensors)
    (folder / "log.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    passport.add_extras(folder, ["log.jsonl", "loss.png"])
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "model")
    return tmp_path / "model"


def check(folder: Path, *flags: str) -> str:
    """What `verify` finds; empty when nothing."""
    try:
        verify.run(verify.parser().parse_args([str(folder), *flags]))
    except UserError as error:
        return str(error)
    return ""


def flip(path: Path, at: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def forge(folder: Path) -> None:
    """Write hashes and seal anew, as someone would who wants a change not to be found."""
    held = passport.read(folder)
    assert held is not None
    held["files"] = {name: passport.sha256(folder / name) for name in held["files"]}
    held["seal"] = passport.seal(held)
    (folder / "passport.json").write_text(passport.render(held))


def test_an_untouched_folder_is_as_it_was_written(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(folder) == ""
    assert "is intact: " in capsys.readouterr().out


def test_one_flipped_bit_in_any_file_is_named(folder: Path) -> None:
    chance = random.Random(0)
    names = sorted(path.name for path in folder.iterdir())
    assert {"passport.json", "model.safetensors", "tokenizer.json", "log.jsonl"} <= set(names)
    for name in names:
        path = folder / name
        content = path.read_bytes()
        flip(path, chance.randrange(len(content)), chance.randrange(8))
        assert name in check(folder), name
        path.write_bytes(content)
    assert check(folder) == ""


def test_the_tensor_in_which_a_bit_was_flipped_is_named(folder: Path) -> None:
    flip(folder / "model.safetensors", -1)
    told = check(folder, "--no-golden")
    last = sorted(load_file(folder / "model.safetensors"))[-1]
    assert "model.safetensors differs" in told
    assert f"tensor {last} differs" in told


def test_a_weight_changed_along_with_its_hash_is_told_by_the_golden_logits(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][3, 5] *= 1.01
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    forge(folder)
    assert check(folder, "--no-golden") == ""
    told = check(folder)
    assert "golden prompt 1: " in told
    assert f"tensor {name} differs" in told
    assert told.count("tensor ") == 1


@pytest.mark.parametrize("renamed", ["", "model.layers.9.mlp.down_proj.weight"])
def test_a_lost_tensor_is_named_though_its_hash_was_forged(folder: Path, renamed: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    lost = tensors.pop(name)
    if renamed:
        tensors[renamed] = lost
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    forge(folder)
    told = check(folder)
    assert f"tensor {name} is missing" in told
    assert not renamed or f"tensor {renamed} differs" in told


def test_a_changed_bit_of_the_passport_is_found_wherever_it_is(folder: Path) -> None:
    """In its keys too: without one of them, nothing could be compared."""
    path = folder / "passport.json"
    content = path.read_bytes()
    keys = [
        at for line in re.finditer(rb'^ "\w+"', content, re.MULTILINE) for at in range(*line.span())
    ]
    assert len(keys) > 80
    for at in [*keys, *range(0, len(content), 29)]:
        flip(path, at)
        told = check(folder, "--no-golden")
        assert "passport.json" in told, f"byte {at}"
        path.write_bytes(content)


@pytest.mark.parametrize("name", ["../outside.json", "/etc/hostname"])
def test_a_passport_names_no_file_outside_its_folder(folder: Path, name: str) -> None:
    held = passport.read(folder)
    assert held is not None
    held["files"][name] = "0" * 64
    held["seal"] = passport.seal(held)
    (folder / "passport.json").write_text(passport.render(held))
    assert "is not a file of a model folder" in check(folder)


def test_missing_and_added_files_are_named(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    (folder / "added_tokens.json").write_text("{}")
    (folder / "notes.md").write_text("mine")
    told = check(folder)
    assert "generation_config.json is missing" in told
    assert "added_tokens.json was added" in told
    assert "notes.md" not in told


def test_files_that_the_owner_added_are_accepted_once_and_watched_from_then_on(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "LICENSE.txt").write_text("a licence")
    (folder / "Notice.txt").write_text("a notice")
    assert check(folder) == ""
    (folder / "params.json").write_text("{}")
    assert "params.json was added" in check(folder)
    assert check(folder, "--accept", "params.json") == ""
    assert check(folder) == ""
    (folder / "params.json").write_text("[]")
    assert "params.json differs" in check(folder)
    assert check(folder, "--accept", "params.json") == ""
    (folder / "params.json").unlink()
    assert check(folder) == ""
    assert passport.check_loaded(folder) is not None


def test_neither_a_file_of_the_model_nor_one_outside_is_accepted(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    assert "config.json is part of the model" in check(folder, "--accept", "config.json")
    assert "There is no file" in check(folder, "--accept", "nothing.json")
    assert "is written by this program" in check(folder, "--accept", "./passport.json")
    outside = folder.parent / "outside.json"
    outside.write_text("{}")
    assert "not a file of the folder" in check(folder, "--accept", "../outside.json")


def test_weights_and_code_in_subfolders_are_named_and_checkpoints_are_not(folder: Path) -> None:
    for name in (
        "sub/model.safetensors",
        "sub/deep/code.py",
        "sub/data.json",
        "checkpoint-3/a.bin",
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    told = check(folder)
    assert "sub/model.safetensors was added" in told
    assert "sub/deep/code.py was added" in told
    assert told.count("was added") == 2


def test_the_verdict_says_that_logits_were_not_checked(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(folder, "--no-golden") == ""
    assert "logits NOT checked (--no-golden)" in capsys.readouterr().out
    held = json.loads((folder / "passport.json").read_text())
    del held["golden"]
    (folder / "passport.json").write_text(passport.render(held))
    forge(folder)
    assert check(folder) == ""
    assert "logits NOT checked (the passport holds none)" in capsys.readouterr().out


def test_a_copy_without_the_log_is_whole(folder: Path) -> None:
    (folder / "log.jsonl").unlink()
    assert check(folder) == ""


def test_a_passport_that_only_looks_different_is_named(folder: Path) -> None:
    path = folder / "passport.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=2))
    assert "passport.json was changed" in check(folder)


def test_a_folder_without_a_passport_is_explained_and_served_with_a_notice(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_model, tmp_path / "bare")
    (tmp_path / "bare/passport.json").unlink(missing_ok=True)
    assert "has no passport" in check(tmp_path / "bare")
    passport.check_loaded(tmp_path / "bare")
    assert "has no passport" in capsys.readouterr().out


def test_a_server_refuses_a_changed_tokenizer_and_a_missing_file(folder: Path) -> None:
    passport.check_loaded(folder)
    flip(folder / "tokenizer.json", 1000)
    with pytest.raises(UserError, match=r"tokenizer\.json was changed"):
        passport.check_loaded(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"is missing|was changed"):
        passport.check_loaded(folder)


def test_golden_logits_can_be_added_later(folder: Path) -> None:
    held = passport.read(folder)
    assert held is not None
    held["golden"] = None
    held["seal"] = passport.seal(held)
    (folder / "passport.json").write_text(passport.render(held))
    assert check(folder) == ""
    assert check(folder, "--add-golden") == ""
    again = passport.read(folder)
    assert again is not None
    assert len(again["golden"]) == 3
    assert check(folder) == ""


def test_a_converted_folder_is_verified_by_the_command(tmp_path: Path) -> None:
    held = reference.weights(reference.LLAMA_3_1, torch.bfloat16)
    reference.save(tmp_path / "in" / "8B", reference.LLAMA_3_1, held)
    code, said = reference.convert("--input_dir", tmp_path / "in", "--output_dir", tmp_path / "out")
    assert code == 0, said
    (made,) = [path for path in (tmp_path / "out").iterdir() if path.name != "tokenizer"]
    command = [sys.executable, "-m", "alpaca", "verify", str(made)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "3 golden prompts (made by convert)" in done.stdout
    flip(made / "config.json", 20)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "config.json differs" in done.stderr


def tamper(folder: Path, chance: random.Random) -> str:
    """Do one thing that should be found; returns the name that must be told."""
    path = chance.choice(sorted(path for path in folder.iterdir() if path.name != "log.jsonl"))
    content = path.read_bytes()
    how = chance.randrange(6)
    if how == 0:
        flip(path, chance.randrange(len(content)), chance.randrange(8))
    elif how == 1:
        path.write_bytes(content[: chance.randrange(1, len(content))])
    elif how == 2:
        at = chance.randrange(len(content))
        path.write_bytes(content[:at] + chance.randbytes(chance.randrange(1, 9)) + content[at:])
    elif how == 3 and path.name != "passport.json":
        path.unlink()
    elif how == 4:
        path = folder / f"added-{chance.randrange(9)}.safetensors"
        path.write_bytes(chance.randbytes(100))
    else:
        tensors = load_file(folder / "model.safetensors")
        name = chance.choice([name for name in sorted(tensors) if "embed" not in name])
        place = tuple(chance.randrange(size) for size in tensors[name].shape)
        tensors[name][place] *= 1.01
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        forge(folder)
        return name
    return path.name


def find_tampering(folder: Path, seed: int) -> None:
    named = tamper(folder, random.Random(seed))
    told = check(folder)
    assert named in told, f"seed {seed}: {named} is not in {told!r}"


@pytest.mark.parametrize("seed", range(8))
def test_a_random_tampering_is_found(folder: Path, seed: int) -> None:
    find_tampering(folder, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 140))
def test_forty_random_tamperings_are_all_found(folder: Path, seed: int) -> None:
    find_tampering(folder, seed)
