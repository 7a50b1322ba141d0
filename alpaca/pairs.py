"""Read preference pairs: a prompt with a chosen and a rejected answer, in the forms in use.

LLaMA-Factory's: `instruction` and `input`, or `conversations`, beside `chosen` and `rejected`.
TRL's: `prompt` as text or as messages, or two whole conversations that begin alike. A message is
{"role", "content"} or {"from", "value"}. The template has a place for one instruction only, so a
system message or an earlier turn is a fault of its record.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alpaca.datafile import MAX_LISTED, DuplicateKeys, audit_command, read_raw
from alpaca.errors import UserError
from alpaca.records import MAX_KEYS, faults, named, notices, to_stderr, unread

ANSWERS = ("chosen", "rejected")
CONVERSATIONS = ("conversations", "messages")
READ = ("instruction", "input", "output", "prompt", *CONVERSATIONS, *ANSWERS)
ROLES = {
    "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "system": "system",
}  # fmt: skip
FORM = (
    'A pair is {"instruction": text, "input": text, "chosen": text, "rejected": text}, or has '
    '"prompt" for the first two; docs/preference.md names the other forms.'
)
Message = tuple[str, str]  # role, text


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One preference: instruction, optional input text, the preferred answer and the other."""

    instruction: str
    input: str = ""
    chosen: str
    rejected: str


class NotAPairError(ValueError):
    """Why an item cannot be read as a preference pair."""


def read_pairs(path: Path, notice: Callable[[str], None] = to_stderr) -> list[Pair]:
    """Read a JSON list or JSONL of preference pairs; `notice` as in `records.read_records`.

    Raises:
        UserError: as `read_raw`; or there are no records, most have no two answers, keys that are
            not read change what a pair means, or some cannot be read (all are counted, and the
            first 50 problems listed).
    """
    items = read_raw(path)
    if not items:
        raise UserError(f"{path} holds no records.", "Give it at least one pair.")
    if not are_pairs(items):
        raise _other_form(path, items)
    found: list[Pair] = []
    problems: list[str] = []
    for index, item in enumerate(items):
        try:
            found.append(pair_of(item))
        except NotAPairError as why:
            problems.append(f"record {index}: {why}")
    if problems:
        raise _listed(path, f"{len(problems):,} problem(s) in {len(items):,} records", problems)
    _check_keys(path, items)
    for text in notices([_others(item) for item in items]):
        notice(f"{path}: {text}")
    if same := sum(pair.chosen == pair.rejected for pair in found):
        notice(f"{path}: {same:,} pair(s) have the same answer twice, and teach nothing")
    return found


def are_pairs(items: Sequence[Any]) -> bool:
    """Whether most items have two answers, of which one is chosen."""
    having = sum(isinstance(item, dict) and all(name in item for name in ANSWERS) for item in items)
    return having * 2 > len(items)


def pair_of(item: Any) -> Pair:
    """Read one item; raises NotAPairError with the reason."""
    if not isinstance(item, dict):
        raise NotAPairError("is not an object")
    if isinstance(item, DuplicateKeys):
        raise NotAPairError(f"{item.duplicate}: occurs more than once")
    (before, chosen), (other, rejected) = (_answer(name, item) for name in ANSWERS)
    if before != other:
        raise NotAPairError("chosen and rejected begin differently: they answer two prompts")
    if item.get("output") not in (None, "", chosen):
        raise NotAPairError("output: a third answer, which is not chosen")
    instruction, extra = _asked(item, before)
    pair = Pair(instruction=instruction, input=extra, chosen=chosen, rejected=rejected)
    for name, answer in zip(ANSWERS, (chosen, rejected), strict=True):
        for why in faults(as_record(pair) | {"output": answer}):
            raise NotAPairError(why.replace("output:", f"{name}:", 1))
    return pair


def as_record(pair: Pair) -> dict[str, str]:
    """The chosen answer as the item of an ordinary record."""
    return {"instruction": pair.instruction, "input": pair.input, "output": pair.chosen}


def examined(item: Any) -> tuple[Any, str | None]:
    """An item as the audit looks at it, its chosen answer as output; and why it is no pair."""
    try:
        return as_record(pair_of(item)) | _others(item), None
    except NotAPairError as why:
        return item, str(why)


def _others(item: dict[str, Any]) -> dict[str, Any]:
    """The keys of an item that are not read."""
    return {key: value for key, value in item.items() if key not in READ}


# ---- one pair


def _answer(name: str, item: dict[str, Any]) -> tuple[list[Message], str]:
    """The messages before an answer, if the item holds them there, and its text."""
    if name not in item:
        raise NotAPairError(f"{name}: is missing")
    value = item[name]
    if isinstance(value, str):
        return [], value
    messages = _messages(name, [value] if isinstance(value, dict) else value)
    if messages[-1][0] != "assistant":
        raise NotAPairError(f"{name}: its last message is not the assistant's")
    return messages[:-1], messages[-1][1]


def _asked(item: dict[str, Any], before: list[Message]) -> tuple[str, str]:
    """The instruction and the input of an item, wherever it holds them."""
    extra = _text("input", item.get("input"))
    found: dict[str, str] = {}
    for name in ("instruction", "prompt"):
        if isinstance(value := item.get(name), list):
            found[name] = _only_request(name, _messages(name, value))
        elif text := _text(name, value):
            found[name] = text
    for name in CONVERSATIONS:
        # some sets repeat the chosen conversation
        if item.get(name) and item[name] != item["chosen"]:
            found[name] = _only_request(name, _messages(name, item[name]))
    if before:
        found["chosen"] = _only_request("chosen", before)
    if not found:
        raise NotAPairError("has no instruction and no prompt")
    if len({*found.values()}) > 1:
        raise NotAPairError(f"{' and '.join(found)} ask different things")
    return next(iter(found.values())), extra


def _text(name: str, value: Any) -> str:
    """A text; "" for null and NaN."""
    if value is None or value != value:
        return ""
    if not isinstance(value, str):
        raise NotAPairError(f"{name}: is not text")
    return value


def _messages(name: str, value: Any) -> list[Message]:
    """The messages of a conversation, in either spelling."""
    if not isinstance(value, list) or not value:
        raise NotAPairError(f"{name}: is neither a text nor a list of messages")
    found = []
    for message in value:
        keys = ("from", "value") if isinstance(message, dict) and "from" in message else None
        role, content = keys or ("role", "content")
        if not isinstance(message, dict) or not isinstance(message.get(content), str):
            raise NotAPairError(f"{name}: a message without a text")
        if message.get(role) not in ROLES:
            raise NotAPairError(f"{name}: a message of role {message.get(role)!r}")
        if more := [key for key in message if key not in (role, content) and message[key]]:
            raise NotAPairError(f"{name}: a message with {named(more[0])}, which is not read")
        found.append((ROLES[message[role]], message[content]))
    return found


def _only_request(name: str, messages: list[Message]) -> str:
    """The user's message, where it is the only one; an empty system message does not count."""
    messages = [(role, text) for role, text in messages if role != "system" or text.strip()]
    if any(role == "system" for role, _ in messages):
        raise NotAPairError(f"{name}: a system message, which the template has no place for")
    if len(messages) > 1:
        raise NotAPairError(f"{name}: earlier turns, which the template has no place for")
    if not messages or messages[0][0] != "user":
        raise NotAPairError(f"{name}: no message of the user")
    return messages[0][1]


# ---- all pairs


def _other_form(path: Path, items: Sequence[Any]) -> UserError:
    counts = Counter(key for item in items if isinstance(item, dict) for key in item)
    keys = ", ".join(f"{named(key)} ({count:,})" for key, count in counts.most_common(MAX_KEYS))
    return UserError(
        f"{path} holds no preference pairs: most of its {len(items):,} records lack chosen or "
        f"rejected. Keys, with counts: {keys}.",
        f"{FORM} For records with one answer, leave --loss dpo out.",
    )


def _check_keys(path: Path, items: Sequence[Any]) -> None:
    """Raise UserError if keys that are not read change what pairs mean."""
    counts: Counter[tuple[str, str]] = Counter()
    first: dict[tuple[str, str], int] = {}
    for index, item in enumerate(items):
        for key, why in unread(as_record(pair_of(item)) | _others(item)).items():
            counts[key, why] += 1
            first.setdefault((key, why), index)
    if counts:
        listed = [
            f"{named(key)} ({count:,} of {len(items):,}, first record {first[key, why]}): {why}"
            for (key, why), count in counts.most_common()
        ]
        dropped = ",".join(sorted({key for key, _ in counts}))
        command = audit_command(path, "--drop", dropped, "--leave_out", "invalid")
        raise UserError(
            f"{path}: keys that are not read change what pairs mean:\n    " + "\n    ".join(listed),
            f"If they do not matter, a copy without these keys:\n    {command}",
        )


def _listed(path: Path, what: str, problems: list[str]) -> UserError:
    more = [f"... and {len(problems) - MAX_LISTED:,} more"] if len(problems) > MAX_LISTED else []
    shown = "\n    ".join([*problems[:MAX_LISTED], *more])
    command = audit_command(path, "--leave_out", "invalid")
    return UserError(
        f"{path}: {what}:\n    {shown}",
        f"{FORM} Indices count from 0.\n  A copy without those records:\n    {command}",
    )
