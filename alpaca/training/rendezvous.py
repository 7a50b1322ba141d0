"""Ranks find each other again after a restart.

torchrun keeps one key-value store over all restarts of a job, so a rank that starts again finds
the addresses that dead ranks left, and connects to them (pytorch issue 135712). A count of restarts
does not help: a torchrun that was itself started again counts anew. So ranks first agree on a part
of the store that nobody has used: each says its name of the moment, rank 0 answers whom it reads.
"""

import time
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from alpaca.errors import UserError

TIMEOUT_SECONDS = 600.0
T = TypeVar("T")


def on_first_rank(body: Callable[[], T]) -> T:
    """What `body` returns on rank 0, on every rank, while the others wait.

    Raises:
        UserError, OSError: on every rank, where `body` does on rank 0.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = body()
        except (UserError, OSError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def meet(store: Store, rank: int, world_size: int, timeout: float = TIMEOUT_SECONDS) -> Store:
    """A part of `store` that belongs to this attempt of the job alone; every rank calls this.

    Raises:
        TimeoutError: on rank 0, when some ranks do not come; the message counts them.
        DistStoreError: on the others, when rank 0 does not.
    """
    name = uuid.uuid4().hex
    if rank:
        store.set(f"here/{rank}", name)
        attempt = store.get(f"answer/{name}").decode()  # waits for it
        store.add(f"joined/{attempt}", 1)
    else:
        attempt = name
        _answer(store, attempt, world_size, time.monotonic() + timeout)
    return PrefixStore(attempt, store)


def _answer(store: Store, attempt: str, world_size: int, deadline: float) -> None:
    """Tell every name that is or comes up which attempt this is, until all have joined."""
    answered: dict[int, bytes] = {}
    while (joined := store.add(f"joined/{attempt}", 0)) < world_size - 1:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{world_size - 1 - joined} of {world_size} ranks did not come.")
        for rank in range(1, world_size):
            if not store.check([f"here/{rank}"]):
                continue
            name = store.get(f"here/{rank}")
            if answered.get(rank) != name:  # a dead rank's name is answered too, to no effect
                store.set(f"answer/{name.decode()}", attempt)
                answered[rank] = name
        time.sleep(0.02)
