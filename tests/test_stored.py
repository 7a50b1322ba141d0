"""Which files are a folder's weights: one answer for every program, and it is transformers'."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_folders import (
    Tensors,
    copied,
    flags,
    index,
    save,
    save_sharded,
    tensors,
    trained_loss,
    transformers_loss,
    zeros,
)
from reference import convert
from safetensors import safe_open
from safetensors.torch import load_file
from training_runs import train

from alpaca import golden, layout, passport, stored, verify
from alpaca.cli import main
from alpaca.errors import UserError
from alpaca.serving import loading
from alpaca.serving.weights import Weights


def stale_shards(folder: Path, held: Tensors) -> None:
    save_sharded(folder, zeros(held))


def other_precision(folder: Path, held: Tensors) -> None:
    save(folder, zeros(held), "model.fp16.safetensors")


def ema(folder: Path, held: Tensors) -> None:
    save(folder, zeros(held), "model_ema.safetensors")


def consolidated(folder: Path, held: Tensors) -> None:
    save(folder, zeros(held), "consolidated.safetensors")


def older_shard_count(folder: Path, held: Tensors) -> None:
    (folder / "model.safetensors").unlink()
    save(folder, zeros(held), "model-00001-of-00001.safetensors")
    save_sharded(folder, held)


def tensor_in_the_other_file(folder: Path, held: Tensors) -> None:
    """The index names the right files, and for each tensor the wrong one of them."""
    older_shard_count(folder, held)
    path = folder / layout.INDEX
    where = json.loads(path.read_text())["weight_map"]
    first, second = sorted(set(where.values()))
    index(folder, {name: second if file == first else first for name, file in where.items()})


@pytest.mark.parametrize("add", [other_precision, ema, older_shard_count])
def test_every_program_reads_the_weights_that_transformers_loads(
    add: Callable[[Path, Tensors], None],
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = copied(tiny_model, tmp_path / "in" / "model")
    held = tensors(folder)
    add(folder, held)
    expected = transformers_loss(folder, tmp_path)
    assert expected == pytest.approx(transformers_loss(tiny_model, tmp_path), rel=1e-9)
    assert trained_loss(folder, tmp_path / "run") == pytest.approx(expected, rel=1e-5)
    code, said = convert("--input_dir", folder, "--output_dir", tmp_path / "converted")
    assert code == 0, said
    converted = load_file(tmp_path / "converted/model/model.safetensors")
    assert all(torch.equal(converted[name], tensor) for name, tensor in held.items())
    assert golden.record(folder) == golden.record(tiny_model)
    with pytest.raises(SystemExit) as ended:
        main(["plan", *flags(folder, tmp_path / "plan")])
    assert ended.value.code == 0
    parameters = sum(tensor.numel() for tensor in held.values())
    assert f"{parameters:,} parameters" in capsys.readouterr().out
    loading.load(Weights(folder, "a test"), {"ALPACA_CONTEXT": "64"})[0].stop()


@pytest.mark.parametrize("add", [consolidated, tensor_in_the_other_file])
def test_other_files_and_a_wrong_place_in_the_index_change_nothing(
    add: Callable[[Path, Tensors], None], tiny_model: Path, tmp_path: Path
) -> None:
    folder = copied(tiny_model, tmp_path / "model")
    add(folder, tensors(folder))
    assert transformers_loss(folder, tmp_path) == transformers_loss(tiny_model, tmp_path)
    assert golden.record(folder) == golden.record(tiny_model)


def test_weights_of_two_models_in_one_folder_are_refused_by_every_program(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(tiny_model, tmp_path / "in" / "model")
    stale_shards(folder, tensors(folder))
    told = (
        "holds two sets of weights: model.safetensors, which transformers loads, and "
        "model.safetensors.index.json with model-00001-of-00002.safetensors, "
        "model-00002-of-00002.safetensors, which vLLM loads."
    )
    refused_everywhere(folder, told, tmp_path, capsys)


def refused_everywhere(
    folder: Path, told: str, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """train, plan, convert, serve, golden and the fingerprint refuse in the same words."""
    capsys.readouterr()
    done = train(*flags(folder, scratch / "run"))
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert not (scratch / "run/out").exists()
    code, said = convert("--input_dir", folder, "--output_dir", scratch / "converted")
    assert code == 2
    assert told in said
    for verb in (["plan", *flags(folder, scratch / "plan")], ["serve", "--weights", str(folder)]):
        with pytest.raises(SystemExit) as ended:
            main(verb)
        assert ended.value.code == 2
        assert told in capsys.readouterr().err
    for refuse in (golden.Float64Weights, passport.fingerprint):
        with pytest.raises(UserError) as caught:
            refuse(folder)
        assert told in str(caught.value)
    with pytest.raises(UserError) as caught:
        loading.load(Weights(folder, "a test"), {})
    assert told in str(caught.value)


SHARD = "model-00001-of-00002.safetensors"


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ([], "lists no files"),
        ({}, "lists no files"),
        ({"a": 5, "b": SHARD}, "names 5, which is not a file"),
        ({"a": "x\0.safetensors"}, "which is not a file"),
        ({"a": "../model.safetensors"}, "which is outside"),
        ({"a": "/etc/model.safetensors"}, "which is outside"),
        ({"a": "pytorch_model.bin"}, "which is not a file"),
        ({"a": SHARD}, "model-00001-of-00002.safetensors is missing"),
    ],
)
def test_an_index_that_cannot_be_followed_is_explained(
    where: object, told: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = copied(tiny_model, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    index(folder, where)
    with pytest.raises(UserError) as caught:
        stored.tensors(folder)
    assert told in str(caught.value)


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff\xfe", b'{"metadata": {}}', b"[" * 100_000])
def test_an_index_that_is_no_index_is_explained(
    content: bytes, tiny_model: Path, tmp_path: Path
) -> None:
    folder = copied(tiny_model, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / layout.INDEX).write_bytes(content)
    with pytest.raises(UserError, match=r"index\.json (is damaged|lists no files)"):
        stored.tensors(folder)


def test_a_tensor_in_two_files_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = copied(tiny_model, tmp_path / "model")
    held = tensors(folder)
    older_shard_count(folder, held)
    second = "model-00002-of-00002.safetensors"
    save(folder, load_file(folder / second) | {"lm_head.weight": held["lm_head.weight"]}, second)
    with pytest.raises(UserError, match=r"both hold lm_head\.weight"):
        stored.tensors(folder)


def test_shards_without_an_index_are_refused_as_transformers_refuses_them(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = copied(tiny_model, tmp_path / "model")
    older_shard_count(folder, tensors(folder))
    (folder / layout.INDEX).unlink()
    with pytest.raises(UserError, match=r"neither model.safetensors nor model.safetensors.index"):
        stored.tensors(folder)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is damaged"),
        (b"\xff" * 64, "cut short"),
        (b"\x02" + bytes(7) + b"[]", "is damaged"),
        (b"\x0d" + bytes(7) + b'{"a":{"b":1}}', "is missing"),
    ],
)
def test_a_file_that_is_no_safetensors_file_is_explained(
    content: bytes, told: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = copied(tiny_model, tmp_path / "model")
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=told):
        stored.tensors(folder)


def test_a_header_is_let_through_only_if_the_safetensors_library_takes_it(
    tiny_model: Path, tmp_path: Path
) -> None:
    content = (tiny_model / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little") + 8
    chance, path, refused = random.Random(0), tmp_path / "changed.safetensors", 0
    for _ in range(300):
        changed = bytearray(content)
        changed[chance.randrange(length)] = chance.choice(b'0123456789[]{},:" aZ')
        path.write_bytes(changed)
        try:
            stored.check_types(stored.header(path))
        except UserError:
            refused += 1
            continue
        with safe_open(path, framework="pt") as file:
            assert all(file.get_slice(name).get_shape() for name in file.keys())  # noqa: SIM118
    assert 100 < refused < 300


def test_a_file_that_was_cut_short_is_explained(tiny_model: Path, tmp_path: Path) -> None:
    folder = copied(tiny_model, tmp_path / "model")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model.safetensors is damaged: it has [\d,]+ bytes"):
        stored.tensors(folder)


def test_verify_names_weight_files_that_are_not_the_models_even_if_its_passport_has_them(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = copied(tiny_model, tmp_path / "model")
    passport.write(folder, "a test", golden=golden.record(folder))
    verify.run(verify.parser().parse_args([str(folder)]))
    ema(folder, tensors(folder))
    with pytest.raises(UserError, match=r"model_ema.safetensors was added"):
        verify.run(verify.parser().parse_args([str(folder)]))
    (folder / passport.NAME).unlink()
    passport.write(folder, "a test", golden=golden.record(folder))
    with pytest.raises(UserError, match=r"model_ema.safetensors holds other weights"):
        verify.run(verify.parser().parse_args([str(folder)]))
