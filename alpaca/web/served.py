"""A model that the web server asks: its engine, its tokenizer, and how text becomes ids."""

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from alpaca.errors import UserError
from alpaca.serving.border import BusyError, Engine, EngineStoppedError
from alpaca.serving.request import Job, Request, Sampling
from alpaca.tokens import Codec
from alpaca.web.bodies import ChatBody, Common, CompletionBody, Message
from alpaca.web.errors import ApiError

Number = TypeVar("Number", int, float)
LONG_TEXT = 10_000  # bytes; a shorter text is tokenized within a few milliseconds
TURN = 200  # bytes, about, that a template adds to a message
PROMPTS = 256  # in one request
COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for completions


@dataclass
class Served:
    """A loaded model, or an adapter of one, under the id that requests name.

    adapter: its name in the engine; empty for a model without adapters.
    """

    name: str
    engine: Engine
    codec: Codec
    created: int = field(default_factory=lambda: int(time.time()))
    adapter: str = ""

    def listed(self) -> "list[Served]":
        """The base under its own id, and its adapters; the one that answers by default first."""
        adapters = self.engine.adapters
        found = [replace(self, adapter=adapters.base)] + [
            replace(
                self,
                name=one.name,
                adapter=one.name,
                codec=one.codec or self.codec,
                created=one.created,
            )
            for one in adapters.loaded
        ]
        return sorted(found, key=lambda one: one.adapter != adapters.default)

    @property
    def context(self) -> int:
        """Most tokens of a prompt and its answer together."""
        return self.engine.capacity.length

    def submit(self, requests: Sequence[Request], notify: Callable[[], None]) -> list[Job]:
        """Queue requests, all or none.

        Raises:
            ApiError: 400 where the engine refuses one, 429 if the queue is full, 503 if the engine
                has stopped.
        """
        jobs: list[Job] = []
        try:
            for request in requests:
                jobs.append(self.engine.submit(request, notify))
        except BaseException as error:
            for job in jobs:
                job.cancel()
            raise translated(error) from None
        return jobs

    async def ids(self, texts: list[str]) -> list[tuple[int, ...]]:
        """The ids of texts that start a sequence, as `/predictions` encodes its prompt."""
        found = await self._encoded(texts, lambda: self.codec.prompts(texts))
        return [tuple(ids) for ids in found]

    async def chat(self, messages: list[Message]) -> tuple[int, ...]:
        """The ids of a conversation, through the folder's chat template."""
        if messages[-1].role != "user":
            raise ApiError(400, "The last message must be the user's.", param="messages")
        turns = [{"role": role(turn), "content": content(turn)} for turn in messages]
        text = "".join(turn["content"] for turn in turns)
        [ids] = await self._encoded([text], lambda: [self.codec.chat(turns)], TURN * len(turns))
        return tuple(ids)

    async def chats_as(self, text: str, ids: tuple[int, ...]) -> bool:
        """Whether a chat of this one message has these ids: not with another project's template."""
        try:
            return (
                await self.chat([Message.model_validate({"role": "user", "content": text})]) == ids
            )
        except ApiError:
            return False

    async def _encoded(
        self, texts: list[str], encode: Callable[[], list[list[int]]], more: int = 0
    ) -> list[list[int]]:
        """Encode in a thread if it takes long; refuse before tokenizing what cannot fit.

        `more`: bytes that a template adds to the texts.
        """
        try:
            sizes = [len(text.encode()) for text in texts]
            self.engine.check_text(max(sizes))
            short = sum(sizes) + more <= LONG_TEXT
            found = encode() if short else await asyncio.to_thread(encode)
        except UnicodeEncodeError:
            raise ApiError(400, "The text holds half of a surrogate pair.") from None
        except UserError as error:
            raise translated(error) from None
        return found

    def token_text(self, token: int) -> str:
        """A token as text: what it adds, a control token's name, or `bytes:...` if not UTF-8."""
        spelled = self.engine.table[token]
        if not spelled:
            return str(self.codec.tokenizer.convert_ids_to_tokens(token) or "")
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


def role(turn: Message) -> str:
    """The role as chat templates name it."""
    return "system" if turn.role == "developer" else turn.role


def content(turn: Message) -> str:
    """A message's text; parts are joined without anything between, as our chat template does."""
    if isinstance(turn.content, str):
        return turn.content
    return "".join(part.text for part in turn.content)


def translated(error: BaseException) -> BaseException:
    """The engine's errors as HTTP ones; others stay as they are."""
    if isinstance(error, UserError):
        return ApiError(400, f"{error.happened} {error.remedy}".strip())
    if isinstance(error, BusyError):
        return ApiError(429, str(error))
    if isinstance(error, EngineStoppedError):
        return ApiError(503, "The model has stopped; the server must be started again.")
    return error


def sampling(body: Common) -> Sampling:
    """How to draw; what a request leaves out has OpenAI's default."""
    return Sampling(
        temperature=_or(body.temperature, 1.0),
        top_p=_or(body.top_p, 1.0),
        top_k=max(0, _or(body.top_k, 0)),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        # the generator takes no negative numbers
        seed=secrets.randbits(32) if body.seed is None else body.seed % 2**64,
    )


def _or(given: Number | None, default: Number) -> Number:
    return default if given is None else given


def request(
    served: Served,
    body: Common,
    prompt: tuple[int, ...],
    most: int | None,
    logprobs: int | None,
    *,
    prompt_logprobs: bool = False,
) -> Request:
    """The engine's request for one prompt; `most` tokens, or as many as fit."""
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return Request(
        prompt,
        n=body.n or 1,
        total_tokens=served.context,
        max_new_tokens=most,
        stop=tuple(stop),
        sampling=sampling(body),
        ignore_ends=bool(body.ignore_eos),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        adapter=served.adapter,
    )


async def chat_request(served: Served, body: ChatBody) -> Request:
    """The request of a chat completion."""
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true.", param="top_logprobs")
    counts = (body.top_logprobs or 0) if body.logprobs else None
    both = body.max_completion_tokens, body.max_tokens
    most = both[0] if both[0] is not None else both[1]
    return request(served, body, await served.chat(body.messages), most, counts)


async def completion_requests(served: Served, body: CompletionBody) -> list[Request]:
    """The requests of a completion, one for each prompt."""
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise ApiError(400, "best_of may only be the value of n.", param="best_of")
    most = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    if most == 0 and not body.echo:
        raise ApiError(400, "max_tokens 0 needs echo.", param="max_tokens")
    prompts = await _prompts(served, body)
    scored = bool(body.echo) and body.logprobs is not None
    # the logits of a prompt come with its first token, which max_tokens 0 then drops
    return [
        request(served, body, ids, max(most, 1), body.logprobs, prompt_logprobs=scored)
        for ids in prompts
    ]


async def _prompts(served: Served, body: CompletionBody) -> list[tuple[int, ...]]:
    given = body.prompt
    if isinstance(given, str):
        return await served.ids([given])
    if not given or (len(given) > PROMPTS and not isinstance(given[0], int)):
        raise ApiError(400, f"prompt holds 1 to {PROMPTS} prompts.", param="prompt")
    texts = [one for one in given if isinstance(one, str)]
    if texts:
        return await served.ids(texts)
    many = [tuple(one) for one in given if isinstance(one, list)]
    return many or [tuple(one for one in given if isinstance(one, int))]
