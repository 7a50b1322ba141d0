"""What is asked of the engine, and the handles through which the answers come.

A `Job` is one request and its n completions; both sides of it are thread-safe. The engine's thread
is the only one that calls `push` and `finish`.
"""

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue


@dataclass(frozen=True)
class Sampling:
    """How a token is taken from the logits; the defaults sample from the model as it is.

    temperature 0 takes the likeliest token. top_k 0 and top_p 1 filter nothing. Equal seeds and
    inputs give equal text; completion i of a request draws from (seed, i).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Request:
    """A prompt's token ids, and when to stop.

    `total_tokens` counts prompt and answer, `max_new_tokens` the answer. Text from the first of
    the `stop` strings on is not returned; empty ones are ignored.
    """

    prompt: tuple[int, ...]
    n: int = 1
    total_tokens: int = 2000
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True)
class Answer:
    """A finished completion; `reason` is eos, stop, length, context or canceled.

    `tokens` counts what was generated, the ending token included.
    """

    text: str
    tokens: int
    reason: str


class CanceledError(Exception):
    """The completion was cancelled before it ended."""


class Completion:
    """One answer in the making: iterate over its pieces, or wait for `result`."""

    def __init__(self) -> None:
        """Start empty."""
        self.result: Future[Answer] = Future()
        # From now on it cannot be cancelled by who waits for it, which `finish` would stumble over.
        self.result.set_running_or_notify_cancel()
        self.first_token: float | None = None  # time.monotonic()
        self._pieces: SimpleQueue[str | None] = SimpleQueue()

    def push(self, piece: str) -> None:
        """Hand a piece of text to whoever iterates."""
        if piece:
            self._pieces.put(piece)

    def finish(self, outcome: Answer | BaseException) -> None:
        """Set the result and end the iteration; a second call changes nothing."""
        if self.result.done():
            return
        if isinstance(outcome, Answer):
            self.result.set_result(outcome)
        else:
            self.result.set_exception(outcome)
        self._pieces.put(None)

    def __iter__(self) -> Iterator[str]:
        """Pieces as they are made; blocks in between. Raises what the completion failed with."""
        while (piece := self._pieces.get()) is not None:
            yield piece
        self.result.result()


class Job:
    """One request and its completions."""

    def __init__(self, request: Request) -> None:
        """Start the clock."""
        self.request = request
        self.completions = [Completion() for _ in range(request.n)]
        self.submitted = time.monotonic()
        self._canceled = threading.Event()

    def cancel(self) -> None:
        """Ask the engine to drop the job; its slots are free at the next step."""
        self._canceled.set()

    @property
    def canceled(self) -> bool:
        """Whether `cancel` was called."""
        return self._canceled.is_set()

    async def answers(self) -> list[Answer]:
        """All n answers; when one fails, or the waiting task is cancelled, the job is cancelled."""
        try:
            results = (asyncio.wrap_future(one.result) for one in self.completions)
            return list(await asyncio.gather(*results))
        except BaseException:
            self.cancel()
            raise

    def finish(self, outcome: BaseException) -> None:
        """End every completion that has not ended."""
        for completion in self.completions:
            completion.finish(outcome)
