"""JSON that is nested too deeply for any reader is named, wherever it lies."""

import shutil
from pathlib import Path

import pytest

from alpaca import passport
from alpaca.convert import hftokenizer, manifest, params
from alpaca.dataset import generate
from alpaca.errors import UserError
from alpaca.folder import load_tokenizer
from alpaca.recipe import fsdp_config, schedules

DEEP = "[" * 200_000 + "]" * 200_000


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "passport.json"])
def test_a_file_of_a_model_folder(name: str, tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / name).write_text(DEEP)
    read = passport.read if name == "passport.json" else load_tokenizer
    with pytest.raises(UserError) as caught:
        read(folder)
    assert str(folder) in caught.value.happened


def test_a_file_of_a_source_and_a_flag(tmp_path: Path) -> None:
    file = tmp_path / "params.json"
    file.write_text(DEEP)
    with pytest.raises(UserError, match=r"params\.json is not JSON"):
        params.read_params(file)
    with pytest.raises(UserError, match="is not JSON"):
        hftokenizer._read_object(file)
    assert manifest._read(file) == {}
    with pytest.raises(UserError, match="fsdp_config is not JSON"):
        fsdp_config._read(str(file))
    with pytest.raises(UserError):
        schedules.settings("cosine", DEEP, 1.0)
    with pytest.raises(Exception, match="is not JSON"):
        generate._object(DEEP)
