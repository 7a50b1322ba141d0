"""Rendezvous of the ranks, also after a restart.

torchrun keeps one key-value store over all restarts of a job. A restarted rank finds the addresses
that dead ranks left there and connects to them (pytorch issue 135712). Counting restarts does not
help: a torchrun that is itself restarted counts from 0 again. So ranks first agree on an unused
part of the store: each publishes a new random name, and rank 0 answers every name that it reads.
"""

import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from alpaca.errors import UserError

TIMEOUT_SECONDS = 600.0
# What one rank does alone, hashing 140 GB from a slow disk above all, may take long.
PATIENCE = timedelta(hours=6)
_patient: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()
T = TypeVar("T")


def add_patient_group() -> None:
    """Let `on_first_rank` and `on_every_rank` wait in a group of their own; a collective call.

    `--ddp_timeout` ends a run whose ranks hang in a step, and must not end one in which a rank
    reads a slow disk.
    """
    assert dist.group.WORLD is not None
    _patient[dist.group.WORLD] = dist.new_group(backend="gloo", timeout=PATIENCE)


def _group(given: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    assert dist.group.WORLD is not None
    return given or _patient.get(dist.group.WORLD)


def lost_rank(error: BaseException) -> UserError | None:
    """The error for a user where gloo has lost another rank; None for any other error."""
    if "Timed out waiting" in str(error):
        return UserError(
            "Another rank has not answered within --ddp_timeout.",
            "Look for a hung machine or disk, then run the same command again: a run resumes from "
            "its last checkpoint.",
        )
    if "Connection closed by peer" in str(error):
        return UserError("Another rank has ended; its own message says why.")
    return None


def on_first_rank(body: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run `body` on rank 0 while the others wait; returns its result on every rank.

    `group` holds the same ranks, for a thread whose collective calls may not mix with others.

    Raises:
        UserError, OSError: on every rank, where `body` raises it on rank 0.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = body()
        except (UserError, OSError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, group=_group(group))
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def on_every_rank(body: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Run `body` on every rank; returns the results of all, in order of rank, on each.

    `group` is as for `on_first_rank`.

    Raises:
        UserError, OSError: on every rank, where `body` raises it on one of them.
    """
    mine: Any
    try:
        mine = body(), None
    except (UserError, OSError) as error:
        mine = None, error
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, mine, group=_group(group))
    for _, failure in outcomes:
        if failure is not None:
            raise failure
    return [result for result, _ in outcomes]


def meet(store: Store, rank: int, world_size: int, timeout: float = TIMEOUT_SECONDS) -> Store:
    """A part of `store` that only this attempt of the job uses; every rank calls this.

    Raises:
        TimeoutError: on rank 0, when ranks do not join; the message gives their number.
        DistStoreError: on the others, when rank 0 does not answer.
    """
    name = uuid.uuid4().hex
    if rank:
        store.set(f"here/{rank}", name)
        attempt = store.get(f"answer/{name}").decode()  # blocks until rank 0 answers
        store.add(f"joined/{attempt}", 1)
    else:
        attempt = name
        _answer(store, attempt, world_size, time.monotonic() + timeout)
    return PrefixStore(attempt, store)


def _answer(store: Store, attempt: str, world_size: int, deadline: float) -> None:
    """Answer every published name with this attempt's name, until all ranks have joined."""
    answered: dict[int, bytes] = {}
    while (joined := store.add(f"joined/{attempt}", 0)) < world_size - 1:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{world_size - 1 - joined} of {world_size} ranks did not join.")
        for rank in range(1, world_size):
            if not store.check([f"here/{rank}"]):
                continue
            name = store.get(f"here/{rank}")
            if answered.get(rank) != name:  # answering a dead rank's name has no effect
                store.set(f"answer/{name.decode()}", attempt)
                answered[rank] = name
        time.sleep(0.02)
