"""Whatever happens to the files: never a folder that looks complete and is wrong."""

import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import reference
import torch
from damage import NAME, Bench, make_good
from reference import LLAMA_1, convert
from safetensors.torch import load_file

from alpaca.errors import UserError


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_good(tmp_path_factory.mktemp("good"))


def cut_everywhere(good: Path, tmp_path: Path, places: int, *, checklist: bool) -> int:
    """Truncate every file at random places; returns how many were tried."""
    dice, tried = random.Random(places), 0
    for name in ("one", "four", "three"):
        bench = Bench(good, name, tmp_path / name, checklist=checklist)
        for path in sorted(bench.folder.iterdir()):
            whole = path.read_bytes()
            for _ in range(places):
                path.write_bytes(whole[: dice.randrange(len(whole))])
                code, said = bench.run()
                if path.name != "checklist.chk":
                    assert code == 2, f"{path.name} cut: {said}"
                    assert path.name in said or path.name == "tokenizer.model", said
                shutil.rmtree(bench.output, ignore_errors=True)
                tried += 1
            path.write_bytes(whole)
        assert bench.run()[0] == 0
    return tried


@pytest.mark.parametrize("checklist", [True, False])
def test_cut_files_are_named_and_nothing_is_written(
    checklist: bool, good: Path, tmp_path: Path
) -> None:
    assert cut_everywhere(good, tmp_path, 2, checklist=checklist) >= 20


@pytest.mark.slow
@pytest.mark.parametrize("checklist", [True, False])
def test_files_cut_at_twenty_places(checklist: bool, good: Path, tmp_path: Path) -> None:
    assert cut_everywhere(good, tmp_path, 20, checklist=checklist) >= 200


def flip_bytes(good: Path, tmp_path: Path, flips: int, *, checklist: bool) -> None:
    dice = random.Random(flips)
    bench = Bench(good, "four", tmp_path, checklist=checklist)
    files = [path for path in sorted(bench.folder.iterdir()) if path.name != "checklist.chk"]
    for _ in range(flips):
        path = dice.choice(files)
        whole = bytearray(path.read_bytes())
        place = dice.randrange(len(whole))
        whole[place] ^= 1 << dice.randrange(8)
        original = path.read_bytes()
        path.write_bytes(whole)
        code, said = bench.run() if checklist else careless(bench)
        if checklist:
            assert code == 2, f"{path.name}, byte {place}: {said}"
            assert path.name in said
        path.write_bytes(original)
        shutil.rmtree(bench.output, ignore_errors=True)
    assert bench.run()[0] == 0


def careless(bench: Bench) -> tuple[int, str]:
    """Without a checklist only the tensors are covered; text files may change unseen."""
    code, said = convert("--input_dir", bench.input, "--output_dir", bench.output)
    assert code in (0, 2), said
    assert "Traceback" not in said
    if code == 0:
        mine, right = (
            load_file(x / "model.safetensors") for x in (bench.output / NAME, bench.right)
        )
        assert all(torch.equal(mine[name], right[name]) for name in right)
    return code, said


def test_flipped_bytes_are_found_by_the_checklist(good: Path, tmp_path: Path) -> None:
    flip_bytes(good, tmp_path, 8, checklist=True)


@pytest.mark.slow
def test_fifty_flipped_bytes_are_found_by_the_checklist(good: Path, tmp_path: Path) -> None:
    flip_bytes(good, tmp_path, 50, checklist=True)


def test_flipped_bytes_never_reach_a_tensor_without_a_checklist(good: Path, tmp_path: Path) -> None:
    flip_bytes(good, tmp_path, 8, checklist=False)


@pytest.mark.slow
def test_fifty_flipped_bytes_never_reach_a_tensor(good: Path, tmp_path: Path) -> None:
    flip_bytes(good, tmp_path, 50, checklist=False)


@pytest.mark.parametrize("checklist", [True, False])
@pytest.mark.parametrize("missing", [0, 2, 3])
def test_missing_shard_is_named(missing: int, checklist: bool, good: Path, tmp_path: Path) -> None:
    bench = Bench(good, "four", tmp_path, checklist=checklist)
    (bench.folder / f"consolidated.{missing:02}.pth").unlink()
    code, said = bench.run()
    assert code == 2
    found = ", ".join(f".{number:02}" for number in range(4) if number != missing)
    assert f"found consolidated{found} of a 4-shard model" in said
    assert f"consolidated.{missing:02}.pth is missing" in said


@pytest.mark.parametrize("checklist", [True, False])
def test_swapped_shards_are_found(checklist: bool, good: Path, tmp_path: Path) -> None:
    bench = Bench(good, "four", tmp_path, checklist=checklist)
    one, other = (bench.folder / f"consolidated.{number:02}.pth" for number in (1, 2))
    one.rename(tmp_path / "aside")
    other.rename(one)
    (tmp_path / "aside").rename(other)
    code, said = bench.run()
    assert code == 2
    assert ("swapped" in said) or ("MD5" in said)


def test_shards_of_different_models_are_found(good: Path, tmp_path: Path) -> None:
    bench = Bench(good, "four", tmp_path, checklist=False)
    strange = reference.weights(LLAMA_1, torch.float16, seed=1)
    other = reference.save(tmp_path / "strange", LLAMA_1, strange, 4)
    shutil.copy(other / "consolidated.02.pth", bench.folder / "consolidated.02.pth")
    code, said = bench.run()
    assert code == 2
    assert "differs between the shards" in said


@pytest.mark.parametrize(
    "change",
    [
        {"dim": 128},
        {"dim": 32},
        {"n_layers": 1},
        {"n_layers": 3},
        {"n_heads": 8},
        {"n_heads": 2},
        {"n_heads": 3},
        {"n_kv_heads": 2},
        {"multiple_of": 512},
        {"ffn_dim_multiplier": 2.0},
        {"vocab_size": 1000},
        {"dim": -64},
        {"dim": 64.5},
        {"dim": None},
        {"dim": 10**30},
        {"n_heads": True},
        {"norm_eps": "1e-6"},
        {"quantization_args": {"scheme": "int8"}},
        {"vision_chunk_size": 448},
        {"moe": {"experts": 8}},
        {"surprise": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["one", "four"])
def test_wrong_params_are_refused(
    name: str, change: dict[str, object], good: Path, tmp_path: Path
) -> None:
    bench = Bench(good, name, tmp_path, checklist=False)
    path = bench.folder / "params.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    code, said = bench.run()
    assert code == 2, said


@pytest.mark.parametrize(
    "change", [{"n_heads": 16}, {"n_kv_heads": 8}, {"norm_eps": 1e-3}, {"rope_theta": 500000.0}]
)
def test_params_that_contradict_the_publication_are_refused(
    change: dict[str, object], tmp_path: Path
) -> None:
    from alpaca.convert.params import read_params, recognize

    path = tmp_path / "params.json"
    right = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-6}
    path.write_text(json.dumps(right))
    assert recognize(read_params(path), "sentencepiece", "7B")[1] is not None
    path.write_text(json.dumps(right | change))
    with pytest.raises(UserError, match="LLaMA 1 7B"):
        recognize(read_params(path), "sentencepiece", "7B")


class Evil:
    """Pickles as a call of os.system."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("where", ["pth", "bin"])
def test_checkpoint_that_wants_to_run_code_is_refused_by_name(
    where: str, good: Path, tmp_path: Path
) -> None:
    mark = tmp_path / "it-ran"
    payload = {"layers.0.attention.wq.weight": Evil(f"touch {mark}")}
    if where == "pth":
        bench = Bench(good, "one", tmp_path, checklist=False)
        torch.save(payload, bench.folder / "consolidated.00.pth")
        size = (good / "one" / "7B" / "consolidated.00.pth").stat().st_size
        payload |= {"padding": torch.zeros(size)}
        torch.save(payload, bench.folder / "consolidated.00.pth")
    else:
        bench = Bench(good, "one", tmp_path, checklist=False)
        shutil.rmtree(bench.folder)
        shutil.copytree(bench.right, bench.folder)
        (bench.folder / "model.safetensors").unlink()
        torch.save(payload, bench.folder / "pytorch_model.bin")
    code, said = bench.run()
    assert code == 2
    assert "refused" in said
    assert "system" in said
    assert not mark.exists()


@pytest.mark.parametrize("what", ["file", "folder", "tokenizer"])
def test_links_that_leave_the_folder_are_refused(what: str, good: Path, tmp_path: Path) -> None:
    bench = Bench(good, "one", tmp_path, checklist=False)
    path = {
        "file": bench.folder / "consolidated.00.pth",
        "folder": bench.folder,
        "tokenizer": bench.folder / "tokenizer.model",
    }[what]
    path.rename(tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    code, said = bench.run()
    assert code == 2
    assert "points outside" in said


@pytest.mark.parametrize("line", ["zz", f"{'0' * 32}  ../../etc/passwd", f"{'0' * 32}  "])
def test_damaged_checklist_is_refused(line: str, good: Path, tmp_path: Path) -> None:
    bench = Bench(good, "one", tmp_path, checklist=True)
    (bench.folder / "checklist.chk").write_text(line + "\n")
    code, said = bench.run()
    assert code == 2
    assert "checklist.chk, line 1" in said


def test_tokenizer_checklist_beside_the_models_is_used(good: Path, tmp_path: Path) -> None:
    bench = Bench(good, "one", tmp_path, checklist=False)
    shared = bench.input / "tokenizer.model"
    (bench.folder / "tokenizer.model").rename(shared)
    digest = hashlib.md5(shared.read_bytes()).hexdigest()
    checklist = bench.input / "tokenizer_checklist.chk"
    checklist.write_text(f"{digest}  tokenizer.model\n")
    assert bench.run()[0] == 0
    shutil.rmtree(bench.output)
    checklist.write_text(f"{'0' * 32}  tokenizer.model\n")
    code, said = bench.run()
    assert code == 2
    assert "tokenizer.model is damaged: its MD5" in said


def damage_anywhere(good: Path, tmp_path: Path, trials: int) -> None:
    """Bytes lost, changed and put in, mostly where the formats keep their tables."""
    dice = random.Random(trials)
    for name in ("one", "three"):
        bench = Bench(good, name, tmp_path / name, checklist=False)
        for path in sorted(bench.folder.iterdir()):
            whole = path.read_bytes()
            edge = min(4000, len(whole))
            for _ in range(trials):
                place = dice.choice(
                    [
                        dice.randrange(len(whole)),
                        dice.randrange(edge),
                        len(whole) - 1 - dice.randrange(edge),
                    ]
                )
                junk = dice.randbytes(dice.randrange(20))
                path.write_bytes(whole[:place] + junk + whole[place + dice.randrange(20) :])
                code, said = convert("--input_dir", bench.input, "--output_dir", bench.output)
                assert code in (0, 2), said
                assert (bench.output / NAME).exists() == (code == 0)
                shutil.rmtree(bench.output, ignore_errors=True)
            path.write_bytes(whole)


def test_random_damage_is_explained_and_never_a_traceback(good: Path, tmp_path: Path) -> None:
    damage_anywhere(good, tmp_path, 5)


@pytest.mark.slow
def test_much_random_damage_is_explained(good: Path, tmp_path: Path) -> None:
    damage_anywhere(good, tmp_path, 300)
