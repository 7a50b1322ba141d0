"""Ranks that start again agree on a fresh part of a store that earlier attempts have used."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from alpaca.training.rendezvous import lost_rank, meet


@pytest.fixture
def store() -> dist.Store:
    return dist.HashStore()


def attempt(store: dist.Store, ranks: int) -> list[dist.Store]:
    """All ranks meet, the last one first."""
    with ThreadPoolExecutor(ranks) as pool:
        jobs = [pool.submit(meet, store, rank, ranks) for rank in reversed(range(ranks))]
        return [job.result() for job in reversed(jobs)]


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_ranks_share_what_they_write_and_see_nothing_of_earlier_attempts(
    store: dist.Store, ranks: int
) -> None:
    for number in range(3):
        corners = attempt(store, ranks)
        assert not corners[0].check(["address"])
        corners[0].set("address", f"attempt {number}")
        for corner in corners:
            assert corner.get("address") == f"attempt {number}".encode()


def test_ranks_that_died_on_the_way_are_not_counted(store: dist.Store) -> None:
    store.set("here/1", "a rank that was killed while it waited")
    corners = attempt(store, 3)
    corners[2].set("address", "here")
    assert corners[0].get("address") == b"here"


def test_a_lost_rank_is_told_from_other_errors() -> None:
    hung = lost_rank(RuntimeError("[a.cc:1] Timed out waiting 5000ms for recv operation"))
    ended = lost_rank(RuntimeError("[a.cc:2] Connection closed by peer [127.0.0.1]:1"))
    assert "has not answered within --ddp_timeout" in str(hung)
    assert "Another rank has ended" in str(ended)
    assert lost_rank(RuntimeError("size mismatch")) is None


def test_rank_0_says_how_many_did_not_come(store: dist.Store) -> None:
    with pytest.raises(TimeoutError, match="2 of 3 ranks did not join"):
        meet(store, 0, 3, timeout=0.1)
