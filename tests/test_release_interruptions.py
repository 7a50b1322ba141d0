"""Exports and diffs are complete or absent: killed at any moment, or on a disk that fills up."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from model_folders import copied, save, tensors
from small_disks import leave, small_disk

from alpaca import card, model, passport
from alpaca.cli import main
from alpaca.convert import conversion, huggingface
from alpaca.release import command, diff, diffcommand, gguf, ollama

IMPORTED = (card, model, conversion, huggingface, command, diff, diffcommand, gguf, ollama)

FORMS = ("gguf", "ollama", "tar", "fp16", "make", "apply")


@pytest.fixture(scope="module")
def folders(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A base, a tuned folder and the diff between them."""
    root = tmp_path_factory.mktemp("release")
    base, tuned = copied(tiny_model, root / "base"), copied(tiny_model, root / "tuned")
    held = {name: value.bfloat16() for name, value in tensors(base).items()}
    save(base, held)
    noise = torch.Generator().manual_seed(0)
    save(
        tuned,
        {
            name: value + 0.01 * torch.randn(value.shape, generator=noise).bfloat16()
            for name, value in held.items()
        },
    )
    for folder in (base, tuned):
        passport.write(folder, made_by="train")
    assert code_of(["diff", "make", str(tuned), str(base), "-o", str(root / "d")]) == 0
    return base, tuned, root / "d"


def words(form: str, folders: tuple[Path, Path, Path], output: Path) -> list[str]:
    """The command that writes `output`."""
    base, tuned, diff = map(str, folders)
    if form == "make":
        return ["diff", "make", tuned, base, "-o", str(output)]
    if form == "apply":
        return ["diff", "apply", base, diff, "-o", str(output)]
    return ["export", tuned, "--to", form, "-o", str(output)]


def code_of(given: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        main(given)
    assert isinstance(ended.value.code, int)
    return ended.value.code


def content(output: Path) -> dict[str, bytes]:
    """Every file's bytes, but for what names the folder or the moment."""
    files = [output] if output.is_file() else [path for path in output.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(output)): path.read_bytes()
        for path in files
        if path.name not in ("passport.json", "README.md")
    }


def forked(work: Callable[[], int]) -> int:
    """The process id of a child that does the work and exits with its code."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            code = work()
        finally:
            os._exit(code)
    return pid


def killed(form: str, folders: tuple[Path, Path, Path], scratch: Path, times: int) -> int:
    """Kill the command at random moments; returns how often it was still at work.

    In a process of its own, which has imported everything and computed nothing: torch's threads do
    not survive a fork.
    """
    arguments = [form, *map(str, folders), str(scratch), str(times)]
    done = subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return int(done.stdout)


def killer(form: str, folders: tuple[Path, Path, Path], scratch: Path, times: int) -> int:
    """What `killed` runs."""
    right, output = scratch / "right" / "out", scratch / "again" / "out"
    right.parent.mkdir()
    output.parent.mkdir()
    assert os.waitpid(forked(lambda: code_of(words(form, folders, right))), 0)[1] == 0
    began = time.monotonic()
    assert os.waitpid(forked(lambda: code_of(words(form, folders, output))), 0)[1] == 0
    whole = time.monotonic() - began
    chance, met = random.Random(form), 0
    for _ in range(times):
        if output.exists():
            shutil.rmtree(output) if output.is_dir() else output.unlink()
        pid = forked(lambda: code_of(words(form, folders, output)))
        time.sleep(chance.uniform(0, whole))
        os.kill(pid, signal.SIGKILL)
        met += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        assert not output.exists() or content(output) == content(right)
    assert (
        os.waitpid(forked(lambda: code_of([*words(form, folders, output), "--force"])), 0)[1] == 0
    )
    assert content(output) == content(right)
    assert os.listdir(output.parent) == ["out"]
    return met


@pytest.mark.parametrize("form", FORMS)
def test_killed_three_times(form: str, folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    assert killed(form, folders, tmp_path, 3) > 0


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_killed_twenty_times(form: str, folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    assert killed(form, folders, tmp_path, 20) > 5


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 100) as disk:
        yield disk


@pytest.mark.parametrize("form", FORMS)
def test_a_full_disk_is_said_and_nothing_stays(
    form: str,
    folders: tuple[Path, Path, Path],
    disk: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for room in (0, 20_000, 200_000):
        leave(disk, room)
        assert code_of(words(form, folders, disk / "out")) == 2
        told = capsys.readouterr().err
        assert "Free some space and run the same" in told or "Free some disk space" in told
        assert not (disk / "out").exists()
        (disk / "ballast").unlink()
    assert code_of(words(form, folders, disk / "out")) == 0
    assert os.listdir(disk) == ["out"]


if __name__ == "__main__":
    form, base, tuned, diff_file, scratch, times = sys.argv[1:]
    print(killer(form, (Path(base), Path(tuned), Path(diff_file)), Path(scratch), int(times)))
