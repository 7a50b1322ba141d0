"""Weight diffs: the tuned folder comes back bit for bit, or what is wrong is named first."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from model_folders import copied, save, save_sharded, tensors
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM

from alpaca import passport
from alpaca.cli import main
from alpaca.errors import UserError
from alpaca.release import diff, floatdiff

ROOT = Path(__file__).resolve().parent.parent


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["diff", *map(str, words)])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copied(tiny_model, tmp_path_factory.mktemp("base") / "llama-base")
    save(folder, {name: value.bfloat16() for name, value in tensors(folder).items()})
    return folder


@pytest.fixture(scope="module")
def tuned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with small changes and one row more, in two files, with a log beside."""
    folder = copied(base, tmp_path_factory.mktemp("tuned") / "alpaca_out")
    (folder / "model.safetensors").unlink()
    draw = torch.Generator().manual_seed(0)
    held = {}
    for name, value in tensors(base).items():
        noise = torch.randn(value.shape, generator=draw) * 1e-4
        held[name] = (value.float() + noise).bfloat16()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        held[name] = torch.cat([held[name], held[name].mean(0, keepdim=True)])
    save_sharded(folder, held)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 1025}))
    (folder / "log.jsonl").write_text('{"step": 1}\n')
    passport.write(folder, made_by="train")
    return folder


@pytest.fixture(scope="module")
def made(base: Path, tuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "alpaca.diff"
    assert run("make", tuned, base, "-o", path) == 0
    return path


def test_the_tuned_folder_comes_back_bit_for_bit(
    base: Path, tuned: Path, made: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run("apply", base, made, "-o", out) == 0
    assert content(out) == content(tuned)
    assert made.stat().st_size < 0.7 * sum(
        path.stat().st_size for path in tuned.glob("*.safetensors")
    )
    assert list(tmp_path.iterdir()) == [out]


def test_a_base_in_other_files_is_the_same_base(
    base: Path, tuned: Path, made: Path, tmp_path: Path
) -> None:
    sharded = copied(base, tmp_path / "sharded")
    (sharded / "model.safetensors").unlink()
    save_sharded(sharded, tensors(base))
    assert run("apply", sharded, made, "-o", tmp_path / "out") == 0
    assert content(tmp_path / "out") == content(tuned)


def test_what_the_base_lacks_is_stored_whole(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other types too: a norm in fp32, or a whole model in another type, which is refused."""
    tuned = copied(base, tmp_path / "tuned")
    held = tensors(base)
    held["model.norm.weight"] = held["model.norm.weight"].float() + 0.1
    save(tuned, held)
    assert run("make", tuned, base, "-o", tmp_path / "d") == 0
    assert run("apply", base, tmp_path / "d", "-o", tmp_path / "out") == 0
    assert content(tmp_path / "out") == content(tuned)
    save(tuned, {name: value.float() for name, value in held.items()})
    assert run("make", tuned, base, "-o", tmp_path / "e") == 2
    assert "has the name, type and width" in capsys.readouterr().err
    assert not (tmp_path / "e").exists()


def test_a_wrong_base_is_named_by_tensor_before_anything_is_written(
    base: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = copied(base, tmp_path / "other")
    held = tensors(base)
    held["model.layers.1.mlp.up_proj.weight"][3, 5] += 0.01
    save(other, held)
    assert run("apply", other, made, "-o", tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert "1 of 21 tensors differ: model.layers.1.mlp.up_proj.weight" in told
    assert "nothing was written" in told
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_twenty_flipped_bytes_in_the_base_are_each_named(
    base: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flipped = copied(base, tmp_path / "flipped")
    path = flipped / "model.safetensors"
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    chance = random.Random(1)
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
    for _ in range(20):
        at = chance.randrange(start, len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        assert run("apply", flipped, made, "-o", tmp_path / "out") == 2
        told = capsys.readouterr().err.partition("tensors differ: ")[2].split("\n")[0]
        assert told in names
        assert not (tmp_path / "out").exists()


def test_twenty_flipped_bytes_and_twenty_cuts_of_a_diff_are_each_found(
    base: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = made.read_bytes()
    chance = random.Random(2)
    damaged = tmp_path / "d.diff"
    places = [chance.randrange(len(whole)) for _ in range(16)] + [0, 40, len(whole) - 70, -1]
    for at in places:
        at %= len(whole)
        damaged.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        assert run("apply", base, damaged, "-o", tmp_path / "out") == 2
        assert f"{damaged} is damaged or is no diff (" in capsys.readouterr().err
    for _ in range(20):
        damaged.write_bytes(whole[: chance.randrange(len(whole))])
        assert run("apply", base, damaged, "-o", tmp_path / "out") == 2
        assert f"{damaged} is damaged or is no diff (" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [damaged]


def test_a_changed_tensor_of_a_diff_is_named(
    base: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = bytearray(made.read_bytes())
    with zipfile.ZipFile(made) as bundle:
        part = bundle.getinfo("tensor/model.norm.weight")
    at = part.header_offset
    names = int.from_bytes(whole[at + 26 : at + 28], "little")
    extra = int.from_bytes(whole[at + 28 : at + 30], "little")
    whole[at + 30 + names + extra + 10] ^= 0xFF
    (tmp_path / "d").write_bytes(whole)
    assert run("apply", base, tmp_path / "d", "-o", tmp_path / "out") == 2
    assert "(tensor/model.norm.weight)" in capsys.readouterr().err


def test_a_hostile_diff_writes_nothing_outside(
    base: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with zipfile.ZipFile(made) as bundle:
        parts = {name: bundle.read(name) for name in bundle.namelist()}
    hostile = tmp_path / "hostile"
    with zipfile.ZipFile(hostile, "w") as bundle:
        bundle.comment = b"0" * 64
        for name, held in parts.items():
            bundle.writestr(name, held)
        bundle.writestr("file/../../outside.txt", parts["file/config.json"])
    digest = diff.hashlib.sha256(hostile.read_bytes()[:-64]).hexdigest()
    hostile.write_bytes(hostile.read_bytes()[:-64] + digest.encode())
    assert run("apply", base, hostile, "-o", tmp_path / "a" / "out") == 2
    assert "is not a file of a model folder" in capsys.readouterr().err
    assert not (tmp_path / "outside.txt").exists()
    assert not (tmp_path / "a" / "out").exists()


def test_a_diff_is_no_model(made: Path, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    for name in ("model.safetensors", "pytorch_model.bin"):
        shutil.copy(made, tmp_path / "m" / name)
    with pytest.raises(SafetensorError):
        safe_open(tmp_path / "m" / "model.safetensors", framework="pt")
    with pytest.raises(RuntimeError):
        torch.load(tmp_path / "m" / "pytorch_model.bin", weights_only=True)
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m")


def test_folders_that_are_read_are_not_written(
    base: Path, tuned: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inside = tmp_path / "alpaca" / "alpaca.diff"
    inside.parent.mkdir()
    shutil.copy(made, inside)
    for output, diff_file in ((base, made), (base.parent, made), (inside.parent, inside)):
        assert run("apply", base, diff_file, "-o", output, "--force") == 2
        assert f"{output} would replace " in capsys.readouterr().err
    assert inside.is_file()
    assert run("make", tuned, base, "-o", inside.parent, "--force") == 2
    assert "is a folder that is already there" in capsys.readouterr().err
    (tmp_path / "d").write_text("mine")
    assert run("make", tuned, base, "-o", tmp_path / "d") == 2
    assert "--force replaces it" in capsys.readouterr().err
    assert (tmp_path / "d").read_text() == "mine"


def test_a_killed_command_leaves_nothing_half_written(
    base: Path, tuned: Path, made: Path, tmp_path: Path
) -> None:
    """Whatever it leaves is hidden, and the next run removes it."""
    chance = random.Random(4)
    out, path = tmp_path / "out", tmp_path / "again.diff"
    ways = (["make", tuned, base, "-o", path], ["apply", base, made, "-o", out])
    for number in range(6):
        words = [sys.executable, "-m", "alpaca", "diff", *map(str, ways[number % 2])]
        job = subprocess.Popen(
            words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(0.3 + chance.random())
        os.kill(job.pid, signal.SIGKILL)
        job.wait()
        assert not path.exists() or path.read_bytes()[-64:] == made.read_bytes()[-64:]
        assert not out.exists() or content(out) == content(tuned)
    for way in ways:
        assert run(*way, "--force") == 0
    assert content(out) == content(tuned)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["again.diff", "out"]


@pytest.fixture
def of_2023(base: Path, tuned: Path, tmp_path: Path) -> Path:
    """A folder whose numbers are the tuned ones minus the base's, in fp32; one row more."""
    folder = copied(base, tmp_path / "wdiff")
    theirs, ours = tensors(base), {}
    for name, value in (
        (name, value) for file in tuned.glob("*.safetensors") for name, value in _read(file)
    ):
        raw = theirs[name].float()
        if value.shape[0] > raw.shape[0]:
            raw = torch.cat([raw, raw.mean(0, keepdim=True)])
        ours[name] = value.float() - raw
    save(folder, ours)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 1025}))
    return folder


def _read(path: Path) -> list[tuple[str, torch.Tensor]]:
    with safe_open(path, framework="pt") as file:
        return [(name, file.get_tensor(name)) for name in file.keys()]  # noqa: SIM118


def test_a_diff_of_2023_is_added_in_fp32(
    base: Path, tuned: Path, of_2023: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "alpaca-tiny"
    assert run("apply", base, of_2023, "-o", out) == 0
    told = capsys.readouterr().out
    assert "Sum of all weights: " in told
    assert "No sum is published for a model of this size" in told
    wanted = dict(pair for file in tuned.glob("*.safetensors") for pair in _read(file))
    found = tensors(out)
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert value.dtype == torch.float32
        assert torch.allclose(value, wanted[name].float(), rtol=0, atol=1e-7), name
    total = float(sum(value.double().sum() for value in found.values()))
    assert float(told.partition("weights: ")[2].split(";")[0]) == pytest.approx(total, abs=1e-3)
    recorded = passport.read(out)
    assert recorded is not None
    assert recorded["base"] == {"folder": base.name}


def test_a_base_of_another_shape_is_named(
    base: Path, of_2023: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("apply", of_2023, base, "-o", tmp_path / "out") == 2
    assert "holds model.embed_tokens.weight of shape" in capsys.readouterr().err


ALPACA_7B = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "vocab_size": 32001,
    "num_attention_heads": 32,
}


def test_either_of_the_two_sums_may_be_the_published_one() -> None:
    frequencies = 32 * sum(10000.0 ** -(place / 64) for place in range(64))
    here = Path("base"), Path("diff")
    for weights, which in ((floatdiff.PUBLISHED, "first"), (50637.18 - frequencies, "second")):
        (_, told) = floatdiff.check(ALPACA_7B, weights, *here)
        assert told == f"The {which} is the published sum, 50637.1836."
    with pytest.raises(UserError, match="Neither sum is the published one") as raised:
        floatdiff.check(ALPACA_7B, 50000.0, *here)
    assert f"{50000 + frequencies:.1f}" in str(raised.value)
    assert "another conversion of the base" in str(raised.value)
