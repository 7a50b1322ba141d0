"""A model behind another server, which the page shows beside ours: ALPACA_COMPARE with a URL.

The page asks it through this server, so that its key stays here and its origin need not allow ours.
It is asked for chats, which every OpenAI-compatible server has: its own chat template applies.
"""

import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from alpaca.address import base_url
from alpaca.errors import UserError
from alpaca.prompt import plain
from alpaca.serving import elsewhere
from alpaca.serving.remote import headers
from alpaca.web.bodies import ComparedBody
from alpaca.web.errors import ApiError
from alpaca.web.events import EVENTS, event

KEY = "ALPACA_COMPARE_KEY"
MODEL = "ALPACA_COMPARE_MODEL"
WAIT = 5.0  # seconds between questions to a server that is not there yet
TIMEOUT = httpx.Timeout(600, connect=10)
QUOTED = 300  # characters of another server's error


@dataclass
class Remote:
    """Another server's model. `own`: the server is this project's, and knows the role `input`."""

    url: str
    name: str
    own: bool
    key: str | None = field(default=None, repr=False)

    async def answer(self, http: Request, body: ComparedBody) -> Response:
        """Ask for a chat, and pass its events on as they come; an error is an event too."""
        messages = turns(body.instruction, body.input, own=self.own)
        asked = body.model_dump(exclude_none=True, exclude={"instruction", "input"})
        asked |= {"model": self.name, "messages": messages, "stream": True}
        asked["stream_options"] = {"include_usage": True}
        return Relayed(self._events(asked), headers=EVENTS)

    async def _events(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        try:
            async with (
                httpx.AsyncClient(headers=headers(self.key), timeout=TIMEOUT) as client,
                client.stream("POST", f"{self.url}/chat/completions", json=body) as answer,
            ):
                if answer.is_success:
                    async for part in answer.aiter_bytes():
                        yield part
                else:
                    yield event(self._refused(answer.status_code, await answer.aread()).body())
        except httpx.HTTPError as error:
            why = str(error) or type(error).__name__
            yield event(ApiError(502, f"{self.url} cannot be asked: {why}").body())

    def _refused(self, status: int, content: bytes) -> ApiError:
        text = " ".join(content.decode(errors="replace").split())[:QUOTED]
        if self.key:
            text = text.replace(self.key, "[key]")
        return ApiError(502, f"{self.url} answered with HTTP status {status}: {text}")


class Relayed(StreamingResponse):
    """A stream that ends as soon as its reader has gone, even while nothing is sent."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it as an older ASGI version needs it: with a task that sees the reader go."""
        older = {**scope, "asgi": {**scope.get("asgi", {}), "spec_version": "2.3"}}
        await super().__call__(older, receive, send)


def turns(instruction: str, given: str, *, own: bool) -> list[dict[str, str]]:
    """The messages for an instruction and its input; another project's template has one text."""
    if given and own:
        return [{"role": "input", "content": given}, {"role": "user", "content": instruction}]
    return [{"role": "user", "content": plain(instruction, given)}]


def find(text: str, environment: Mapping[str, str]) -> Remote:
    """The model at a URL: ALPACA_COMPARE_MODEL, or the first that the server lists.

    Waits for a server that does not answer yet or is loading.

    Raises:
        UserError: the server refuses, lists no model, or not the one that is named.
    """
    url = base_url(text, "ALPACA_COMPARE")
    key, wanted = environment.get(KEY, "").strip() or None, environment.get(MODEL)
    while (listed := elsewhere.listed(url, key, KEY, [503])) is None:
        time.sleep(WAIT)
    name = wanted or next(iter(listed), None)
    if name is None or name not in listed:
        raise UserError(
            f"{url} does not have {wanted or 'a model'}.",
            f"Set {MODEL} to one of: {', '.join(listed) or 'none'}.",
        )
    return Remote(url, name, listed[name].get("owned_by") == "alpaca-cog", key)
