"""The state of one completion in progress: its slot, position, random numbers and text."""

import time
from collections.abc import Sequence

from alpaca.serving.request import Answer, Completion, Job, Scored
from alpaca.serving.sampling import generator
from alpaca.serving.stream import TextStream


class Generation:
    """One completion in progress; only the engine's thread may use it.

    `length` counts the tokens whose keys are in the slot; `token` is the next input token; `limit`
    is the most tokens that it may have.
    """

    def __init__(
        self,
        job: Job,
        index: int,
        slot: int,
        table: Sequence[bytes],
        slot_length: int,
        seconds: float,
    ) -> None:
        """Completion `index` of `job` in `slot`, which holds `slot_length` tokens.

        It ends when it has had the slot for `seconds`.
        """
        request = job.request
        self.job = job
        self.slot = slot
        self.sampling = request.sampling
        self.logprobs = request.logprobs
        self.last_token = job.submitted  # when the last token came; time.monotonic()
        self.prompt = request.prompt
        self.length = 0
        self.token = -1
        self.reason = ""
        self.is_textual = False  # whether its tokens are known by their text only
        self._outcome: Answer | BaseException | None = None
        self._completion: Completion = job.completions[index]
        self._text = TextStream(table, request.stop)
        self._ignore_ends = request.ignore_ends
        self._random = generator(request.sampling.seed, index)
        # for the next token; it stays the same if the pass has to be repeated
        self.uniform = self._random.random()
        self._pieces: list[str] = []
        self._generated = 0
        self._deadline = time.monotonic() + seconds
        allowed = request.total_tokens - len(request.prompt)
        if request.max_new_tokens is not None:
            allowed = min(allowed, request.max_new_tokens)
        fits = slot_length - len(request.prompt)
        self.limit, self._limited_by = (fits, "context") if fits < allowed else (allowed, "length")

    @property
    def failed(self) -> bool:
        """Whether the completion ended with an error."""
        return isinstance(self._outcome, BaseException)

    @property
    def wants_tokens(self) -> bool:
        """False if the request's limits allow no answer tokens."""
        return self.limit > 0

    @property
    def is_first(self) -> bool:
        """Whether no token has come yet."""
        return self._generated == 0

    def accept(self, token: int, ends: frozenset[int], scored: Scored | None = None) -> None:
        """Add a sampled token; ends the completion if it is the last."""
        if self._completion.first_token is None:
            self._completion.first_token = time.monotonic()
        self.token = token
        self.uniform = self._random.random()
        self._generated += 1
        self._completion.generated = self._generated
        if scored is not None:
            self._completion.scored.append(scored)
        if token in ends and not self._ignore_ends:
            self.end("eos")
            return
        self._emit(self._text.push(token))
        if self._text.stopped:
            self.end("stop")
        elif self._generated >= self.limit:
            self.end(self._limited_by)
        elif time.monotonic() > self._deadline:
            self.end("time")

    def accept_text(self, text: str) -> None:
        """Add a token that is known by its text only; a stop string or the time may end it."""
        if self._completion.first_token is None:
            self._completion.first_token = time.monotonic()
        self.is_textual = True
        self.count(self._generated + 1)
        self._emit(self._text.add(text))
        if self._text.stopped or time.monotonic() > self._deadline:
            self.end("stop" if self._text.stopped else "time")

    def count(self, tokens: int) -> None:
        """Correct the number of tokens."""
        self._generated = self._completion.generated = tokens

    def end(self, reason: str = "") -> None:
        """End the completion; without a reason, its limit allowed no tokens at all."""
        self.reason = reason or self._limited_by
        self._emit(self._text.finish())
        self._outcome = Answer("".join(self._pieces), self._generated, self.reason)

    def fail(self, error: BaseException) -> None:
        """End with an error."""
        self.reason = "failed"
        self._outcome = error

    def finish(self) -> None:
        """Deliver the answer or error; called once the slot is free again."""
        assert self._outcome is not None
        self._completion.finish(self._outcome)

    def _emit(self, piece: str) -> None:
        self._pieces.append(piece)
        self._completion.push(piece)
