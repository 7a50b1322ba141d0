"""Checkpoints are complete or absent, those that are deleted too."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

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
