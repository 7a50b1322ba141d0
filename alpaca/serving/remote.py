"""An engine behind a URL: servers of OpenAI's /v1/completions that take token ids.

One thread with an event loop asks them; each completion of a request is a stream of its own, with a
seed of its own. A request goes to the server that makes the fewest answers and is up. Leaving a
stream ends it there too, so a cancelled request frees what it held. Text is decoded here from the
tokens' ids where the server tells them (vLLM does), so both engines cut text in the same way.
"""

import asyncio
import hashlib
import json
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from alpaca.errors import UserError
from alpaca.serving import border
from alpaca.serving.adapters import Adapters
from alpaca.serving.border import EngineStoppedError, Limits
from alpaca.serving.cache import Capacity
from alpaca.serving.generation import Generation
from alpaca.serving.measures import Measures
from alpaca.serving.request import CanceledError, Job, Request, Scored
from alpaca.tokens import Codec

CHECK = 2.0  # seconds between two questions whether a server is up
PATIENCE = 600.0  # seconds that requests wait for a server to come up
QUOTED = 300  # characters of a server's error
# keys of vLLM that other servers may refuse; without them text and usage tell what they are asked
OWN_KEYS = ("return_token_ids", "return_tokens_as_token_ids", "stop_token_ids")
# Left out, vLLM takes them from the folder's generation settings; another server may refuse them.
NEUTRAL = {"top_k": 0, "repetition_penalty": 1.0, "min_p": 0.0}
ID = "token_id:"  # before a token's number, where log probabilities are told by name
ELSEWHERE = "This server asks another one for its answers, which has adapters of its own."


class LostError(RuntimeError):
    """A server failed, or ended before the answer did."""


class _RefusedError(UserError):
    """A server refused a request as wrong, such as vLLM a temperature above 2."""


class _UnreachableError(LostError):
    """A server went away before the first piece of an answer, so another one may be asked."""


@dataclass
class RemoteAdapter:
    """An adapter that the servers hold; as `adapters.Named`."""

    name: str
    codec: Codec | None = None
    requests: int = 0
    created: int = field(default_factory=lambda: int(time.time()))
    bytes: int = 0


@dataclass
class Server:
    """One of the servers: its /v1, and the name that the model has there."""

    url: str
    model: str
    running: int = 0
    up: bool = True
    knows_ids: bool = True  # OWN_KEYS

    @property
    def root(self) -> str:
        """The address without /v1, where vLLM and SGLang tell their health."""
        return self.url.removesuffix("/v1")


class RemoteEngine:
    """Answers requests by asking servers; as `border.Engine`."""

    def __init__(
        self,
        servers: Sequence[Server],
        table: Sequence[bytes],
        ends: frozenset[int],
        capacity: Capacity,
        *,
        limits: Limits | None = None,
        adapters: Adapters[RemoteAdapter] | None = None,
        key: str | None = None,
    ) -> None:
        """`table` and `ends` are as in `engine.Engine`; `key` is what the servers ask for."""
        self.servers = list(servers)
        self.table, self.ends, self.capacity = table, ends, capacity
        self.limits = limits or Limits()
        self.adapters: Adapters[RemoteAdapter] = adapters or Adapters()
        self.measures = Measures()
        self._key = key
        self._free = capacity.slots
        self._waiting = 0  # requests without slots; guarded by `_lock`
        self._queue: deque[Job] = deque()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._lock = threading.Lock()
        self._stopping = False
        self._down_since: float | None = None
        self._loop: asyncio.AbstractEventLoop
        self._client: httpx.AsyncClient
        self._ended: asyncio.Event
        self._begun = threading.Event()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._serve()), name="remote engine", daemon=True
        )

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()
        self._begun.wait()

    def submit(self, request: Request, notify: Callable[[], None] | None = None) -> Job:
        """Queue a request; as `border.Engine.submit`."""
        border.check(request, self.capacity, len(self.table))
        adapter = self.adapters.find(request.adapter)
        job = Job(request, notify, self.measures.end, on_cancel=self._told_to_cancel)
        job.model = None if adapter is None else adapter.name
        with self._lock:
            if self._stopping:
                raise EngineStoppedError("The engine is not running.")
            if self._waiting >= self.limits.waiting + self._free:
                raise border.busy(self.limits.waiting)
            self._waiting += 1
        self.measures.requests += 1
        self.measures.prompt_tokens += len(request.prompt)
        if adapter is not None:
            adapter.requests += 1
        self._later(self._arrive, job)
        return job

    def check_text(self, size: int) -> None:
        """Raise UserError for a prompt of `size` bytes that cannot fit."""
        border.check_text(size, self.capacity.length, self.table)

    def load_adapter(self, name: str, folder: Path, codec: Codec) -> None:
        """Adapters of another server are loaded there."""
        raise UserError(ELSEWHERE, "Load the adapter there.")

    def unload_adapter(self, name: str) -> None:
        """As `load_adapter`."""
        raise UserError(ELSEWHERE, "Unload the adapter there.")

    def stop(self) -> None:
        """End the thread; unfinished requests fail with EngineStoppedError."""
        with self._lock:
            self._stopping = True
        if self._thread.is_alive():
            self._later(self._ended.set)
            self._thread.join()

    @property
    def healthy(self) -> bool:
        """Whether a server is up."""
        alive = self._thread.is_alive() and not self._stopping
        return alive and any(server.up for server in self.servers)

    @property
    def waiting(self) -> int:
        """Number of requests that wait for slots."""
        return self._waiting

    @property
    def idle_slots(self) -> int:
        """Number of free slots."""
        return self._free

    async def _serve(self) -> None:
        """The thread: answer until `stop`, then tell everyone who waits."""
        self._loop, self._ended = asyncio.get_running_loop(), asyncio.Event()
        self._client = httpx.AsyncClient(
            headers=headers(self._key),
            timeout=httpx.Timeout(None, connect=10),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
        )
        async with self._client:
            watch = asyncio.create_task(self._watch())
            self._begun.set()
            await self._ended.wait()
            tasks = [watch, *self._tasks.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for job in self._queue:
                job.finish(EngineStoppedError("The engine was stopped."))

    async def _watch(self) -> None:
        """Ask each server again and again whether it is up."""
        while True:
            await asyncio.gather(*map(self._ask_health, self.servers))
            if any(server.up for server in self.servers):
                self._down_since = None
                self._admit()
            else:
                self._down_since = self._down_since or time.monotonic()
                if time.monotonic() - self._down_since > PATIENCE:
                    self._refuse(LostError(f"No server has answered for {PATIENCE:.0f} s."))
            await asyncio.sleep(CHECK)

    async def _ask_health(self, server: Server) -> None:
        try:
            found = await self._client.get(f"{server.root}/health", timeout=10)
            if found.status_code == 404:
                found = await self._client.get(f"{server.url}/models", timeout=10)
            server.up = found.is_success
        except httpx.HTTPError:
            server.up = False

    def _arrive(self, job: Job) -> None:
        self._queue.append(job)
        self._admit()

    def _admit(self) -> None:
        """Begin the requests whose turn it is, while slots are free and a server is up."""
        while self._queue and any(server.up for server in self.servers):
            job = self._queue[0]
            if not job.canceled and self._free < job.request.n:
                return
            self._leave_queue(self._queue.popleft())
            if job.canceled:
                job.finish(CanceledError())
                continue
            self._free -= job.request.n
            task = asyncio.create_task(self._answer(job))
            self._tasks[id(job)] = task
            task.add_done_callback(partial(self._release, job))

    def _leave_queue(self, job: Job) -> None:
        with self._lock:
            self._waiting -= 1

    def _refuse(self, error: Exception) -> None:
        while self._queue:
            job = self._queue.popleft()
            self._leave_queue(job)
            job.finish(error)

    def _told_to_cancel(self, job: Job) -> None:
        self._later(self._cancel, job)

    def _later(self, work: Callable[..., object], *given: Any) -> None:
        """Let the engine's thread do it; from any thread, and in vain if the engine has stopped."""
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(work, *given)

    def _cancel(self, job: Job) -> None:
        if job in self._queue:
            self._queue.remove(job)
            self._leave_queue(job)
            job.finish(CanceledError())
        elif task := self._tasks.get(id(job)):
            task.cancel()

    def _release(self, job: Job, task: asyncio.Task[None]) -> None:
        """Free the slots of a request whose task has ended, perhaps before it began."""
        if task.cancelled():
            stopped = EngineStoppedError("The engine was stopped.")
            job.finish(stopped if self._stopping else CanceledError())
        elif error := task.exception():
            job.finish(error)
        del self._tasks[id(job)]
        self._free += job.request.n
        if not self._stopping:
            self._admit()

    async def _answer(self, job: Job) -> None:
        """Make all completions of a request, whatever becomes of each."""
        if job.request.prompt_logprobs:
            await self._score_prompt(job)
        await asyncio.gather(*(self._complete(job, one) for one in range(job.request.n)))

    async def _complete(self, job: Job, number: int) -> None:
        """Make one completion, on another server if one goes away before its first piece."""
        generation = Generation(
            job, number, 0, self.table, self.capacity.length, self.limits.seconds
        )
        if not generation.wants_tokens:
            generation.end()
            generation.finish()
            return
        body = self._body(job, number, generation)
        seconds = self.limits.seconds
        try:
            async with asyncio.timeout(None if math.isinf(seconds) else seconds):
                await self._make(body, generation)
        except TimeoutError:
            generation.end("time")
        except Exception as error:  # whatever a server sends, this completion fails alone
            generation.fail(error)
        generation.finish()

    async def _make(self, body: dict[str, Any], generation: Generation) -> None:
        tried: list[Server] = []
        while True:
            server = await self._choose(tried)
            try:
                await self._generate_as_known(server, body, generation)
                return
            except _UnreachableError:
                server.up = False
                tried.append(server)

    async def _choose(self, tried: Sequence[Server] = ()) -> Server:
        """The server that makes the fewest answers; waits for one to come up.

        One that was tried is asked again only once it has said that it is up.
        """
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            up = [server for server in self.servers if server.up]
            if left := [server for server in up if server not in tried] or up:
                return min(left, key=lambda server: server.running)
            await asyncio.sleep(CHECK / 4)
        raise LostError(f"No server has answered for {PATIENCE:.0f} s.")

    async def _generate_as_known(
        self, server: Server, body: dict[str, Any], generation: Generation
    ) -> None:
        """Ask with vLLM's own keys, and without them if the server refuses those only."""
        plain = {
            key: value
            for key, value in body.items()
            if key not in OWN_KEYS and (key not in NEUTRAL or NEUTRAL[key] != value)
        }
        if server.knows_ids:
            try:
                await self._generate(server, body, generation)
            except _RefusedError as error:
                refusal = error
            else:
                return
            try:
                await self._generate(server, plain, generation)
            except _RefusedError:
                raise refusal from None
            server.knows_ids = False
        else:
            await self._generate(server, plain, generation)

    async def _generate(self, server: Server, body: dict[str, Any], generation: Generation) -> None:
        """Ask one server for one completion."""
        server.running += 1
        asked = {**body, "model": body["model"] or server.model}
        ended: str | None = None
        began = False
        try:
            async for event in self._events(server, asked):
                began = True
                ended = self._take(event, generation) or ended
                if generation.reason:
                    return
        except httpx.TransportError as error:
            if not began:
                raise _UnreachableError(str(error)) from None
        finally:
            server.running -= 1
        if ended is None:
            raise LostError("The model's server ended before its answer did; ask again.")
        generation.end(ended if ended != "length" else "")

    async def _events(self, server: Server, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """The stream's events."""
        async with self._client.stream("POST", f"{server.url}/completions", json=body) as answer:
            if not answer.is_success:
                raise self._refused(answer.status_code, await answer.aread())
            async for line in answer.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    yield json.loads(line[6:])

    def _refused(self, status: int, content: bytes) -> Exception:
        text = content.decode(errors="replace")
        with suppress(ValueError, KeyError, TypeError):
            text = str(json.loads(text)["error"]["message"])
        text = " ".join(text.split())[:QUOTED]
        if self._key:
            text = text.replace(self._key, "[key]")
        if status in (502, 503, 504):
            return _UnreachableError(text)
        if status in (400, 422):
            return _RefusedError(f"The model's server refuses this request: {text}")
        return LostError(f"The model's server answered with HTTP status {status}: {text}")

    def _body(self, job: Job, number: int, generation: Generation) -> dict[str, Any]:
        """What a server is asked for one completion; `generation` knows how many tokens fit.

        Stop strings are found here: not every server tells which of its reasons ended an answer.
        """
        request, sampling = job.request, job.request.sampling
        greedy = sampling.temperature == 0 or sampling.top_p == 0
        body: dict[str, Any] = {
            "model": job.model,
            "prompt": list(request.prompt),
            "max_tokens": generation.limit,
            "temperature": 0.0 if greedy else sampling.temperature,
            "seed": seed_of(sampling.seed, number),
            "top_p": 1.0 if greedy else sampling.top_p,
            **NEUTRAL,
            "top_k": sampling.top_k,
            "repetition_penalty": sampling.repetition_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "presence_penalty": sampling.presence_penalty,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        if request.ignore_ends:
            body["ignore_eos"] = True
        elif self.ends:
            body["stop_token_ids"] = sorted(self.ends)
        if request.logprobs is not None:
            body |= {"logprobs": request.logprobs, "return_tokens_as_token_ids": True}
        return body

    def _take(self, event: dict[str, Any], generation: Generation) -> str | None:
        """Give a completion what an event brings; returns why the server ends it, if it does."""
        if error := event.get("error"):
            message = error.get("message", error) if isinstance(error, dict) else error
            raise LostError(f"The model's server failed: {str(message)[:QUOTED]}")
        ended = None
        for choice in event.get("choices", []):
            self._take_tokens(choice, generation)
            ended = choice.get("finish_reason")
            if ended not in (None, "stop", "length"):
                raise LostError(f"The model's server ended the answer: {ended}.")
            if ended == "stop" and not isinstance(choice.get("stop_reason"), str):
                ended = "eos"
        if (usage := event.get("usage")) and generation.is_textual:
            generation.count(usage["completion_tokens"])
            self.measures.generated_tokens += usage["completion_tokens"]
        return ended

    def _take_tokens(self, choice: dict[str, Any], generation: Generation) -> None:
        if ids := choice.get("token_ids"):
            self._measure(generation)
            scored = _scored(choice.get("logprobs"), ids, generation.logprobs)
            for token, one in zip(ids, scored, strict=True):
                if not generation.reason:
                    generation.accept(token, self.ends, one)
                    self.measures.generated_tokens += 1
        elif text := "" if "token_ids" in choice else choice.get("text"):
            if generation.logprobs is not None:
                raise UserError("The model's server tells no ids, so no log probabilities.")
            self._measure(generation)
            generation.accept_text(text)

    def _measure(self, generation: Generation) -> None:
        now = time.monotonic()
        measures = self.measures
        times = measures.first_token if generation.is_first else measures.between_tokens
        times.add(now - generation.last_token)
        generation.last_token = now

    async def _score_prompt(self, job: Job) -> None:
        """Find the log probabilities of the prompt's own tokens.

        Raises:
            UserError: the server does not tell them.
            LostError: it fails.
        """
        count = job.request.logprobs or 0
        server = await self._choose()
        body = {
            "model": job.model or server.model,
            "prompt": list(job.request.prompt),
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": count,
        }
        try:
            answer = await self._client.post(f"{server.url}/completions", json=body)
        except httpx.TransportError as error:
            raise LostError(f"The model's server cannot be asked: {error}") from None
        if not answer.is_success:
            raise self._refused(answer.status_code, answer.content)
        told = answer.json()["choices"][0].get("prompt_logprobs")
        if told is None:
            raise UserError("The model's server tells no log probabilities of prompts.")
        for token, found in zip(job.request.prompt[1:], told[1:], strict=True):
            ranked = sorted(((e["logprob"], int(i)) for i, e in found.items()), reverse=True)
            top = tuple((i, value) for value, i in ranked[:count])
            job.prompt_scored.append(Scored(token, found[str(token)]["logprob"], top))


def headers(key: str | None) -> dict[str, str]:
    """What every request to a server carries."""
    return {"Authorization": f"Bearer {key}"} if key else {}


def seed_of(seed: int, number: int) -> int:
    """The seed of completion `number` of a request; 63 bits, as vLLM takes them."""
    digest = hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _scored(told: Any, ids: Sequence[int], count: int | None) -> Sequence[Scored | None]:
    """The log probabilities of an event's tokens, as vLLM tells them."""
    if count is None or not told:
        return [None] * len(ids)
    found = []
    for token, value, listed in zip(ids, told["token_logprobs"], told["top_logprobs"], strict=True):
        pairs = ((int(name.removeprefix(ID)), one) for name, one in (listed or {}).items())
        ranked = sorted(pairs, key=lambda pair: -pair[1])
        found.append(Scored(token, value, tuple(ranked[:count])))
    return found
