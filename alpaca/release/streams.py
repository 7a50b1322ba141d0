"""Pieces of large files: hashed and worked on in threads, in order, a few at a time."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Digest:
    """A SHA-256 that a thread of its own computes while its pieces are used."""

    def __init__(self) -> None:
        """Start empty."""
        self._hash = hashlib.sha256()
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._last: Future[None] | None = None

    def update(self, piece: bytes | memoryview) -> None:
        """Add a piece, which must not change; waits until the one before it is hashed."""
        before, self._last = self._last, self._thread.submit(self._hash.update, piece)
        if before is not None:
            before.result()

    def hexdigest(self) -> str:
        """The digest of all pieces; ends the thread."""
        self._thread.shutdown()
        return self._hash.hexdigest()


def in_order(
    pool: ThreadPoolExecutor, work: Callable[[T], R], items: Iterable[T], ahead: int = 4
) -> Iterator[R]:
    """What `work` returns for each item, in order; at most `ahead` are in memory."""
    waiting: deque[Future[R]] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
