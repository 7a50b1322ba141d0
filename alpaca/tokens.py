"""Text to token ids; trainer and server share this code, so both see the same ids for a prompt.

A prompt and its answer are encoded separately and joined, so no token spans the boundary. (Joint
tokenization, as in 2023, merges the template's last `:` with the answer's first character in 4-7%
of the examples of two data sets, bench/LOG.md.) An answer is encoded without the space that
SentencePiece tokenizers put before a text: `decode(prompt ids + answer ids)` is the original text,
byte for byte. Text never becomes control tokens: `</s>` in an answer is encoded as characters.
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from alpaca.errors import UserError
from alpaca.pairs import ANSWERS, Pair
from alpaca.prompt import chat_template, render
from alpaca.records import Record


@dataclass(frozen=True)
class Example:
    """One tokenized record: `ids[:prompt_length]` is the prompt; the rest are training targets.

    Those of a pair are its chosen answer and, in the last `rejected_length` places, the other.
    """

    ids: list[int]
    prompt_length: int
    truncated: bool
    rejected_length: int = 0

    @property
    def targets(self) -> int:
        """Number of tokens that are trained on; 0 if the prompt alone reaches the length limit."""
        return max(0, len(self.ids) - self.prompt_length)


class Codec:
    """A tokenizer with this project's rules for prompts and answers.

    `bos` is None if the tokenizer does not add a BOS token by itself. `eos` ends every answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Wrap a loaded tokenizer; raises UserError when it has no fast form or no EOS."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UserError(
                f"{type(tokenizer).__name__} has no fast form (tokenizer.json).",
                "Convert the folder first: python -m alpaca convert",
            )
        if tokenizer.eos_token_id is None:
            raise UserError("The tokenizer has no EOS token, so answers could not end.")
        self.tokenizer = tokenizer
        self.eos: int = tokenizer.eos_token_id
        self.bos: int | None = tokenizer.bos_token_id if _adds_bos(tokenizer) else None
        definition = json.loads(backend.to_str())
        definition["truncation"] = definition["padding"] = definition["post_processor"] = None
        self._start = _backend(definition)
        self._continue = _backend(without_leading_space(definition))
        added = [token for token in definition["added_tokens"] if token["special"]]
        self._controls = {token["content"]: token for token in added}
        # longest first; some take the spaces beside them, as the tokenizer's own pattern does
        spelled = [
            r"\s*" * token["lstrip"] + re.escape(name) + r"\s*" * token["rstrip"]
            for name, token in sorted(self._controls.items(), key=lambda one: -len(one[0]))
        ]
        self._pattern = re.compile(f"({'|'.join(spelled)})")
        # whether the tokenizer puts a space before a text that follows a control token
        after = backend.encode(f"{tokenizer.eos_token}a", add_special_tokens=False).ids[1:]
        spaced = after == self._start.encode("a", add_special_tokens=False).ids
        self._later = self._start if spaced else self._continue

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts that start a sequence, with exactly one BOS if the tokenizer uses one."""
        head = [] if self.bos is None else [self.bos]
        encoded = self._start.encode_batch_fast(list(texts), add_special_tokens=False)
        return [head + encoding.ids for encoding in encoded]

    def answers(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts that continue a prompt, without EOS."""
        encoded = self._continue.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def prompt(self, instruction: str, input: str = "") -> list[int]:  # noqa: A002
        """Ids of a rendered prompt: the server's input, and the start of a training example."""
        return self.prompts([render(instruction, input)])[0]

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a conversation as the folder's chat template writes it, up to the next answer.

        A folder without one is asked in this project's. Control tokens come from the template
        only: in a message they are text. One user message has the ids of `prompt`, if the template
        is this project's.

        Raises:
            UserError: the template refuses the messages.
        """
        told = "\0".join(message["content"] for message in messages)
        inside = [control for control in self._controls if control in told]
        mark = secrets.token_hex(8)  # stands for the control tokens in messages while they are text
        marks = {f"{mark}{number}.": control for number, control in enumerate(inside)}
        masked = [dict(message) for message in messages]
        for mask, control in marks.items():
            for message in masked:
                message["content"] = message["content"].replace(control, mask)
        ours = None if self.tokenizer.chat_template else chat_template(self.bos is not None)
        try:
            text = self.tokenizer.apply_chat_template(
                masked, chat_template=ours, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template is a program of the folder's
            raise UserError(f"The chat template refuses these messages: {error}") from None
        if text.count(mark) != sum(text.count(mask) for mask in marks):
            raise UserError("The chat template changes control tokens inside the messages.")
        ids: list[int] = []
        for part in self._pattern.split(text) if self._controls else [text]:
            if (control := part.strip()) in self._controls:
                ids.append(self._controls[control]["id"])
                continue
            for mask, control in marks.items():
                part = part.replace(mask, control)
            first = not ids or ids == [self.bos]
            backend = self._start if first else self._later
            ids += backend.encode(part, add_special_tokens=False).ids if part else []
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a whole sequence, without control tokens."""
        text: str = self._start.decode(list(ids), skip_special_tokens=True)
        return text

    def examples(
        self, records: Sequence[Record], max_length: int, *, joint: bool = False
    ) -> list[Example]:
        """Tokenize records: prompt + answer + EOS, cut at `max_length` tokens.

        `joint` tokenizes prompt and answer as one text, as the recipe of 2023 did. The loss mask
        then covers as many tokens as the prompt has when it is tokenized alone.
        """
        texts = [render(record.instruction, record.input) for record in records]
        prompts = self.prompts(texts)
        if joint:
            both = [text + record.output for text, record in zip(texts, records, strict=True)]
            wholes = self.prompts(both)
        else:
            answers = self.answers([record.output for record in records])
            wholes = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        return [
            Example(
                ids=[*whole, self.eos][:max_length],
                prompt_length=min(len(prompt), max_length),
                truncated=len(whole) + 1 > max_length,
            )
            for whole, prompt in zip(wholes, prompts, strict=True)
        ]

    def pairs(self, pairs: Sequence[Pair], max_length: int) -> list[Example]:
        """Tokenize pairs: each answer as `examples` does after its prompt, cut at `max_length`."""
        chosen, rejected = (
            self.examples(
                [
                    Record(instruction=p.instruction, input=p.input, output=getattr(p, answer))
                    for p in pairs
                ],
                max_length,
            )
            for answer in ANSWERS
        )
        return [
            Example(
                ids=[*good.ids, *bad.ids[bad.prompt_length :]],
                prompt_length=good.prompt_length,
                truncated=good.truncated or bad.truncated,
                rejected_length=bad.targets,
            )
            for good, bad in zip(chosen, rejected, strict=True)
        ]


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a").input_ids[:1] == [bos]


def _backend(definition: dict[str, Any]) -> Tokenizer:
    backend = Tokenizer.from_str(json.dumps(definition))
    backend.encode_special_tokens = True  # "</s>" in a text stays text
    return backend


def without_leading_space(definition: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer for text that continues another: no leading space is added."""
    return definition | {
        key: _strip_prefix(definition[key]) for key in ("normalizer", "pre_tokenizer")
    }


def _strip_prefix(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """Remove each of the three settings with which tokenizer.json adds a leading space."""
    if part is None or part["type"] == "Prepend":
        return None
    if part["type"] == "Sequence":
        key = "normalizers" if "normalizers" in part else "pretokenizers"
        stripped = [_strip_prefix(child) for child in part[key]]
        return part | {key: [child for child in stripped if child is not None]}
    if part["type"] == "Metaspace":
        return part | {"prepend_scheme": "never"}
    if part["type"] == "ByteLevel":
        return part | {"add_prefix_space": False}
    return part
