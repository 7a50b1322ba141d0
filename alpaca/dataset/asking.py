"""Ask an endpoint many independent questions: several at a time, within a budget, interruptible.

The first Ctrl-C sends no more and waits for the replies in flight, which are already paid for; the
second abandons them. What has arrived is yielded at once, so that the caller can write it down.
A failure, too, ends the run only after the replies in flight.
"""

import asyncio
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from alpaca.dataset.limits import Limits
from alpaca.dataset.teacher import RefusedError, Reply, StoppedError, Teacher, Usage, estimate
from alpaca.errors import UserError

MAX_REFUSED = 20  # refusals before any reply, after which a run stops


@dataclass(frozen=True)
class Question:
    """What is asked, and under which key the reply is wanted.

    most: tokens of the reply. body: of this request only.
    """

    key: str
    prompt: str
    most: int
    body: Mapping[str, Any] = field(default_factory=dict)


Outcome = Reply | RefusedError


class Asker:
    """Asks; `tokens_in` and `tokens_out` were used so far, `ended` says why it stopped early."""

    def __init__(
        self,
        teacher: Teacher,
        limits: Limits,
        used: tuple[int, int] = (0, 0),
        *,
        answered: bool = False,
        remedy: str = "",
        wasted: Callable[[Usage], None] = lambda usage: None,
    ) -> None:
        """`used`: tokens sent and received by earlier runs, which count towards the budget.

        `answered`: whether an earlier run had a reply. Until there is one, refusals are held back,
        for a setting may be the reason; `remedy` says which. `wasted` is told of a reply that was
        paid for and held nothing.
        """
        self.teacher, self.limits = teacher, limits
        self.tokens_in, self.tokens_out = used
        self.ended = ""
        self._answered, self._remedy, self._tell = answered, remedy, wasted
        self._held: list[tuple[str, Outcome]] = []
        self._failure: UserError | None = None
        self._running: dict[asyncio.Task[Outcome | None], Question] = {}
        self._runner: asyncio.Runner | None = None
        teacher.wasted = self._wasted

    def ask(self, questions: Iterable[Question]) -> Iterator[tuple[str, Outcome]]:
        """Yield a key and its reply, or why it has none, as they come.

        Raises:
            UserError: the endpoint refuses until the user changes something.
            KeyboardInterrupt: after the replies in flight have been yielded.
        """
        waiting = list(questions)[::-1]
        before = signal.getsignal(signal.SIGINT)
        with asyncio.Runner() as runner:
            self._runner = runner
            signal.signal(signal.SIGINT, self._interrupt)
            try:
                while self._launch(waiting) or self._running:
                    yield from self._known(runner.run(self._arrived()))
            finally:
                signal.signal(signal.SIGINT, before)
                runner.run(self._close())
        if self.ended == "interrupted":
            raise KeyboardInterrupt
        if self._failure or self._held:
            raise self._failure or self._refused()

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.ended == "interrupted":
            raise KeyboardInterrupt
        self._stop("interrupted")
        print(
            f"\nstopping: waiting for {len(self._running)} request(s) in flight; Ctrl-C again "
            "abandons them",
            file=sys.stderr,
        )

    def _stop(self, why: str) -> None:
        """Send no more, and retry nothing."""
        self.ended = why
        self.teacher.stopping = True

    def _launch(self, waiting: list[Question]) -> bool:
        """Send what the limits allow; whether anything was sent."""
        sent = False
        assert self._runner is not None
        while waiting and not self.ended and len(self._running) < self.limits.concurrency:
            if not self._affordable(waiting[-1]):
                if not self._running:
                    self.ended = "budget"
                break
            question = waiting.pop()
            task = self._runner.get_loop().create_task(self._one(question))
            self._running[task] = question
            sent = True
        return sent

    def _affordable(self, question: Question) -> bool:
        asked = [*self._running.values(), question]
        return self.limits.allow(
            self.tokens_in + sum(estimate(one.prompt) for one in asked),
            self.tokens_out + sum(one.most for one in asked),
        )

    async def _one(self, question: Question) -> Outcome | None:
        try:
            reply = await self.teacher.ask(question.prompt, "", question.body)
        except RefusedError as error:
            if error.usage:
                self._spend(error.usage)
            return error
        except StoppedError:
            return None
        except UserError as error:
            self._failure = self._failure or error
            if self.ended != "interrupted":
                self._stop("failed")
            return None
        self._spend(reply.usage)
        return reply

    async def _arrived(self) -> list[tuple[str, Outcome]]:
        done, _ = await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
        found = []
        for task in done:
            question = self._running.pop(task)
            outcome = task.result()
            if outcome is not None:
                found.append((question.key, outcome))
        return found

    def _known(self, arrived: list[tuple[str, Outcome]]) -> Iterator[tuple[str, Outcome]]:
        """What may be yielded: everything, once something was answered."""
        self._held += arrived
        self._answered |= any(isinstance(outcome, Reply) for _, outcome in arrived)
        if self._answered:
            ready, self._held = self._held, []
            yield from ready
        elif len(self._held) >= MAX_REFUSED and not self.ended:
            self._stop("failed")

    def _refused(self) -> UserError:
        last = self._held[-1][1]
        return UserError(
            f"The {self.teacher.role} refused all {len(self._held)} requests: {last}", self._remedy
        )

    async def _close(self) -> None:
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        self._running.clear()
        await self.teacher.close()

    def _spend(self, usage: Usage) -> None:
        self.tokens_in += usage.tokens_in
        self.tokens_out += usage.tokens_out

    async def _wasted(self, why: str, usage: Usage) -> None:
        self._spend(usage)
        self._tell(usage)
