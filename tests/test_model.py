"""Model folders: what loads, what is refused, what a passport records."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from alpaca import folder as folders
from alpaca import model, passport
from alpaca.errors import UserError


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "llama-tiny"))


def test_a_folder_loads_in_the_type_asked_for(folder: Path) -> None:
    loaded = model.load_model(folder, torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert not loaded.training


@pytest.mark.parametrize(
    ("matrices", "norms"),
    [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")],
)
def test_weights_keep_the_numbers_of_the_files_whatever_config_json_calls_their_type(
    folder: Path, matrices: str, norms: str
) -> None:
    path = folder / "model.safetensors"
    held = {
        name: (tensor * 1.2345677).to(getattr(torch, norms if "norm" in name else matrices))
        for name, tensor in load_file(path).items()
    }
    save_file(held, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    for named in ("float16", "bfloat16", "float32"):
        (folder / "config.json").write_text(json.dumps(config | {"dtype": named}))
        loaded = model.load_model(folder, None).state_dict()
        assert {name: tensor.float().sum() for name, tensor in loaded.items()} == {
            name: tensor.float().sum() for name, tensor in held.items()
        }


@pytest.mark.parametrize(
    ("remove", "expected"),
    [
        ("*", "There is no model folder"),
        ("config.json", "no config.json"),
        ("*.safetensors", r"no \*"),
    ],
)
def test_incomplete_folders_are_refused_with_a_remedy(
    folder: Path, remove: str, expected: str
) -> None:
    if remove == "*":
        shutil.rmtree(folder)
    else:
        next(folder.glob(remove)).unlink()
    with pytest.raises(UserError, match=expected) as caught:
        model.load_model(folder, torch.float32)
    assert caught.value.remedy


def test_weights_that_are_pickles_are_not_loaded(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        model.load_model(folder, torch.float32)


def test_a_folder_whose_replacement_was_cut_short_is_refused_until_it_is_finished(
    folder: Path,
) -> None:
    inner = folders.staging(folder)
    for path in [p for p in folder.iterdir() if p.is_file()]:
        shutil.copy(path, inner)
    (inner / folders.READY).touch()
    with pytest.raises(UserError, match="being replaced"):
        folders.check_folder(folder)
    folders.finish_install(folder)
    folders.check_folder(folder)
    assert not inner.exists()


def test_a_move_that_was_cut_short_between_two_files_loses_neither(folder: Path) -> None:
    inner = folders.staging(folder)
    names = sorted(p.name for p in folder.iterdir() if p.is_file())
    for name in names:
        shutil.copy(folder / name, inner)
    (inner / folders.READY).write_text("\n".join(names))
    for name in names[: names.index("model.safetensors") + 1]:
        (inner / name).replace(folder / name)
    folders.finish_install(folder)
    assert sorted(p.name for p in folder.iterdir()) == names


def test_installing_removes_shards_of_the_model_before(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").touch()
    inner = folders.staging(folder)
    shutil.copy(folder / "model.safetensors", inner)
    folders.install(inner, folder)
    assert [p.name for p in folder.glob("*.safetensors")] == ["model.safetensors"]
    assert (folder / "config.json").exists()


def test_a_passport_records_every_file_and_is_read_back(folder: Path) -> None:
    written = passport.write(folder, made_by="test", steps=3)
    assert passport.read(folder) == written
    assert written["steps"] == 3
    names = {p.name for p in folder.iterdir()} - {passport.NAME}
    assert set(written["files"]) == names
    assert all(passport.sha256(folder / name) == written["files"][name] for name in names)


def test_other_templates_are_refused_and_no_passport_is_not(folder: Path) -> None:
    passport.check_template(folder, passport.read(folder))
    passport.write(folder, made_by="test")
    passport.check_template(folder, passport.read(folder))
    path = folder / passport.NAME
    found = json.loads(path.read_text())
    path.write_text(json.dumps(found | {"template_sha256": "0" * 64}))
    with pytest.raises(UserError, match="prompt templates that differ"):
        passport.check_template(folder, passport.read(folder))


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 99}', '{"made_by": "x"}'])
def test_damaged_or_newer_passports_are_explained(folder: Path, content: str) -> None:
    (folder / passport.NAME).write_text(content)
    with pytest.raises(UserError, match=r"damaged|format 99"):
        passport.read(folder)


def test_fingerprints_tell_models_apart_with_and_without_passport(folder: Path) -> None:
    without = passport.fingerprint(folder)
    assert passport.fingerprint(folder) == without
    passport.write(folder, made_by="test")
    with_passport = passport.fingerprint(folder)
    config = folder / "config.json"
    config.write_text(config.read_text() + " ")
    passport.write(folder, made_by="test")
    assert passport.fingerprint(folder) != with_passport
    (folder / passport.NAME).unlink()
    assert passport.fingerprint(folder) != without
