"""The loop that grows a data set: send requests, write replies down, judge them in order.

What may be sent is decided by three limits: requests in flight, the budget (counting what those in
flight could still cost at most, so it is never overrun), and how many more tasks are expected to
be needed. Everything that was learnt from the network is in the journal before it is used.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from alpaca.dataset.journal import Entry, Journal
from alpaca.dataset.pool import LAG, Pool
from alpaca.dataset.recipe import opening, request
from alpaca.dataset.teacher import RefusedError, StoppedError, Teacher, Usage, estimate
from alpaca.errors import UserError

BARREN = 20  # replies in a row without one kept task: something is wrong, and it costs money


@dataclass(frozen=True)
class Limits:
    """When to stop; prices are per million tokens, in any currency."""

    wanted: int
    concurrency: int = 8
    price_in: float = 0.0
    price_out: float = 0.0
    max_cost: float | None = None
    max_total_tokens: int | None = None

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        """What so many tokens cost."""
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6

    def allow(self, tokens_in: int, tokens_out: int) -> bool:
        """Whether spending these tokens in all stays within the budget."""
        tokens = self.max_total_tokens is None or tokens_in + tokens_out <= self.max_total_tokens
        return tokens and (
            self.max_cost is None or self.cost(tokens_in, tokens_out) <= self.max_cost
        )


class Bootstrap:
    """One run: a pool, its journal, a teacher. `ended` says why it stopped before it was done."""

    def __init__(
        self,
        pool: Pool,
        journal: Journal,
        teacher: Teacher,
        limits: Limits,
        per_request: int,
        max_tokens: int,
        progress: Callable[["Bootstrap"], None] = lambda run: None,
    ) -> None:
        """Take up the journal's entries; `progress` is called after every change."""
        self.pool, self.journal, self.teacher, self.limits = pool, journal, teacher, limits
        self.per_request, self.max_tokens, self.progress = per_request, max_tokens, progress
        self.tokens_in = self.tokens_out = 0
        self.estimated = False
        self.ended = ""
        self.replies: dict[int, Entry] = {}  # arrived or refused, and not judged yet; by request
        self.flying: dict[int, asyncio.Task[None]] = {}
        self._reserved: dict[int, int] = {}  # request -> its prompt's tokens, while in flight
        self._writing = asyncio.Lock()
        self._barren = 0
        self._answered = False
        self._failure: UserError | None = None
        teacher.wasted = self._wasted
        for entry in journal.entries:
            self._take(entry)

    @property
    def cost(self) -> float:
        """What was spent so far, by the prices given."""
        return self.limits.cost(self.tokens_in, self.tokens_out)

    @property
    def done(self) -> bool:
        """Whether enough tasks are kept."""
        return len(self.pool.kept) >= self.limits.wanted

    def stop(self, why: str) -> None:
        """Send nothing more; replies that are on their way are still waited for."""
        self.ended = self.ended or why
        self.teacher.stopping = True

    async def run(self) -> None:
        """Grow the pool until it is done or stopped, or the budget is used.

        Raises:
            UserError: the teacher refuses, or its replies hold nothing usable; everything that
                had arrived by then is in the journal.
        """
        while True:
            self._reap()
            judged = await self._judge_next()
            self._launch()
            self.progress(self)
            if not judged and not self.flying:
                break
            if not judged:
                await asyncio.wait(self.flying.values(), return_when=asyncio.FIRST_COMPLETED)
        if self._failure:
            raise self._failure

    def _reap(self) -> None:
        """Let go of the requests that have ended; the first failure ends the run."""
        for number in [number for number, task in self.flying.items() if task.done()]:
            error = self.flying.pop(number).exception()
            if isinstance(error, UserError):
                self._failure = self._failure or error
                self.stop("failed")
            elif error:
                raise error

    async def _judge_next(self) -> bool:
        """Judge the reply that is next in line, if it is there and tasks are still wanted."""
        if self.done or self._failure or self.pool.judged not in self.replies:
            return False
        entry = self.replies.pop(self.pool.judged)
        text, cut = entry.get("text", ""), entry.get("cut", False)
        judged = await asyncio.to_thread(self.pool.judge, self.pool.judged, text, cut)
        await self._append(judged, durable=False)
        kept = any(item["verdict"] == "kept" for item in judged["tasks"])
        self._barren = 0 if kept else self._barren + 1
        if self._barren >= BARREN:
            last = entry.get("why") or f"it begins with {text[:60]!r}"
            self._failure = UserError(
                f"The last {BARREN} replies held no task to keep; of the last one: {last}.",
                "Look at the reasons in the .dropped.jsonl file; a stronger --model may be needed.",
            )
            self.stop("failed")
        return True

    def _launch(self) -> None:
        """Start every request that the limits allow now."""
        if self.done:
            self.teacher.stopping = True  # what fails from here on is not needed
        while not self.ended and len(self.flying) < self.limits.concurrency and self._needed():
            number = self._next()
            if number >= self.pool.judged + LAG:
                return
            examples = self.pool.examples(number)
            prompt, start = request(examples, self.per_request), opening(examples)
            if not self._affordable(estimate(prompt)):
                if not self.flying:
                    self.ended = "budget"
                return
            self._reserved[number] = estimate(prompt)
            self.flying[number] = asyncio.create_task(self._ask(number, prompt, start))

    def _next(self) -> int:
        """The first request that has neither been answered nor is under way."""
        number = self.pool.judged
        while number in self.replies or number in self.flying:
            number += 1
        return number

    def _needed(self) -> bool:
        """Whether the replies under way would probably not hold enough tasks."""
        waiting = len(self.flying) + len(self.replies)
        rate = (len(self.pool.kept) + self.per_request) / (self.pool.judged + 1)
        return len(self.pool.kept) + waiting * rate < self.limits.wanted

    def _affordable(self, prompt: int) -> bool:
        return self.limits.allow(
            self.tokens_in + sum(self._reserved.values()) + prompt,
            self.tokens_out + (len(self._reserved) + 1) * self.max_tokens,
        )

    async def _ask(self, number: int, prompt: str, start: str) -> None:
        try:
            reply = await self.teacher.ask(prompt, start)
        except StoppedError:
            return
        except RefusedError as error:
            paid = _usage(error.usage) if error.usage else {}
            # What was paid is written down, so that it is not asked again.
            if paid or self._answered:
                found = {"entry": "refused", "request": number, "why": str(error)}
                await self._write(found | paid)
            if not self._answered:
                raise UserError(
                    f"The teacher refuses the first requests: {error}",
                    error.remedy
                    or "Change what is sent, for example: --extra '{\"max_tokens\": null}'",
                ) from None
        else:
            # A completion goes on from its opening; one that repeats it is read all the same.
            text = start + reply.text if self.teacher.endpoint == "completion" else reply.text
            usage = _usage(reply.usage)
            found = {"entry": "reply", "request": number, "text": text, "cut": reply.cut} | usage
            await self._write(found)
        finally:
            del self._reserved[number]

    async def _wasted(self, why: str, usage: Usage) -> None:
        await self._write({"entry": "wasted", "why": why} | _usage(usage))

    async def _write(self, entry: Entry) -> None:
        await self._append(entry, durable=True)
        self._take(entry)

    async def _append(self, entry: Entry, *, durable: bool) -> None:
        # In a thread: a disk that is slow to sync must not hold up replies that are arriving, whose
        # time-outs would run off meanwhile.
        async with self._writing:
            await asyncio.to_thread(self.journal.append, entry, durable=durable)

    def _take(self, entry: Entry) -> None:
        """Bring the state up to one journal entry."""
        self.tokens_in += entry.get("tokens_in", 0)
        self.tokens_out += entry.get("tokens_out", 0)
        self.estimated |= entry.get("estimated", False)
        self._answered |= entry["entry"] == "reply"
        if entry["entry"] == "judged":
            self.replies.pop(entry["request"])
            self.pool.replay(entry)
        elif "request" in entry:
            self.replies[entry["request"]] = entry


def _usage(usage: Usage) -> Entry:
    return {
        "tokens_in": usage.tokens_in,
        "tokens_out": usage.tokens_out,
        "estimated": usage.estimated,
    }
