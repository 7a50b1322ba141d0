"""One completion while it is being made: its slot, its place, its random numbers, its text."""

import time
from collections.abc import Sequence

from alpaca.serving.request import Answer, Completion, Job
from alpaca.serving.sampling import generator
from alpaca.serving.stream import TextStream


class Generation:
    """Belongs to the engine's thread.

    `length` counts the tokens whose keys are in the slot; `token` is the one to go in next.
    """

    def __init__(self, job: Job, index: int, slot: int, table: Sequence[bytes], room: int) -> None:
        """Completion `index` of `job` in `slot`; `room` is how many tokens a slot holds."""
        request = job.request
        self.job = job
        self.slot = slot
        self.sampling = request.sampling
        self.prompt = request.prompt
        self.length = 0
        self.token = -1
        self.reason = ""
        self._outcome: Answer | BaseException
        self._completion: Completion = job.completions[index]
        self._text = TextStream(table, request.stop)
        self._random = generator(request.sampling.seed, index)
        # for the next token, and the same if its pass has to be repeated
        self.uniform = self._random.random()
        self._said: list[str] = []
        self._made = 0
        allowed = request.total_tokens - len(request.prompt)
        if request.max_new_tokens is not None:
            allowed = min(allowed, request.max_new_tokens)
        fits = room - len(request.prompt)
        self._limit, self._limited_by = (fits, "context") if fits < allowed else (allowed, "length")

    @property
    def wants_tokens(self) -> bool:
        """False for a request that leaves no room for an answer."""
        return self._limit > 0

    def accept(self, token: int, ends: frozenset[int]) -> None:
        """Take a sampled token; ends the text when it is the last."""
        if self._completion.first_token is None:
            self._completion.first_token = time.monotonic()
        self.token = token
        self.uniform = self._random.random()
        self._made += 1
        if token in ends:
            self.end("eos")
            return
        self._say(self._text.push(token))
        if self._text.stopped:
            self.end("stop")
        elif self._made >= self._limit:
            self.end(self._limited_by)

    def end(self, reason: str = "") -> None:
        """End the text; without a reason it is the limit that left no room at all."""
        self.reason = reason or self._limited_by
        self._say(self._text.finish())
        self._outcome = Answer("".join(self._said), self._made, self.reason)

    def fail(self, error: BaseException) -> None:
        """End with an error."""
        self.reason = "failed"
        self._outcome = error

    def finish(self) -> None:
        """Hand out the answer or error, once the slot is free again."""
        self._completion.finish(self._outcome)

    def _say(self, piece: str) -> None:
        self._said.append(piece)
        self._completion.push(piece)
