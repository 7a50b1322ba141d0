"""Checkpoints are complete or absent, those that are deleted too."""

import json
import random
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict

from alpaca.errors import UserError
from alpaca.training import checkpoint


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_save_clears_what_was_half_written_or_half_deleted(tmp_path: Path) -> None:
    module = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    for step in (1, 2):
        checkpoint.write(
            tmp_path, step, checkpoint.state_of(module, optimizer), {"run": {}}, keep=1
        )
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    (tmp_path / ".checkpoint-1.old" / "a").mkdir(parents=True)
    (tmp_path / ".checkpoint-3.partial").mkdir()
    checkpoint.write(tmp_path, 3, checkpoint.state_of(module, optimizer), {"run": {}}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]


def saved(folder: Path, steps: int = 1) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Checkpoints of a small model in `folder`."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 4))
    optimizer = torch.optim.AdamW(module.parameters())
    for step in range(1, steps + 1):
        module(torch.ones(1, 64)).sum().backward()
        optimizer.step()
        checkpoint.write(
            folder, step, checkpoint.state_of(module, optimizer), {"run": {"seed": 1}}, keep=steps
        )
    return module, optimizer


def test_every_flipped_byte_and_every_cut_is_found_before_anything_is_loaded(
    tmp_path: Path,
) -> None:
    module, optimizer = saved(tmp_path)
    before = [parameter.clone() for parameter in module.parameters()]
    folder = tmp_path / "checkpoint-1"
    files = sorted(folder.iterdir())
    assert len(files) >= 3  # shards, their index, and our own record
    choose = random.Random(0)
    for index in range(70):
        path = files[index % len(files)]
        content = path.read_bytes()
        place = choose.randrange(len(content))
        inverted = bytes([content[place] ^ 0xFF])
        path.write_bytes(
            content[:place] if index >= 50 else content[:place] + inverted + content[place + 1 :]
        )
        with pytest.raises(UserError, match=f"checkpoint-1 was damaged.*{path.name} differs"):
            checkpoint.load(folder, module, optimizer)
        path.write_bytes(content)
    assert all(map(torch.equal, before, module.parameters()))
    assert checkpoint.load(folder, module, optimizer)["step"] == 1


def test_a_damaged_checkpoint_names_the_one_before_it(tmp_path: Path) -> None:
    module, optimizer = saved(tmp_path, steps=2)
    next((tmp_path / "checkpoint-2").glob("*.distcp")).unlink()
    with pytest.raises(UserError, match=r"\.distcp is missing") as caught:
        checkpoint.load(tmp_path / "checkpoint-2", module, optimizer)
    assert "resumes from checkpoint-1" in caught.value.remedy
    next((tmp_path / "checkpoint-1").glob("*.distcp")).write_bytes(b"")
    shutil.rmtree(tmp_path / "checkpoint-2")
    with pytest.raises(UserError, match=r"\.distcp differs") as caught:
        checkpoint.load(tmp_path / "checkpoint-1", module, optimizer)
    assert "starts from the base model" in caught.value.remedy


def test_a_checkpoint_of_an_earlier_version_has_no_hashes_and_is_loaded(tmp_path: Path) -> None:
    module, optimizer = saved(tmp_path)
    record = tmp_path / "checkpoint-1" / checkpoint.META
    kept = {"run": {"seed": 1}, "step": 1}
    record.write_text(json.dumps(kept))
    assert checkpoint.load(tmp_path / "checkpoint-1", module, optimizer) == kept


def test_a_folder_of_another_program_with_a_checkpoints_name_is_kept(tmp_path: Path) -> None:
    module, optimizer = module_and_optimizer()
    other = tmp_path / "checkpoint-1"
    other.mkdir()
    (other / "precious").touch()
    with pytest.raises(UserError, match="is not a checkpoint of this program"):
        checkpoint.write(tmp_path, 1, checkpoint.state_of(module, optimizer), {"run": {}}, keep=1)
    checkpoint.clear(tmp_path)
    assert (other / "precious").exists()


def module_and_optimizer() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    module = torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(module.parameters())
    train(module, optimizer)
    return module, optimizer


def train(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    module(torch.ones(1, 8)).sum().backward()
    optimizer.step()


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the checkpoint holds what there was when it was asked for; the next one waits for it."""
    gate, write = threading.Event(), checkpoint.write

    def slow(*arguments: Any, **named: Any) -> None:
        gate.wait()
        write(*arguments, **named)

    monkeypatch.setattr(checkpoint, "write", slow)
    module, optimizer = module_and_optimizer()
    with checkpoint.Saver(tmp_path, keep=2) as saver:
        before = [parameter.clone() for parameter in module.parameters()]
        saver.save(1, module, optimizer, {"run": {}})
        train(module, optimizer)
        assert not any(map(torch.equal, before, module.parameters()))
        assert checkpoint.found(tmp_path) == []
        gate.set()
        saver.save(2, module, optimizer, {"run": {}})
        assert checkpoint.found(tmp_path)[0].name == "checkpoint-1"
    assert [path.name for path in checkpoint.found(tmp_path)] == ["checkpoint-1", "checkpoint-2"]
    checkpoint.load(tmp_path / "checkpoint-1", module, optimizer)
    assert all(map(torch.equal, before, module.parameters()))


def test_a_checkpoint_that_cannot_be_written_is_told_at_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise UserError("no space")

    monkeypatch.setattr(checkpoint, "write", fails)
    module, optimizer = module_and_optimizer()
    with checkpoint.Saver(tmp_path, keep=1) as saver:
        saver.save(1, module, optimizer, {"run": {}})
        while not saver.failed:
            time.sleep(0.01)
        with pytest.raises(UserError, match="no space"):
            saver.wait()
        assert not saver.failed


@pytest.mark.parametrize(
    ("copies", "room", "wait"),
    [(False, 1 << 40, False), (True, 1000, False), (True, 1 << 40, True)],
)
def test_nothing_is_copied_where_it_must_not_be(
    copies: bool, room: int, wait: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alpaca.ram.available", lambda: room)
    module, optimizer = module_and_optimizer()
    with checkpoint.Saver(tmp_path, keep=1, copies=copies) as saver:
        saver.save(1, module, optimizer, {"run": {}}, wait=wait)
        assert saver._thread is None
        assert len(checkpoint.found(tmp_path)) == 1


class Tied(torch.nn.Module):
    """Its output matrix is its embedding, as SmolLM's and Qwen's small models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(16, 8)
        self.head = torch.nn.Linear(8, 16, bias=False)
        self.head.weight = self.embedding.weight


def test_a_tied_weight_is_stored_once_and_comes_back_under_both_names(tmp_path: Path) -> None:
    module = Tied()
    optimizer = torch.optim.AdamW(module.parameters())
    module.head(module.embedding(torch.arange(3))).sum().backward()
    optimizer.step()
    kept = module.head.weight.detach().clone()
    state = checkpoint.state_of(module, optimizer)
    assert list(state["model"]) == ["embedding.weight"]
    checkpoint.write(tmp_path, 1, state, {"run": {}}, keep=1)
    other = Tied()
    again = torch.optim.AdamW(other.parameters())
    checkpoint.load(tmp_path / "checkpoint-1", other, again)
    assert other.head.weight is other.embedding.weight
    assert other.head.weight.equal(kept)
    moments = [one["exp_avg"] for one in again.state.values()]
    assert [moment.abs().sum() > 0 for moment in moments] == [True]


def test_a_checkpoint_that_holds_a_tied_weight_twice_is_loaded(tmp_path: Path) -> None:
    """Earlier versions wrote such."""
    module = Tied()
    optimizer = torch.optim.AdamW(module.parameters())
    model, optim = get_state_dict(module, optimizer)
    assert len(model) == 2
    state = {"model": model, "optimizer": optim}
    checkpoint.write(tmp_path, 1, state, {"run": {}}, keep=1)
    other = Tied()
    checkpoint.load(tmp_path / "checkpoint-1", other, torch.optim.AdamW(other.parameters()))
    assert other.embedding.weight.equal(module.embedding.weight)


def test_the_best_checkpoint_outlives_the_rotation_until_there_is_a_better_one(
    tmp_path: Path,
) -> None:
    module, optimizer = module_and_optimizer()
    kept = []
    for step, best in ((1, 1), (2, 1), (3, 1), (4, 4), (5, 4)):
        state = checkpoint.state_of(module, optimizer)
        checkpoint.write(tmp_path, step, state, {"run": {}}, keep=1, best=best)
        kept.append([checkpoint.step_of(path) for path in checkpoint.found(tmp_path)])
    assert kept == [[1], [1, 2], [1, 3], [4], [4, 5]]


def test_only_the_weights_of_a_checkpoint_are_loaded(tmp_path: Path) -> None:
    module, optimizer = module_and_optimizer()
    checkpoint.write(tmp_path, 1, checkpoint.state_of(module, optimizer), {"run": {}}, keep=1)
    wanted = [parameter.detach().clone() for parameter in module.parameters()]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    checkpoint.load_weights(tmp_path / "checkpoint-1", module)
    assert all(one.equal(other) for one, other in zip(module.parameters(), wanted, strict=True))
