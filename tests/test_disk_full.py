"""A disk that fills up while a checkpoint is written: a clear end, and nothing lost."""

import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from nodes import Job, end_all, losses, start, torchrun, wait_until
from small_disks import leave, small_disk

from alpaca.errors import UserError
from alpaca.folder import load_tokenizer
from alpaca.model import load_model
from alpaca.tokens import Codec
from alpaca.training import checkpoint, export

STEPS = 20
ROOM = 1_000_000  # left on the disk: enough for the log, too little for a checkpoint


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 40) as disk:
        yield disk
        end_all()


def fill(disk: Path, job: Job, room: int = ROOM) -> None:
    """Another program takes the disk's space, but for `room`, while the job stands still."""
    family = [psutil.Process(job.process.pid), *job.ranks()]
    for process in family:
        process.send_signal(signal.SIGSTOP)
    leave(disk, room)
    for process in family:
        process.send_signal(signal.SIGCONT)


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_a_checkpoint_that_finds_no_room_leaves_the_one_before(disk: Path) -> None:
    out = disk / "out"
    module = torch.nn.Linear(1000, 1000)  # 4 MB, 12 with its moments
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 1000)).sum().backward()
    optimizer.step()
    checkpoint.write(out, 1, checkpoint.state_of(module, optimizer), {"run": {}}, keep=2)
    leave(disk, ROOM)
    with pytest.raises(UserError, match="checkpoint-2 could not be written"):
        checkpoint.write(out, 2, checkpoint.state_of(module, optimizer), {"run": {}}, keep=2)
    assert [path.name for path in out.iterdir()] == ["checkpoint-1"]
    assert checkpoint.load(out / "checkpoint-1", module, optimizer)["step"] == 1


@pytest.mark.usefixtures("alone")
def test_an_export_that_finds_no_room_leaves_nothing(tiny_model: Path, disk: Path) -> None:
    model, codec = load_model(tiny_model, torch.float32), Codec(load_tokenizer(tiny_model))
    out, rounded = disk / "out", export.Rounding(torch.bfloat16)
    export.rehearse(model, codec, out, rounded)
    leave(disk, 100_000)
    for write in (export.rehearse, partial(export.export, facts=lambda _: {})):
        with pytest.raises(OSError, match="No space left"):
            write(model, codec, out, rounded)
        assert not list(out.iterdir())
    assert psutil.disk_usage(str(disk)).free >= 90_000


@pytest.mark.slow
def test_a_disk_too_full_for_the_log_ends_the_run_and_it_goes_on(
    tiny_model: Path, disk: Path, tmp_path: Path
) -> None:
    out = disk / "out"
    flags = {
        "model_name_or_path": tiny_model,
        "output_dir": out,
        "max_steps": 60,
        "save_steps": 20,
        "gradient_accumulation_steps": 1,
        "learning_rate": 0.01,
        "save_total_limit": 2,
    }
    words = [*torchrun()[:1], "train.py", *(f"--{name}={value}" for name, value in flags.items())]
    job = start(words, tmp_path / "first")
    wait_until(lambda: len(checkpoint.found(out)) == 1, job)
    fill(disk, job, 0)
    assert job.process.wait(timeout=60) == 2, job.said
    assert f"The disk of {out} is full" in job.said
    assert "Traceback" not in job.said
    (disk / "ballast").unlink()
    with open(out / "log.jsonl", "a") as log:  # as a write that found room for a part only
        log.write('{"step": 39, "lo')
    start(words, tmp_path / "second").succeed()
    assert len(losses(out)) == 60


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "code"), [(1, 2), (2, 1)])
def test_a_full_disk_ends_the_run_and_it_goes_on_from_the_checkpoint_before(
    tiny_model: Path, disk: Path, tmp_path: Path, ranks: int, code: int
) -> None:
    out = disk / "out"
    launcher = torchrun("--standalone", f"--nproc_per_node={ranks}")
    flags = {
        "model_name_or_path": tiny_model,
        "output_dir": out,
        "max_steps": STEPS,
        "save_steps": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 0.01,
        "save_total_limit": 2,
    }
    words = [f"--{name}={value}" for name, value in flags.items()]
    words = [*(launcher if ranks > 1 else launcher[:1]), "train.py", *words]
    job = start(words, tmp_path / "first")
    wait_until(lambda: len(checkpoint.found(out)) == 2, job)
    fill(disk, job)
    assert job.process.wait(timeout=60) == code, job.said
    assert "could not be written" in job.said
    assert "Free some space and run the same command again" in job.said
    assert ranks > 1 or "Traceback" not in job.said  # torchrun adds one of its own
    assert checkpoint.found(out)
    assert not list(out.glob(".checkpoint-*"))
    assert psutil.disk_usage(str(disk)).free > ROOM / 2
    (disk / "ballast").unlink()
    start(words, tmp_path / "second").succeed()
    assert len(losses(out)) == STEPS
