"""The teacher: a model behind an OpenAI-compatible endpoint, asked until it gives a usable reply.

The only module of the package that opens a network connection. Transient failures (429, 5xx, cut or
hanging connections, broken JSON, empty choices) are retried after Retry-After, or after an
exponentially growing pause with jitter; Retry-After delays every other request too. The client
library does not retry, so that every attempt is seen and counted here.
"""

import asyncio
import json
import os
import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

import openai
from openai.types import Completion
from openai.types.chat import ChatCompletion

from alpaca.errors import UserError

FIRST_PAUSE = 0.5  # seconds
LONGEST_PAUSE = 60.0
TRANSIENT = {408, 409, 425, 429}  # and every 5xx
NO_KEY = "none"  # local servers need no key, but the client library requires one
SHORT_KEY = 8  # characters; real keys have more
CHARACTERS_PER_TOKEN = 4  # where the endpoint reports no usage


@dataclass(frozen=True)
class Usage:
    """Tokens of one request; `estimated` where the endpoint did not report them."""

    tokens_in: int
    tokens_out: int
    estimated: bool = False


@dataclass(frozen=True)
class Reply:
    """A usable reply: its text, whether it was cut at the token limit, and the tokens it cost.

    top: the likeliest first tokens and their log probabilities, where asked for and given.
    """

    text: str
    cut: bool
    usage: Usage
    top: tuple[tuple[str, float], ...] = ()


class RefusedError(Exception):
    """Retrying this one request would not help (HTTP 400 or 422, a filter, reasoning alone).

    `usage` is set when it was paid nevertheless; `remedy` says what to change.
    """

    def __init__(self, why: str, usage: Usage | None = None, remedy: str = "") -> None:
        """`why` is a clause."""
        super().__init__(why)
        self.usage = usage
        self.remedy = remedy


class StoppedError(Exception):
    """The run is ending, and the request would have needed a retry."""


class _TransientError(Exception):
    """One attempt failed and may be retried; `usage` is set when it was paid nevertheless."""

    def __init__(self, why: str, after: float | None = None, usage: Usage | None = None) -> None:
        super().__init__(why)
        self.after = after
        self.usage = usage


@dataclass
class Teacher:
    """A teacher's endpoint, and how to ask it.

    `wasted` is awaited with each reply that was paid for and held nothing, so that its cost counts.
    `patience` is the longest wait that the server may ask for, in seconds. `sleep` and `clock` take
    and give seconds. `role` is what errors call it, `flag` the one that names its URL. With
    `empty`, a reply that ended by itself without any text is a reply too.
    """

    url: str
    model: str
    key: str = field(repr=False)
    endpoint: str = "chat"
    timeout: float = 600.0
    retries: int = 8
    patience: float = 900.0
    body: dict[str, Any] = field(default_factory=dict)
    role: str = "teacher"
    flag: str = "--teacher"
    empty: bool = False
    wasted: Callable[[str, Usage], Awaitable[None]] | None = None
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        """Make the client; it connects at the first request."""
        self.stopping = False
        self._paused_until = 0.0
        self._jitter = random.Random()
        self._client = openai.AsyncOpenAI(
            base_url=self.url, api_key=self.key, max_retries=0, timeout=self.timeout
        )

    async def ask(self, prompt: str, opening: str, more: Mapping[str, Any] | None = None) -> Reply:
        """Send one request, retry it after transient failures, and return its reply.

        `opening` is the start of the reply, which a model behind a completion endpoint continues.
        `more` is added to the body of this request.

        Raises:
            RefusedError: this request can have no answer; others may.
            StoppedError: `stopping` was set when a retry was due.
            UserError: no request will be answered until the user changes something.
        """
        why = ""
        for attempt in range(self.retries + 1):
            while (left := self._paused_until - self.clock()) > 0:
                await self._pause(left)
            try:
                return await self._attempt(prompt, opening, more or {})
            except _TransientError as error:
                why = self._redact(str(error))
                if error.usage and self.wasted:
                    await self.wasted(why, error.usage)
                await self._after(error, attempt)
        raise UserError(
            f"The {self.role} failed {self.retries + 1} times on one request; last failure: {why}.",
            "Nothing is lost: run the same command again when the endpoint is back.",
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def _after(self, error: _TransientError, attempt: int) -> None:
        """Wait before the next attempt; if the server asked for the wait, all requests wait."""
        seconds = pause(attempt, error.after, self._jitter.random())
        if seconds > self.patience:
            raise UserError(
                f"The {self.role} asks to wait {seconds:.0f} s ({self._redact(str(error))}).",
                "Nothing is lost: run the same command again after that.",
            )
        if error.after is not None:
            self._paused_until = max(self._paused_until, self.clock() + seconds)
        else:
            await self._pause(seconds)

    async def _pause(self, seconds: float) -> None:
        """Sleep, in steps short enough to notice that the run is ending."""
        end = self.clock() + seconds
        while (left := end - self.clock()) > 0:
            if self.stopping:
                raise StoppedError
            await self.sleep(min(left, 0.5))

    async def _attempt(self, prompt: str, opening: str, more: Mapping[str, Any]) -> Reply:
        try:
            async with asyncio.timeout(self.timeout):
                answer = await self._send(prompt, opening, more)
        except (TimeoutError, openai.APITimeoutError):
            raise _TransientError(f"no reply within {self.timeout:g} s") from None
        except openai.APIStatusError as error:
            after = retry_after(error.response.headers, time.time())
            raise self._verdict(error.status_code, error.message, error.body, after) from None
        except openai.APIConnectionError as error:
            raise _TransientError(f"connection failed ({error.__cause__ or error})") from None
        except (openai.APIError, ValueError) as error:
            raise _TransientError(f"the reply is not JSON ({error})") from None
        failed = _error_in(answer)
        if failed is not None:  # OpenRouter and others answer 200 when their provider failed
            code = str(failed.get("code", ""))
            message = f"{failed.get('message') or failed}"
            raise self._verdict(int(code) if code.isdigit() else 500, message, failed, None)
        try:
            return _read(answer, prompt, self.empty)
        except RefusedError as error:
            raise RefusedError(self._redact(str(error)), error.usage, error.remedy) from None

    async def _send(
        self, prompt: str, opening: str, more: Mapping[str, Any]
    ) -> ChatCompletion | Completion:
        body = {**self.body, **more}
        if self.endpoint == "chat":
            messages: Any = [{"role": "user", "content": prompt}]
            return await self._client.chat.completions.create(
                model=self.model, messages=messages, extra_body=body
            )
        return await self._client.completions.create(
            model=self.model, prompt=prompt + opening, extra_body=body
        )

    def _verdict(self, status: int, message: str, body: Any, after: float | None) -> Exception:
        """The exception for an error: retry, give up this request, or end the run."""
        detail = self._redact(f"HTTP {status}: {message}")[:400]
        quota = "insufficient_quota" in json.dumps(body, default=str)
        if status in TRANSIENT or status >= 500:
            if not quota:
                return _TransientError(detail, after)
        elif status in (400, 422):
            return RefusedError(detail)
        remedy = {
            401: "Set OPENAI_API_KEY to a key this endpoint accepts.",
            403: "The key may not use this model: check both.",
            404: f"Check {self.flag} (it usually ends in /v1), the model's name and --endpoint.",
            402: "The account has no credit left; run the same command again when it has some.",
            413: "Ask for less at once: with `generate`, a smaller --per_request.",
            429: "The account's quota is used up; run the same command again when it is renewed.",
        }
        return UserError(
            f"The {self.role} at {self.url} refused: {detail}",
            remedy.get(status, f"Check {self.flag}, the model's name and OPENAI_API_KEY."),
        )

    def _redact(self, text: str) -> str:
        """Cut the key, which servers quote in their errors, out of what we print or write.

        A key too short to be a real one is matched as a whole word, or it would be found in others.
        """
        if self.key == NO_KEY:
            return text
        key = re.escape(self.key)
        return re.sub(key if len(self.key) >= SHORT_KEY else rf"(?<!\w){key}(?!\w)", "[key]", text)


def api_key() -> str:
    """The endpoint's key, from the environment only, so that it is in no shell history.

    Raises:
        UserError: it holds characters that cannot be sent.
    """
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError("OPENAI_API_KEY holds characters that no key can have.", "Set it again.")
    return key or NO_KEY


def pause(attempt: int, after: float | None, jitter: float) -> float:
    """Seconds before the next attempt: what the server asks for, else 0.5 s doubling up to 60 s.

    `jitter` (0 to 1) shortens our own pauses by up to half and lengthens the server's by up to a
    tenth, so that requests that failed together are not retried together.
    """
    if after is not None:
        return after * (1 + jitter / 10)
    return float(min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempt) * (1 - jitter / 2))


def retry_after(headers: Any, now: float) -> float | None:
    """Seconds a response asks to wait: retry-after-ms, or Retry-After (RFC 9110, 10.2.3)."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name)
        try:
            if value is not None and float(value) >= 0:
                return float(value) * unit
        except ValueError:
            try:
                return max(0.0, parsedate_to_datetime(value).timestamp() - now)
            except ValueError:
                continue
    return None


def _error_in(answer: ChatCompletion | Completion) -> dict[str, Any] | None:
    """The error that a reply with status 200 holds, in itself or in its choice."""
    choices = getattr(answer, "choices", None)
    for holder in (answer, choices[0] if isinstance(choices, list) and choices else None):
        error = getattr(holder, "error", None)
        if error:
            return error if isinstance(error, dict) else {"message": str(error)}
    return None


def _read(answer: ChatCompletion | Completion, prompt: str, empty: bool) -> Reply:
    """The text of a completion object, which the client library builds without validation."""
    choices = getattr(answer, "choices", None)
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = getattr(choice, "message", None)
    content = getattr(choice, "text", None)
    if content is None:
        content = getattr(message, "content", None)
    text = _text(content)
    usage = _usage(getattr(answer, "usage", None), prompt, text)
    finish = getattr(choice, "finish_reason", None)
    blank = empty and isinstance(content, str) and finish in ("stop", "length")
    if text.strip() or blank:
        return Reply(text, finish == "length", usage, _top(choice))
    why, remedy = _without_text(message, content, finish, usage)
    if why:
        raise RefusedError(f"the reply has no text: {why}", usage, remedy)
    if empty and choice is not None and finish == "stop":  # null, as some servers write ""
        return Reply("", False, usage)
    raise _TransientError(
        "the reply is empty" if choice else "the reply has no choices", usage=usage
    )


def _top(choice: Any) -> tuple[tuple[str, float], ...]:
    """The likeliest first tokens of a chat's reply, which servers may leave out."""
    first = next(iter(getattr(getattr(choice, "logprobs", None), "content", None) or []), None)
    found = getattr(first, "top_logprobs", None) or []
    pairs = [(getattr(one, "token", None), getattr(one, "logprob", None)) for one in found]
    return tuple(
        (t, float(p)) for t, p in pairs if isinstance(t, str) and isinstance(p, int | float)
    )


def _text(content: Any) -> str:
    """Content as text; of a list of parts, only the text parts (not the reasoning)."""
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        return "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""


def _without_text(message: Any, content: Any, finish: Any, usage: Usage) -> tuple[str, str]:
    """Why a reply has no text, and the remedy; "" and "" where a retry may give one."""
    thinking = 'Reduce thinking, for example: --extra \'{"reasoning_effort": "low"}\''
    if finish == "length":
        return f"its {usage.tokens_out:,} tokens held no answer (finish_reason length)", (
            f"Raise --max_tokens, and give another --output. {thinking}."
        )
    if finish == "content_filter":
        return "the endpoint's content filter removed it", ""
    if getattr(message, "refusal", None):
        return f"the model declined ({message.refusal})", ""
    if getattr(message, "tool_calls", None):
        return "it calls a tool", "Use a model or an endpoint without tools."
    if any(getattr(message, name, None) for name in ("reasoning_content", "reasoning")):
        return "it holds only reasoning", f"{thinking}; give another --output."
    if content and not isinstance(content, str):
        return f"its content is {str(content)[:80]}", "Use an endpoint that answers with text."
    return "", ""


def _usage(reported: Any, prompt: str, text: str) -> Usage:
    tokens_in = getattr(reported, "prompt_tokens", None)
    tokens_out = getattr(reported, "completion_tokens", None)
    if isinstance(tokens_in, int) and isinstance(tokens_out, int):
        return Usage(tokens_in, tokens_out)
    return Usage(estimate(prompt), estimate(text), estimated=True)


def estimate(text: str) -> int:
    """Estimate how many tokens a text has."""
    return len(text) // CHARACTERS_PER_TOKEN + 1
