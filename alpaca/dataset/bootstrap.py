"""The loop that grows a data set: send requests, write replies to the journal, judge them in order.

Three limits decide whether a request is sent: the number in flight, the budget, and how many more
tasks are probably needed. The budget counts the most that requests in flight can still cost, so it
is never exceeded. Every reply is in the journal before it is used.
"""

import asyncio
from collections.abc import Callable

from alpaca.dataset.journal import Entry, Journal
from alpaca.dataset.limits import Limits
from alpaca.dataset.pool import LAG, Pool
from alpaca.dataset.recipe import opening, request
from alpaca.dataset.teacher import RefusedError, StoppedError, Teacher, Usage, estimate
from alpaca.errors import UserError

MAX_USELESS = 20  # replies in a row without a kept task, after which a run stops spending money


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
        """Apply the journal's entries; `progress` is called after every change."""
        self.pool, self.journal, self.teacher, self.limits = pool, journal, teacher, limits
        self.per_request, self.max_tokens, self.progress = per_request, max_tokens, progress
        self.tokens_in = self.tokens_out = 0
        self.estimated = False
        self.ended = ""
        self.replies: dict[int, Entry] = {}  # by request: arrived or refused, not judged yet
        self.in_flight: dict[int, asyncio.Task[None]] = {}
        self._reserved: dict[int, int] = {}  # request -> its prompt's tokens, while in flight
        self._writing = asyncio.Lock()
        self._useless = 0
        self._answered = False
        self._failure: UserError | None = None
        teacher.wasted = self._wasted
        for entry in journal.entries:
            self._apply(entry)

    @property
    def cost(self) -> float:
        """What was spent so far, at the given prices."""
        return self.limits.cost(self.tokens_in, self.tokens_out)

    @property
    def done(self) -> bool:
        """Whether enough tasks are kept."""
        return len(self.pool.kept) >= self.limits.wanted

    def stop(self, why: str) -> None:
        """Send no more requests; those in flight are still waited for."""
        self.ended = self.ended or why
        self.teacher.stopping = True

    async def run(self) -> None:
        """Grow the pool until it is done or stopped, or the budget is used.

        Raises:
            UserError: the teacher refuses, or its replies hold nothing usable; every reply that
                has arrived by then is in the journal.
        """
        while True:
            self._reap()
            judged = await self._judge_next()
            self._launch()
            self.progress(self)
            if not judged and not self.in_flight:
                break
            if not judged:
                await asyncio.wait(self.in_flight.values(), return_when=asyncio.FIRST_COMPLETED)
        if self._failure:
            raise self._failure

    def _reap(self) -> None:
        """Remove finished requests; the first failure ends the run."""
        for number in [number for number, task in self.in_flight.items() if task.done()]:
            error = self.in_flight.pop(number).exception()
            if isinstance(error, UserError):
                self._failure = self._failure or error
                self.stop("failed")
            elif error:
                raise error

    async def _judge_next(self) -> bool:
        """Judge the next reply in order, if it has arrived and tasks are still wanted."""
        if self.done or self._failure or self.pool.judged not in self.replies:
            return False
        entry = self.replies.pop(self.pool.judged)
        text, cut = entry.get("text", ""), entry.get("cut", False)
        judged = await asyncio.to_thread(self.pool.judge, self.pool.judged, text, cut)
        await self._append(judged, durable=False)
        kept = any(item["verdict"] == "kept" for item in judged["tasks"])
        self._useless = 0 if kept else self._useless + 1
        if self._useless >= MAX_USELESS:
            last = entry.get("why") or f"it begins with {text[:60]!r}"
            self._failure = UserError(
                f"The last {MAX_USELESS} replies held no usable task; the last one: {last}.",
                "Look at the reasons in the .dropped.jsonl file; a stronger --model may be needed.",
            )
            self.stop("failed")
        return True

    def _launch(self) -> None:
        """Send every request that the limits allow now."""
        if self.done:
            self.teacher.stopping = True  # no retries: enough tasks are kept
        while not self.ended and len(self.in_flight) < self.limits.concurrency and self._needed():
            number = self._next()
            if number >= self.pool.judged + LAG:
                return
            examples = self.pool.examples(number)
            prompt, start = request(examples, self.per_request), opening(examples)
            if not self._affordable(estimate(prompt)):
                if not self.in_flight:
                    self.ended = "budget"
                return
            self._reserved[number] = estimate(prompt)
            self.in_flight[number] = asyncio.create_task(self._ask(number, prompt, start))

    def _next(self) -> int:
        """The first request that is neither answered nor in flight."""
        number = self.pool.judged
        while number in self.replies or number in self.in_flight:
            number += 1
        return number

    def _needed(self) -> bool:
        """Whether the requests in flight will probably yield too few tasks."""
        waiting = len(self.in_flight) + len(self.replies)
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
            # Recorded, so that a resumed run does not send this request again.
            if paid or self._answered:
                found = {"entry": "refused", "request": number, "why": str(error)}
                await self._write(found | paid)
            if not self._answered:
                raise UserError(
                    f"The teacher refused the first requests: {error}",
                    error.remedy
                    or "Change what is sent, for example: --extra '{\"max_tokens\": null}'",
                ) from None
        else:
            # A completion continues its opening; one that repeats the opening is parsed too.
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
        self._apply(entry)

    async def _append(self, entry: Entry, *, durable: bool) -> None:
        # In a thread: while a slow disk syncs, the event loop must keep receiving replies, or they
        # would time out.
        async with self._writing:
            await asyncio.to_thread(self.journal.append, entry, durable=durable)

    def _apply(self, entry: Entry) -> None:
        """Update the state with one journal entry."""
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
