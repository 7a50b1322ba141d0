"""`python -m alpaca convert` says what it found, what it did, and what is not there."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from damage import NAME, Bench, make_good
from reference import convert
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_good(tmp_path_factory.mktemp("good"))


def test_finished_folder_is_kept_and_replaced_only_by_force(good: Path, tmp_path: Path) -> None:
    bench = Bench(good, "one", tmp_path, checklist=True)
    assert bench.run()[0] == 0
    before = (bench.output / NAME / "model.safetensors").stat().st_mtime_ns
    code, said = bench.run()
    assert (code, "already complete" in said) == (0, True)
    code, said = convert(
        "--input_dir", bench.input, "--output_dir", bench.output, "--dtype", "fp32"
    )
    assert code == 2
    assert "--force" in said
    assert (bench.output / NAME / "model.safetensors").stat().st_mtime_ns == before
    code, said = convert(
        "--input_dir", bench.input, "--output_dir", bench.output, "--dtype", "fp32", "--force"
    )
    assert code == 0
    assert "float32" in (bench.output / NAME / "config.json").read_text()


def test_the_tokenizer_of_another_model_stays_where_none_is_asked_for(
    good: Path, tmp_path: Path
) -> None:
    bench = Bench(good, "one", tmp_path, checklist=True)
    assert bench.run("--no-tokenizer")[0] == 0
    assert not (bench.output / "tokenizer").exists()
    assert bench.run()[0] == 0
    assert (bench.output / "tokenizer" / "tokenizer.json").is_file()


def test_tokenizer_folder_of_someone_else_is_left_alone(good: Path, tmp_path: Path) -> None:
    bench = Bench(good, "one", tmp_path, checklist=True)
    (bench.output / "tokenizer").mkdir(parents=True)
    (bench.output / "tokenizer" / "mine.txt").write_text("mine")
    code, said = bench.run()
    assert code == 0
    assert "left unchanged" in said
    assert [path.name for path in (bench.output / "tokenizer").iterdir()] == ["mine.txt"]


def test_passport_says_what_the_folder_was_made_of(good: Path, tmp_path: Path) -> None:
    bench = Bench(good, "four", tmp_path, checklist=True)
    assert bench.run()[0] == 0
    passport = json.loads((bench.output / NAME / "passport.json").read_text())
    assert passport["family"] == "LLaMA 1"
    assert passport["dtype"] == "fp16"
    right = load_file(bench.right / "model.safetensors")
    assert passport["parameters"] == sum(tensor.numel() for tensor in right.values())
    shard = bench.folder / "consolidated.01.pth"
    assert passport["sources"]["consolidated.01.pth"] == {
        "bytes": shard.stat().st_size,
        "md5": hashlib.md5(shard.read_bytes()).hexdigest(),
    }
    assert set(passport["sources"]) == {
        path.name for path in bench.folder.iterdir() if path.name != "checklist.chk"
    }
    written = bench.output / NAME / "model.safetensors"
    assert passport["files"]["model.safetensors"] == (
        hashlib.sha256(written.read_bytes()).hexdigest()
    )
    assert "transformers" in passport["versions"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--input_dir", "nowhere"], "no folder nowhere"),
        (["--input_dir", "."], "no model in ."),
        (["--input_dir", "two"], "Choose one with --model_size: 13B, 7B"),
        (["--input_dir", "two"], "./convert_weights.sh --input_dir two --model_size 13B"),
        (["--input_dir", "two", "--model_size", "65B"], "no folder two/65B"),
        (["--input_dir", "two", "--model_size", "../two/7B"], "not a folder name"),
    ],
)
def test_what_is_not_there_is_said(
    arguments: list[str], word: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size in ("7B", "13B"):
        shutil.copytree(good / "one" / "7B", tmp_path / "two" / size)
    monkeypatch.chdir(tmp_path)
    code, said = convert(*arguments)
    assert code == 2
    assert word in said


def test_what_was_found_is_said_before_the_work(good: Path, tmp_path: Path) -> None:
    bench = Bench(good, "four", tmp_path, checklist=True)
    _, said = bench.run()
    parameters = sum(t.numel() for t in load_file(bench.right / "model.safetensors").values())
    assert f"4 shards, {parameters:,} parameters, fp16, tokenizer 512 pieces" in said


@pytest.mark.parametrize("size", ["0GB", "five", "5TB", "1.5GB", "5"])
def test_shard_size_that_is_none_is_refused(size: str) -> None:
    code, said = convert("--max_shard_size", size)
    assert code == 2
    assert "is not a size like 500MB or 5GB" in said


def test_small_shards_load_as_one_model(good: Path, tmp_path: Path) -> None:
    bench = Bench(good, "four", tmp_path, checklist=True)
    code, said = convert(
        "--input_dir", bench.input, "--output_dir", bench.output, "--max_shard_size", "100KB"
    )
    assert code == 0, said
    files = sorted((bench.output / NAME).glob("*.safetensors"))
    assert len(files) == 4
    assert all(path.stat().st_size <= 110_000 for path in files)
    index = json.loads((bench.output / NAME / "model.safetensors.index.json").read_text())
    held = {name: path.name for path in files for name in load_file(path)}
    assert index["weight_map"] == held
    model = AutoModelForCausalLM.from_pretrained(bench.output / NAME, dtype="auto")
    right = load_file(bench.right / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], right[name]) for name in right)


def test_model_that_lies_in_unconverted_weights_itself_gets_a_name(
    good: Path, tmp_path: Path
) -> None:
    shutil.copytree(good / "one" / "7B", tmp_path / "unconverted-weights")
    code, said = convert(
        "--input_dir", tmp_path / "unconverted-weights", "--output_dir", tmp_path / "out"
    )
    assert code == 0, said
    assert (tmp_path / "out" / "model" / "config.json").is_file()


def test_what_a_narrower_type_loses_is_measured_and_said(tiny_model: Path, tmp_path: Path) -> None:
    words = ["--input_dir", tiny_model, "--output_dir", tmp_path, "--no-tokenizer"]
    code, said = convert(*words, "--dtype", "bf16")
    assert code == 0, said
    exact = torch.cat(
        [value.flatten() for value in load_file(tiny_model / "model.safetensors").values()]
    )
    lost = float((exact - exact.bfloat16().float()).norm() / exact.norm())
    assert 0.0005 < lost < 0.002
    assert f"Rounded to bf16, which changed the weights by {lost:.2%} (" in said
    code, said = convert(*words, "--force")
    assert code == 0
    assert "Rounded" not in said
