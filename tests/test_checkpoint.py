"""Checkpoints are complete or absent, those that are deleted too."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

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
        checkpoint.save(tmp_path, step, module, optimizer, {"run": {}}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    (tmp_path / ".checkpoint-1.old" / "a").mkdir(parents=True)
    (tmp_path / ".checkpoint-3.partial").mkdir()
    checkpoint.save(tmp_path, 3, module, optimizer, {"run": {}}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]


def saved(folder: Path, steps: int = 1) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Checkpoints of a small model in `folder`."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 4))
    optimizer = torch.optim.AdamW(module.parameters())
    for step in range(1, steps + 1):
        module(torch.ones(1, 64)).sum().backward()
        optimizer.step()
        checkpoint.save(folder, step, module, optimizer, {"run": {"seed": 1}}, keep=steps)
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
