"""Requests to the engine, and the objects that deliver its answers.

A `Job` is one request and its n completions. It is thread-safe for the caller and the engine. Only
the engine's thread calls `push` and `finish`.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from alpaca.serving.lora import LoadedAdapter


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from the logits; the defaults do not change the model's distribution.

    temperature 0 takes the likeliest token. top_k 0 and top_p 1 filter nothing. The logit of a
    token that the answer holds c times is lowered by c * frequency_penalty + presence_penalty.
    Equal seeds and inputs give equal text; completion i of a request uses the random numbers of
    (seed, i).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Request:
    """A prompt's token ids, and when to stop.

    `total_tokens` limits prompt and answer together, `max_new_tokens` only the answer. An answer
    ends before the first `stop` string in it; empty stop strings are ignored. With `ignore_ends`,
    end tokens do not end it. `logprobs` asks for the log probability of each token of the answer,
    and of that many of the likeliest ones; `prompt_logprobs` for the same of the prompt's tokens.
    `adapter` is a name that `Adapters.find` knows.
    """

    prompt: tuple[int, ...]
    n: int = 1
    total_tokens: int = 2000
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    ignore_ends: bool = False
    logprobs: int | None = None
    prompt_logprobs: bool = False
    adapter: str = ""


@dataclass(frozen=True)
class Scored:
    """A token, its log probability and the likeliest tokens at its place, likeliest first.

    They are the model's own: before penalties, temperature and filters.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Answer:
    """A finished completion; `reason` is eos, stop, length, context or time.

    `tokens` counts the generated tokens, including the end token.
    """

    text: str
    tokens: int
    reason: str


class CanceledError(Exception):
    """The completion was cancelled before it ended."""


class Completion:
    """One answer in progress: iterate over its pieces, or wait for `result`."""

    def __init__(
        self,
        notify: Callable[[], None] | None = None,
        ended: Callable[[str], None] | None = None,
    ) -> None:
        """Start without text. `notify` is called by the engine's thread after each change.

        `ended` is called once, with the answer's reason, canceled or failed.
        """
        self.result: Future[Answer] = Future()
        # From now on a waiting task cannot cancel the future, which would make `finish` fail.
        self.result.set_running_or_notify_cancel()
        self.first_token: float | None = None  # time.monotonic()
        self.scored: list[Scored] = []  # if the request asks for logprobs; the end token included
        self.generated = 0  # tokens
        self._notify = notify
        self._ended = ended
        self._pieces: SimpleQueue[str | None] = SimpleQueue()

    def push(self, piece: str) -> None:
        """Add a piece of text for the iterating thread."""
        if piece:
            self._pieces.put(piece)
            self._changed()

    def finish(self, outcome: Answer | BaseException) -> None:
        """Set the result and end the iteration; a second call changes nothing."""
        if self.result.done():
            return
        if self._ended is not None:
            self._ended(reason_of(outcome))
        if isinstance(outcome, Answer):
            self.result.set_result(outcome)
        else:
            self.result.set_exception(outcome)
        self._pieces.put(None)
        self._changed()

    def _changed(self) -> None:
        if self._notify is not None:
            self._notify()

    def ready(self) -> str:
        """The text that came since the last call, without waiting."""
        found = []
        while not self._pieces.empty():
            found.append(self._pieces.get() or "")
        return "".join(found)

    def __iter__(self) -> Iterator[str]:
        """Yield pieces as they are generated; blocks in between. Raises the completion's error."""
        while (piece := self._pieces.get()) is not None:
            yield piece
        self.result.result()


def reason_of(outcome: Answer | BaseException) -> str:
    """Why a completion ended, in a word."""
    if isinstance(outcome, Answer):
        return outcome.reason
    return "canceled" if isinstance(outcome, CanceledError) else "failed"


class Job:
    """One request and its completions."""

    def __init__(
        self,
        request: Request,
        notify: Callable[[], None] | None = None,
        ended: Callable[[str], None] | None = None,
        adapter: "LoadedAdapter | None" = None,
        on_cancel: "Callable[[Job], None] | None" = None,
    ) -> None:
        """Create the n completions and record the time of submission.

        `adapter` is what the request's name meant when it came; None is the base. `on_cancel` is
        called by each `cancel`.
        """
        self.request = request
        self.adapter = adapter
        self.model: str | None = None  # an adapter's name on another server
        self._on_cancel = on_cancel
        self.completions = [Completion(notify, ended) for _ in range(request.n)]
        self.prompt_scored: list[Scored] = []  # of all tokens but the first, if asked for
        self.submitted = time.monotonic()
        self._canceled = threading.Event()

    def cancel(self) -> None:
        """Ask the engine to drop the job; its slots become free at the next step."""
        self._canceled.set()
        if self._on_cancel is not None:
            self._on_cancel(self)

    @property
    def canceled(self) -> bool:
        """Whether `cancel` was called."""
        return self._canceled.is_set()

    async def answers(self) -> list[Answer]:
        """Wait for all n answers; if one fails or the task is cancelled, the job is cancelled."""
        try:
            results = (asyncio.wrap_future(c.result) for c in self.completions)
            return list(await asyncio.gather(*results))
        except BaseException:
            self.cancel()
            raise

    def finish(self, outcome: BaseException) -> None:
        """End every completion that has not ended."""
        for completion in self.completions:
            completion.finish(outcome)
