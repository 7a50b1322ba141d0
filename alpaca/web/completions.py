"""/v1/completions and /v1/chat/completions: submit, wait or stream, cancel when nobody reads."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from alpaca.serving.request import CanceledError, Job
from alpaca.web import served as served_models
from alpaca.web.answers import Writer
from alpaca.web.bodies import ChatBody, Common, CompletionBody
from alpaca.web.errors import ApiError
from alpaca.web.events import EVENTS, event
from alpaca.web.served import Served, translated


async def chat(http: Request, served: Served, body: ChatBody) -> Response:
    """Answer a conversation."""
    request = await served_models.chat_request(served, body)
    waiting = Waiting(served, [request])
    return await answer(http, body, waiting, Writer(
        served, waiting.jobs, chat=True, logprobs=bool(body.logprobs)
    ))  # fmt: skip


async def complete(http: Request, served: Served, body: CompletionBody) -> Response:
    """Continue texts or token ids."""
    requests = await served_models.completion_requests(served, body)
    waiting = Waiting(served, requests)
    echoed: list[str] = []
    if body.echo:  # after the engine has checked the ids
        given = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        texts = [one for one in given if isinstance(one, str)]
        echoed = texts or [served.codec.decode(one.prompt) for one in requests]
    return await answer(http, body, waiting, Writer(
        served,
        waiting.jobs,
        chat=False,
        logprobs=body.logprobs is not None,
        echoed=echoed,
        hidden=body.max_tokens == 0,
    ))  # fmt: skip


class Waiting:
    """Jobs of the engine, and an event on this loop that their changes set."""

    def __init__(self, served: Served, requests: Sequence[Any]) -> None:
        """Submit the requests."""
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._told = False  # whether a wake-up is on its way: one is enough for many changes
        self.jobs: list[Job] = served.submit(requests, self._notify)

    def _notify(self) -> None:
        """On the engine's thread."""
        if self._told:
            return
        self._told = True
        try:
            self._loop.call_soon_threadsafe(self._changed.set)
        except RuntimeError:  # the loop has ended with the server
            self.cancel()

    async def change(self) -> None:
        """Wait until something has changed since the last call."""
        await self._changed.wait()
        self._changed.clear()
        self._told = False

    def cancel(self) -> None:
        """Free the slots; no effect on finished jobs."""
        for job in self.jobs:
            job.cancel()

    @asynccontextmanager
    async def read_by(self, http: Request) -> AsyncIterator[None]:
        """Cancel the jobs when the client has gone, and when the block ends."""
        watcher = asyncio.create_task(self._watch(http))
        try:
            yield
        finally:
            watcher.cancel()
            self.cancel()

    async def _watch(self, http: Request) -> None:
        while True:
            message = await http.receive()
            if message["type"] == "http.disconnect":
                self.cancel()
                return


async def answer(http: Request, body: Common, waiting: Waiting, writer: Writer) -> Response:
    """The whole answer, or a stream of events."""
    if body.stream:
        return Stream(waiting, events(http, body, waiting, writer))
    async with waiting.read_by(http):
        try:
            await asyncio.gather(*(job.answers() for job in waiting.jobs))
        except CanceledError:
            return Response(status_code=499)  # nobody reads it
        except Exception as error:
            raise failed(error) from error
    return JSONResponse(writer.whole())


class Stream(StreamingResponse):
    """A stream that cancels its jobs even if its first event was never asked for."""

    def __init__(self, waiting: Waiting, content: AsyncIterator[bytes]) -> None:
        """Events of `waiting`'s jobs."""
        super().__init__(content, headers=EVENTS)
        self._waiting = waiting

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._waiting.cancel()


async def events(
    http: Request, body: Common, waiting: Waiting, writer: Writer
) -> AsyncIterator[bytes]:
    """Server-sent events: chunks as they come, the usage if asked for, `[DONE]`."""
    options = body.stream_options
    usage = bool(options and options.include_usage)
    each = bool(options and options.continuous_usage_stats)
    async with waiting.read_by(http):
        try:
            for chunk in writer.first():
                yield event(chunk)
            while not writer.ended:
                await waiting.change()
                for chunk in writer.chunks(counted=usage and each):
                    if usage:
                        chunk["usage"] = writer.usage() if each else None
                    yield event(chunk)
            if usage:
                yield event(writer.last())
        except CanceledError:
            return
        except Exception as error:
            yield event(failed(error).body())
            return
        yield b"data: [DONE]\n\n"


def failed(error: Exception) -> ApiError:
    """What ended a generation, for the client."""
    known = translated(error)
    if isinstance(known, ApiError):
        return known
    return ApiError(500, f"The answer failed: {error}")
