"""Pieces of large files: read ahead, worked on, hashed and written in threads, in order."""

import ctypes
import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")
DEPTH = 3  # pieces that wait for a thread


def keep_freed_memory() -> None:
    """Keep freed memory in this process, which uses pieces of the same sizes again and again.

    Otherwise glibc returns each to the system, whose new pages then cost as much as hashing.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc's; the numbers are those of its malloc.h
        for option, value in ((-1, 1 << 30), (-3, 1 << 30), (-8, 1)):  # trim, mmap, arenas
            libc.mallopt(option, value)


class Later:
    """Calls a function in a thread of its own, in order; at most `DEPTH` calls wait.

    A context: leaving it waits for all calls, and raises the error of one that failed.
    """

    def __init__(self, body: Callable[[Any], object]) -> None:
        """`body` is called with each piece."""
        self._body = body
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._waiting: deque[Future[object]] = deque()

    def __call__(self, piece: Any) -> None:
        """Add a call; the piece must not change afterwards."""
        if len(self._waiting) >= DEPTH:
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(self._body, piece))

    def wait(self) -> None:
        """Wait for all calls; raises the first one's error."""
        while self._waiting:
            self._waiting.popleft().result()

    def __enter__(self) -> "Later":
        """Leaving ends the thread."""
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Wait, unless something else has failed."""
        try:
            if kind is None:
                self.wait()
        finally:
            self._thread.shutdown(cancel_futures=True)


class Digest:
    """A SHA-256 that a thread of its own computes while its pieces are used."""

    def __init__(self) -> None:
        """Start empty."""
        self._hash = hashlib.sha256()
        self._later = Later(self._hash.update)

    def update(self, piece: bytes | memoryview) -> None:
        """Add a piece, which must not change afterwards."""
        self._later(piece)

    def hexdigest(self) -> str:
        """The digest of all pieces; ends the thread."""
        with self._later:
            pass
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


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, the next `DEPTH` of which are made in a thread meanwhile."""
    end = object()
    with ThreadPoolExecutor(max_workers=1) as thread:
        waiting = deque(thread.submit(next, items, end) for _ in range(DEPTH))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(thread.submit(next, items, end))
            yield item  # type: ignore[misc]
