"""The answers of /v1 as OpenAI's clients read them: whole objects, and chunks of a stream."""

import codecs
import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from alpaca.serving.request import Completion, Job, Scored
from alpaca.web.served import Served

# the engine's reasons; an answer that ended by itself or at a stop text has stopped
REASONS = {"eos": "stop", "stop": "stop"}


def decoder() -> codecs.IncrementalDecoder:
    """As the engine decodes an answer's bytes."""
    return codecs.getincrementaldecoder("utf-8")("replace")


@dataclass
class Choice:
    """One answer, and how much of it has been sent.

    starts: the character of the answer at which each token of `completion.scored` begins.
    """

    index: int
    job: Job
    completion: Completion
    echoed: str | None = None  # the prompt's text, if it comes first
    hidden: bool = False  # only the prompt was asked for
    begun: bool = False  # whether anything was sent
    sent: int = 0  # entries of `completion.scored`
    length: int = 0  # characters of the answer that were sent
    done: bool = False
    starts: list[int] = field(default_factory=list)
    size: int = 0  # characters of all tokens in `starts`
    decoder: codecs.IncrementalDecoder = field(default_factory=decoder)

    def reason(self) -> str | None:
        """OpenAI's finish_reason; None while it is going on."""
        if not self.completion.result.done():
            return None
        reason = self.completion.result.result().reason
        return "length" if self.hidden else REASONS.get(reason, "length")

    def scored(self, table: Sequence[bytes], text: str, ended: bool) -> list[tuple[Scored, int]]:
        """The tokens, with their starts, of a piece of text that is sent after all before it.

        Text may be held back, as the beginning of a stop text or of a character; so are its tokens.
        A stop text is not part of an answer, nor are the tokens that lie wholly in it.
        """
        everything = self.completion.scored
        for one in everything[len(self.starts) :]:
            self.starts.append(self.size)
            self.size += len(self.decoder.decode(table[one.token]))
        self.length += len(text)
        rest = ended and self.completion.result.result().reason != "stop"
        first = self.sent
        while self.sent < len(everything) and (rest or self.starts[self.sent] < self.length):
            self.sent += 1
        return list(zip(everything[first : self.sent], self.starts[first : self.sent], strict=True))


@dataclass
class Writer:
    """Writes the answers to one request. `chat` chooses the kind of object."""

    served: Served
    jobs: Sequence[Job]
    chat: bool
    logprobs: bool = False
    echoed: Sequence[str] = ()
    hidden: bool = False
    choices: list[Choice] = field(init=False)
    identifier: str = field(init=False)
    created: int = field(init=False)

    def __post_init__(self) -> None:
        """Number the choices over all prompts."""
        self.choices = []
        for number, job in enumerate(self.jobs):
            echoed = self.echoed[number] if self.echoed else None
            for completion in job.completions:
                at = len(self.choices)
                self.choices.append(Choice(at, job, completion, echoed, self.hidden))
        self.identifier = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def whole(self) -> dict[str, Any]:
        """The answer of a request that is not streamed; every choice has ended."""
        choices = []
        for choice in self.choices:
            answer = choice.completion.result.result()
            text = "" if choice.hidden else answer.text
            entry: dict[str, Any] = {"index": choice.index, "finish_reason": choice.reason()}
            entry |= self._logprobs(choice, text, ended=True)
            if self.chat:
                entry["message"] = {"role": "assistant", "content": text, "refusal": None}
            else:
                entry["text"] = (choice.echoed or "") + text
            choices.append(entry)
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": self.usage()}

    def first(self) -> list[dict[str, Any]]:
        """The chunks before any text: the role of a chat's answers."""
        if not self.chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [self._chunk({"index": c.index, "delta": delta}) for c in self.choices]

    def chunks(self, *, counted: bool = False) -> list[dict[str, Any]]:
        """A chunk for each choice with new text or that has ended, since the last call.

        `counted` adds to each the number of tokens of its own answer, which `usage` cannot tell.

        Raises:
            Exception: the one that ended a choice's generation.
        """
        found = []
        for choice in self.choices:
            if choice.done:
                continue
            reason = choice.reason()  # before the text is taken: all of it is there if it has ended
            text = choice.completion.ready()
            if choice.hidden:
                text = ""
            if not text and reason is None:
                continue
            entry: dict[str, Any] = {"index": choice.index, "finish_reason": reason}
            entry |= self._logprobs(choice, text, ended=reason is not None)
            if choice.echoed is not None and not choice.begun:
                text = choice.echoed + text
            choice.begun = True
            choice.done = reason is not None
            if self.chat:
                entry["delta"] = {"content": text} if text else {}
            else:
                entry["text"] = text
            if counted:
                entry["generated_tokens"] = choice.completion.generated
            found.append(self._chunk(entry))
        return found

    def last(self) -> dict[str, Any]:
        """The chunk with the usage, after all choices have ended."""
        return {**self._head(self._stream_kind), "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Tokens of prompts and answers so far; a prompt counts once, whatever n is."""
        prompt = sum(len(job.request.prompt) for job in self.jobs)
        made = 0 if self.hidden else sum(c.completion.generated for c in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
        }

    @property
    def ended(self) -> bool:
        """Whether every choice has been sent to its end."""
        return all(choice.done for choice in self.choices)

    @property
    def _stream_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.identifier,
            "object": kind,
            "created": self.created,
            "model": self.served.name,
        }

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        choice.setdefault("finish_reason", None)
        return {**self._head(self._stream_kind), "choices": [choice]}

    def _logprobs(self, choice: Choice, text: str, *, ended: bool) -> dict[str, Any]:
        """The entry `logprobs` of a choice, for the tokens of this piece of its answer."""
        if not self.logprobs:
            return {"logprobs": None}
        table = self.served.engine.table
        scored = [] if choice.hidden else choice.scored(table, text, ended)
        if self.chat:
            return {"logprobs": {"content": [self._chat_entry(one) for one, _ in scored]}}
        columns: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        if choice.echoed is not None and not choice.begun:
            self._add_prompt(columns, choice.job, len(choice.echoed))
        for one, start in scored:
            self._add(columns, one.token, one, len(choice.echoed or "") + start)
        return {"logprobs": columns}

    def _add_prompt(self, columns: dict[str, list[Any]], job: Job, length: int) -> None:
        """The prompt's tokens; the first has no log probability, as nothing comes before it.

        Their text may be longer than the prompt's, whose first token has a space that tokenizers
        leave out.
        """
        spelled = [self.served.engine.table[token] for token in job.request.prompt]
        decoded = decoder()
        sizes = [len(decoded.decode(one)) for one in spelled]
        more = sum(sizes) - length
        starts = accumulate(sizes, initial=0)
        for token, one, start in zip(
            job.request.prompt, [None, *job.prompt_scored], starts, strict=False
        ):
            self._add(columns, token, one, max(0, start - more))

    def _add(
        self, columns: dict[str, list[Any]], token: int, scored: Scored | None, start: int
    ) -> None:
        """A row of the format of completions."""
        columns["tokens"].append(self.served.token_text(token))
        columns["token_logprobs"].append(None if scored is None else number(scored.logprob))
        columns["top_logprobs"].append(None if scored is None else self._top(scored))
        columns["text_offset"].append(start)

    def _top(self, scored: Scored) -> dict[str, float | None]:
        """Text to log probability of the likeliest tokens and of the token itself."""
        found: dict[str, float | None] = {}
        for token, logprob in [*scored.top, (scored.token, scored.logprob)]:
            found.setdefault(self.served.token_text(token), number(logprob))
        return found

    def _chat_entry(self, scored: Scored) -> dict[str, Any]:
        """The format of chats: an object for each token."""
        top = [self._spelled(token, logprob) for token, logprob in scored.top]
        return {**self._spelled(scored.token, scored.logprob), "top_logprobs": top}

    def _spelled(self, token: int, logprob: float) -> dict[str, Any]:
        spelled = list(self.served.engine.table[token])
        told = self.served.token_text(token)
        return {"token": told, "logprob": number(logprob), "bytes": spelled}


def number(value: float) -> float | None:
    """A log probability as JSON has it: null if it is infinite or not a number."""
    return value if math.isfinite(value) else None
