"""The answers of /v1 as OpenAI's clients read them: whole objects, and chunks of a stream."""

import codecs
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


@dataclass
class Choice:
    """One answer, and how much of it has been sent."""

    index: int
    job: Job
    completion: Completion
    echoed: str | None = None  # the prompt's text, if it comes first
    hidden: bool = False  # only the prompt was asked for
    sent: int = 0  # entries of `completion.scored`
    length: int = 0  # characters sent
    done: bool = False

    def reason(self) -> str | None:
        """OpenAI's finish_reason; None while it is going on."""
        if not self.completion.result.done():
            return None
        return REASONS.get(self.completion.result.result().reason, "length")


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
            entry |= self._logprobs(choice, choice.completion.scored, text, whole=True)
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

    def chunks(self) -> list[dict[str, Any]]:
        """A chunk for each choice with new text or that has ended, since the last call.

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
            scored = choice.completion.scored[choice.sent :]
            entry: dict[str, Any] = {"index": choice.index, "finish_reason": reason}
            entry |= self._logprobs(choice, scored, text, whole=reason is not None)
            choice.sent += len(scored)
            if choice.echoed is not None and not choice.length:
                text = choice.echoed + text
            choice.length += len(text)
            choice.done = reason is not None
            if self.chat:
                entry["delta"] = {"content": text} if text else {}
            else:
                entry["text"] = text
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

    def _logprobs(
        self, choice: Choice, scored: Sequence[Scored], text: str, *, whole: bool
    ) -> dict[str, Any]:
        """The entry `logprobs` of a choice, for these tokens of its answer."""
        if not self.logprobs:
            return {"logprobs": None}
        if whole and choice.reason() == "stop":
            scored = self._before_stop(choice, scored)
        if choice.hidden:
            scored = []
        if self.chat:
            return {"logprobs": {"content": [self._chat_entry(one) for one in scored]}}
        first = [] if choice.echoed is None or choice.length else self._prompt_entries(choice.job)
        return {"logprobs": self._columns([*first, *scored], choice.length)}

    def _before_stop(self, choice: Choice, scored: Sequence[Scored]) -> list[Scored]:
        """Without the tokens that lie wholly in a stop text, which is not part of the answer."""
        answer = choice.completion.result.result()
        if answer.reason != "stop":
            return list(scored)
        everything = choice.completion.scored
        starts = self._starts([one.token for one in everything])
        inside = sum(start < len(answer.text) for start in starts)
        return list(scored[: max(0, len(scored) - (len(everything) - inside))])

    def _starts(self, tokens: Sequence[int]) -> list[int]:
        """The character at which each token begins, in their text as the engine decodes it."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        sizes = [len(decoder.decode(self.served.engine.table[token])) for token in tokens]
        return list(accumulate(sizes, initial=0))[:-1]

    def _prompt_entries(self, job: Job) -> list[Scored | int]:
        """The prompt's tokens; the first has no log probability, as nothing comes before it."""
        return [job.request.prompt[0], *job.prompt_scored]

    def _columns(self, entries: Sequence[Scored | int], offset: int) -> dict[str, Any]:
        """The format of completions: a column for each property."""
        columns: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        tokens = [entry if isinstance(entry, int) else entry.token for entry in entries]
        for entry, token, start in zip(entries, tokens, self._starts(tokens), strict=True):
            scored = None if isinstance(entry, int) else entry
            columns["tokens"].append(self.served.token_text(token))
            columns["token_logprobs"].append(None if scored is None else scored.logprob)
            columns["top_logprobs"].append(None if scored is None else self._top(scored))
            columns["text_offset"].append(offset + start)
        return columns

    def _top(self, scored: Scored) -> dict[str, float]:
        """Text to log probability of the likeliest tokens and of the token itself."""
        found: dict[str, float] = {}
        for token, logprob in [*scored.top, (scored.token, scored.logprob)]:
            found.setdefault(self.served.token_text(token), logprob)
        return found

    def _chat_entry(self, scored: Scored) -> dict[str, Any]:
        """The format of chats: an object for each token."""
        top = [self._spelled(token, logprob) for token, logprob in scored.top]
        return {**self._spelled(scored.token, scored.logprob), "top_logprobs": top}

    def _spelled(self, token: int, logprob: float) -> dict[str, Any]:
        spelled = list(self.served.engine.table[token])
        return {"token": self.served.token_text(token), "logprob": logprob, "bytes": spelled}
