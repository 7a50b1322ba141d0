"""Whatever happens to the program or the disk: the next run ends the work, and rightly."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import small_disks
import torch
from damage import NAME, Bench, make_good, same
from reference import convert
from safetensors.torch import load_file

from alpaca.convert.conversion import Layout
from alpaca.convert.conversion import convert as write_folder
from alpaca.convert.find import open_source
from alpaca.convert.source import Source
from alpaca.errors import UserError


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_good(tmp_path_factory.mktemp("good"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with small_disks.small_disk(tmp_path / "disk", 70) as disk:
        yield disk


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
        free = shutil.disk_usage(ballast.parent).free
        ballast.write_bytes(bytes(free - 4096))
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
from alpaca.convert import command
from transformers import LlamaForCausalLM
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
def seconds():
    shutil.rmtree(out, ignore_errors=True)
    began = time.monotonic(); assert os.waitpid(fork(), 0)[1] == 0
    return time.monotonic() - began
whole = min(seconds() for _ in range(3))
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
    assert kill_and_resume(good, tmp_path, 3) > 0


@pytest.mark.slow
def test_killed_twenty_times(good: Path, tmp_path: Path) -> None:
    assert kill_and_resume(good, tmp_path, 20) > 5


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
    manifest = json.loads((bench.output / f".{NAME}.journal.json").read_text())["shards"]
    assert len(manifest) == 3
    first, second, *_ = sorted(manifest)
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


def test_disk_that_loses_what_was_written_is_caught_by_reading_back(
    good: Path, tmp_path: Path
) -> None:
    bench = Bench(good, "one", tmp_path, checklist=True)
    source = open_source(bench.input, bench.folder)
    layout = Layout(torch.float16, shard_bytes=100_000)

    def fault(dtype: torch.dtype) -> torch.Tensor:
        shard = bench.output / f".{NAME}.partial" / "model-00001-of-00004.safetensors"
        content = bytearray(shard.read_bytes())
        content[-5] ^= 4
        shard.write_bytes(content)
        return source.tensors[-1].read(dtype)

    tensors = (*source.tensors[:-1], replace(source.tensors[-1], read=fault))
    with pytest.raises(UserError, match="reads back differently"):
        write_folder(replace(source, tensors=tensors), bench.output, layout)
    assert not (bench.output / NAME).exists()
    assert write_folder(source, bench.output, layout).is_dir()


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
