"""Whatever happens to the files or the program: never a folder that looks complete and is wrong."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import reference
import torch
from reference import LLAMA_1, LLAMA_3, convert
from safetensors.torch import load_file

from alpaca.convert.conversion import Layout
from alpaca.convert.conversion import convert as write_folder
from alpaca.convert.find import open_source
from alpaca.convert.source import Source
from alpaca.errors import UserError

NAME = "llama-7b"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole checkpoints, with checklists, and what they convert to."""
    root = tmp_path_factory.mktemp("good")
    for name, shape, shards in (("one", LLAMA_1, 1), ("four", LLAMA_1, 4), ("three", LLAMA_3, 2)):
        held = reference.weights(shape, torch.float16)
        add_checklist(reference.save(root / name / "7B", shape, held, shards))
        code, said = convert("--input_dir", root / name, "--output_dir", root / f"{name}-out")
        assert code == 0, said
    return root


def add_checklist(folder: Path) -> None:
    """checklist.chk as `md5sum` writes it."""
    lines = [
        f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.name}\n"
        for path in sorted(folder.iterdir())
    ]
    (folder / "checklist.chk").write_text("".join(lines))


class Bench:
    """A copy of a whole checkpoint, to be damaged, and the right answer."""

    def __init__(self, good: Path, name: str, root: Path, *, checklist: bool) -> None:
        self.right = good / f"{name}-out" / NAME
        self.input, self.output = root / "in", root / "out"
        self.folder = self.input / "7B"
        shutil.copytree(good / name, self.input)
        if not checklist:
            (self.folder / "checklist.chk").unlink()

    def run(self, *options: object) -> tuple[int, str]:
        """Convert; whatever the exit code, what lies there afterwards must be right or absent."""
        code, said = convert("--input_dir", self.input, "--output_dir", self.output, *options)
        final = self.output / NAME
        assert code in (0, 2), said
        assert "Traceback" not in said
        assert final.exists() == (code == 0), said
        if code == 0:
            assert same(final, self.right), said
        return code, said


def same(one: Path, other: Path) -> bool:
    """Equal weights and equal files around them."""
    files = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    return (
        set(mine) == set(theirs)
        and all(torch.equal(mine[name], theirs[name]) for name in mine)
        and all((one / file).read_bytes() == (other / file).read_bytes() for file in files)
    )


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
    assert "leads out of" in said


@pytest.mark.parametrize("line", ["zz", f"{'0' * 32}  ../../etc/passwd", f"{'0' * 32}  "])
def test_damaged_checklist_is_refused(line: str, good: Path, tmp_path: Path) -> None:
    bench = Bench(good, "one", tmp_path, checklist=True)
    (bench.folder / "checklist.chk").write_text(line + "\n")
    code, said = bench.run()
    assert code == 2
    assert "checklist.chk, line 1" in said


def test_finished_folder_is_kept_and_replaced_only_by_force(good: Path, tmp_path: Path) -> None:
    bench = Bench(good, "one", tmp_path, checklist=True)
    assert bench.run()[0] == 0
    before = (bench.output / NAME / "model.safetensors").stat().st_mtime_ns
    code, said = bench.run()
    assert (code, "complete already" in said) == (0, True)
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


def test_tokenizer_folder_of_someone_else_is_left_alone(good: Path, tmp_path: Path) -> None:
    bench = Bench(good, "one", tmp_path, checklist=True)
    (bench.output / "tokenizer").mkdir(parents=True)
    (bench.output / "tokenizer" / "mine.txt").write_text("mine")
    code, said = bench.run()
    assert code == 0
    assert "stays as it is" in said
    assert [path.name for path in (bench.output / "tokenizer").iterdir()] == ["mine.txt"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 70 MB, which needs root."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=70m", "tmpfs", str(disk)], capture_output=True
    )
    if done.returncode != 0:
        pytest.skip("a tmpfs cannot be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_too_small_disk_is_named_before_any_work(
    good: Path, tmp_path: Path, small_disk: Path
) -> None:
    (small_disk / "ballast").write_bytes(bytes(40 << 20))
    bench = Bench(good, "one", tmp_path, checklist=True)
    bench.output = small_disk / "out"
    code, said = bench.run()
    assert code == 2
    assert "are free" in said
    assert not list((small_disk / "out").glob(".*/*.safetensors"))


def test_full_disk_leaves_finished_shards_and_a_second_run_ends_it(
    good: Path, tmp_path: Path, small_disk: Path
) -> None:
    bench = Bench(good, "one", tmp_path, checklist=True)
    source = open_source(bench.input, bench.folder)
    layout = Layout(torch.float16, shard_bytes=100_000)
    output = small_disk / "out"
    with pytest.raises(UserError, match="is full"):
        write_folder(filling(source, small_disk / "ballast"), output, layout)
    assert not (output / NAME).exists()
    finished = {path.name for path in (output / f".{NAME}.partial").glob("*.safetensors")}
    assert finished
    (small_disk / "ballast").unlink()
    final = write_folder(source, output, layout)
    assert len(list(final.glob("*.safetensors"))) > len(finished)
    right = load_file(bench.right / "model.safetensors")
    held: dict[str, torch.Tensor] = {}
    for path in final.glob("*.safetensors"):
        held |= load_file(path)
    assert set(held) == set(right)
    assert all(torch.equal(held[name], right[name]) for name in right)


def filling(source: Source, ballast: Path) -> Source:
    """The same source; reading its tenth tensor fills the disk, as another program may."""

    def read(dtype: torch.dtype) -> torch.Tensor:
        with (
            open(ballast, "wb", buffering=0) as file,
            pytest.raises(OSError, match="No space left"),
        ):
            while file.write(bytes(4096)) == 4096:
                pass
        return source.tensors[10].read(dtype)

    tensors = list(source.tensors)
    tensors[10] = replace(tensors[10], read=read)
    return replace(source, tensors=tuple(tensors))


# Imports once, then forks: each child converts and is killed at a random moment; a second one
# ends the work. Prints how many first runs the signal met before they were done.
KILLER = """
import os, random, signal, sys, time
sys.path[:0] = [{tests!r}, {root!r}]
from reference import convert
import shutil, pathlib
inp, out = {inp!r}, pathlib.Path({out!r})
options = ["--input_dir", inp, "--output_dir", out, "--max_shard_size", "100KB"]
def fork():
    pid = os.fork()
    if pid == 0:
        code, said = convert(*options)
        if code: print(said, flush=True)
        os._exit(code)
    return pid
began = time.monotonic(); assert os.waitpid(fork(), 0)[1] == 0
whole = time.monotonic() - began
shutil.move(out / "llama-7b", out / "right")
dice, met = random.Random({seed}), 0
for trial in range({trials}):
    pid = fork(); time.sleep(dice.uniform(0, whole)); os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    met += os.WIFSIGNALED(status)
    looks_complete = (out / "llama-7b").exists()
    if not looks_complete:
        status = os.waitpid(fork(), 0)[1]
        assert status == 0, f"the second run failed: {{status}}"
    for path in (out / "right").iterdir():
        if path.name != "passport.json":
            assert (out / "llama-7b" / path.name).read_bytes() == path.read_bytes(), path.name
    assert len(list((out / "right").iterdir())) == len(list((out / "llama-7b").iterdir()))
    shutil.rmtree(out / "llama-7b")
print("met", met)
"""


def kill_and_resume(good: Path, tmp_path: Path, trials: int) -> int:
    bench = Bench(good, "four", tmp_path, checklist=True)
    program = KILLER.format(
        tests=str(Path(__file__).parent),
        root=str(Path(__file__).parent.parent),
        inp=str(bench.input),
        out=str(bench.output),
        seed=trials,
        trials=trials,
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return int(done.stdout.split("met ")[-1])


def test_killed_conversion_is_ended_by_a_second_run(good: Path, tmp_path: Path) -> None:
    assert kill_and_resume(good, tmp_path, 4) > 0


@pytest.mark.slow
def test_killed_twenty_times(good: Path, tmp_path: Path) -> None:
    assert kill_and_resume(good, tmp_path, 20) > 10


def test_finished_shards_are_not_written_again(good: Path, tmp_path: Path) -> None:
    bench = Bench(good, "one", tmp_path, checklist=True)
    source = open_source(bench.input, bench.folder)
    layout = Layout(torch.float16, shard_bytes=100_000)

    def stop(dtype: torch.dtype) -> torch.Tensor:
        raise KeyboardInterrupt

    tensors = list(source.tensors)
    tensors[-1] = replace(tensors[-1], read=stop)
    with pytest.raises(KeyboardInterrupt):
        write_folder(replace(source, tensors=tuple(tensors)), bench.output, layout)
    partial = bench.output / f".{NAME}.partial"
    journal = json.loads((bench.output / f".{NAME}.journal.json").read_text())["shards"]
    assert len(journal) == 3
    first, second, *_ = sorted(journal)
    kept = (partial / first).stat().st_ino
    damaged = bytearray((partial / second).read_bytes())
    damaged[-1] ^= 1
    (partial / second).write_bytes(damaged)
    (partial / "stray.txt").write_text("left by a crash")
    final = write_folder(source, bench.output, layout)
    assert (final / first).stat().st_ino == kept
    assert not (final / "stray.txt").exists()
    right = load_file(bench.right / "model.safetensors")
    for path in final.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert torch.equal(tensor, right[name]), name
    assert not list(bench.output.glob(".*"))


def test_second_conversion_of_the_same_model_waits_its_turn(good: Path, tmp_path: Path) -> None:
    bench = Bench(good, "one", tmp_path, checklist=True)
    source = open_source(bench.input, bench.folder)

    def meanwhile(dtype: torch.dtype) -> torch.Tensor:
        code, said = convert("--input_dir", bench.input, "--output_dir", bench.output)
        assert (code, "Another conversion" in said) == (2, True)
        return source.tensors[0].read(dtype)

    tensors = (replace(source.tensors[0], read=meanwhile), *source.tensors[1:])
    final = write_folder(replace(source, tensors=tensors), bench.output, Layout(torch.float16))
    assert same(final, bench.right)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--input_dir", "nowhere"], "no folder nowhere"),
        (["--input_dir", "."], "no model in ."),
        (["--input_dir", "two"], "Choose one with --model_size: 13B, 7B"),
        (["--input_dir", "two", "--model_size", "65B"], "no folder two/65B"),
        (["--input_dir", "two", "--model_size", "../two/7B"], "not a folder's name"),
    ],
)
def test_what_is_not_there_is_said(
    arguments: list[str], word: str, good: Path, tmp_path: Path
) -> None:
    for size in ("7B", "13B"):
        shutil.copytree(good / "one" / "7B", tmp_path / "two" / size)
    with working_in(tmp_path):
        code, said = convert(*arguments)
    assert code == 2
    assert word in said


def working_in(folder: Path) -> "WorkingIn":
    return WorkingIn(folder)


class WorkingIn:
    def __init__(self, folder: Path) -> None:
        self.folder, self.before = folder, Path.cwd()

    def __enter__(self) -> None:
        os.chdir(self.folder)

    def __exit__(self, *_: object) -> None:
        os.chdir(self.before)


def test_what_was_found_is_said_before_the_work(good: Path, tmp_path: Path) -> None:
    bench = Bench(good, "four", tmp_path, checklist=True)
    _, said = bench.run()
    parameters = sum(t.numel() for t in load_file(bench.right / "model.safetensors").values())
    assert f"4 shards, {parameters:,} parameters, fp16, tokenizer 512 pieces" in said
