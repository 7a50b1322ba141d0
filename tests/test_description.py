"""What stands next to the weights: older programs must read the same model from it."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from reference import LLAMA_1, LLAMA_3, LLAMA_3_1, Shape, convert
from training_runs import ROOT, train
from transformers import AutoTokenizer

from alpaca.folder import load_tokenizer

SHAPES = {
    "theta 100000": replace(LLAMA_1, theta=100_000.0),
    "theta 500000": LLAMA_3,
    "llama3 scaling": LLAMA_3_1,
}
SCALING = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
Folders = dict[str, tuple[Path, Path]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """By name of the shape: what convert wrote from Meta's files, and what training made of it."""
    root = tmp_path_factory.mktemp("described")
    made = {}
    for number, (name, shape) in enumerate(SHAPES.items()):
        source = reference.save(root / "in" / f"m{number}", shape, weights_of(shape))
        code, said = convert("--input_dir", source, "--output_dir", root / "weights")
        assert code == 0, said
        base, out = root / "weights" / f"m{number}", root / f"out{number}"
        done = train(
            "--model_name_or_path",
            base,
            "--output_dir",
            out,
            "--max_steps",
            1,
            "--per_device_train_batch_size",
            2,
            "--gradient_accumulation_steps",
            1,
        )
        assert done.returncode == 0, done.stderr
        made[name] = base, out
    return made


def weights_of(shape: Shape) -> dict[str, torch.Tensor]:
    return reference.weights(shape, torch.bfloat16)


def read(folder: Path, name: str) -> dict[str, Any]:
    held: dict[str, Any] = json.loads((folder / name).read_text())
    return held


@pytest.mark.parametrize("name", SHAPES)
def test_both_spellings_of_the_rotary_settings_are_written(name: str, folders: Folders) -> None:
    theta = SHAPES[name].theta
    scaled = {"rope_scaling": SCALING} if SHAPES[name].scaled else {}
    for folder in folders[name]:
        config = read(folder, "config.json")
        assert config["rope_theta"] == theta, folder
        assert config.get("rope_scaling") == scaled.get("rope_scaling"), folder
        kind = scaled.get("rope_scaling", {"rope_type": "default"})
        assert config["rope_parameters"] == {**kind, "rope_theta": theta}, folder
        assert (config["dtype"], config["torch_dtype"]) == ("bfloat16", "bfloat16")


@pytest.mark.parametrize("name", SHAPES)
def test_a_trained_folder_is_described_as_its_base(name: str, folders: Folders) -> None:
    base, out = folders[name]
    for file in (
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
    ):
        assert read(out, file) == read(base, file), file


def test_the_tokenizer_loads_anywhere_and_nothing_of_its_writer_is_kept(folders: Folders) -> None:
    for folder in (folder for pair in folders.values() for folder in pair):
        settings = read(folder, "tokenizer_config.json")
        assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert set(settings) <= {
            "tokenizer_class",
            "bos_token",
            "eos_token",
            "unk_token",
            "pad_token",
            "model_max_length",
            "clean_up_tokenization_spaces",
            "chat_template",
            "added_tokens_decoder",
        }
        assert "transformers_version" not in read(folder, "config.json")
        assert "transformers_version" not in read(folder, "generation_config.json")


def test_sentencepiece_models_keep_their_original_file_and_llama_3_does_not(
    folders: Folders,
) -> None:
    original = reference.tokenizer_model(False)
    for folder in folders["theta 100000"]:
        assert (folder / "tokenizer.model").read_bytes() == original
    for name in ("theta 500000", "llama3 scaling"):
        for folder in folders[name]:
            assert not (folder / "tokenizer.model").exists()
    base, _ = folders["theta 100000"]
    assert (base.parent / "tokenizer" / "tokenizer.json").is_file()  # of the model converted last
    assert not (base.parent / "tokenizer" / "tokenizer.model").exists()


def test_the_original_file_next_to_tokenizer_json_changes_no_ids(folders: Folders) -> None:
    base, out = folders["theta 100000"]
    assert list(read(base, "tokenizer_config.json")["added_tokens_decoder"]) == ["0", "1", "2"]
    texts = ["a b", "  two  spaces", "ünï", "\n\n### Response:", "</s>"]
    expected = [load_tokenizer(base)(text).input_ids for text in texts]
    (base / "tokenizer.model").rename(base / "aside")
    try:
        assert [AutoTokenizer.from_pretrained(base)(text).input_ids for text in texts] == expected
    finally:
        (base / "aside").rename(base / "tokenizer.model")
    assert [AutoTokenizer.from_pretrained(out)(text).input_ids for text in texts] == expected


def test_every_file_of_a_trained_folder_can_be_read_by_others(folders: Folders) -> None:
    mask = os.umask(0)
    os.umask(mask)
    _, out = folders["theta 100000"]
    for path in out.iterdir():
        if path.is_file():
            assert path.stat().st_mode & 0o777 == 0o666 & ~mask, path.name


@pytest.mark.slow
def test_transformers_4_continues_trained_and_converted_folders_as_5_does() -> None:
    done = subprocess.run(
        [sys.executable, "bench/engines.py", "--only", "transformers 4"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    report = json.loads(done.stdout.splitlines()[-1])
    verdicts = report["transformers 4"]
    trained = [name for name in verdicts if name.endswith("trained")]
    assert len(verdicts) == 2 * len(trained) > 10
    assert set(verdicts.values()) == {"equal"}, verdicts
