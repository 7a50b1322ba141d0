"""Parse a teacher's reply into tasks, in the many forms in which models write lists.

A reply can be numbered blocks (`4. Instruction: ... 4. Input: ... 4. Output: ...`, with or without
numbers, bold, headings, separators) or JSON (a list, an object holding one, one object per line,
fenced or not). A model's thoughts are removed first, because drafts in them are not tasks. No reply
raises an exception: what cannot be parsed is left out, as is the last task of a truncated reply.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

FIELDS = ("instruction", "input", "output")
NO_INPUT = {"", "-", "none", "n/a", "noinput", "no input", "null", "empty"}

# How models mark their thoughts: `<think>` (DeepSeek, Qwen), `[THINK]` (Mistral), `◁think▷` (Kimi),
# `<seed:think>`, `<|begin_of_thought|>`, and gpt-oss's channels, of which `final` is the answer.
_NAME = "(?:seed:)?(?:think(?:ing)?|thoughts?|reasoning|scratchpad)"
_OPENING = (
    rf"<{_NAME}>|\[THINK\]|◁think▷|<\|begin_of_thought\|>"
    r"|<\|channel\|>(?:analysis|commentary)<\|message\|>"
)
_CLOSING = rf"</{_NAME}>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>|<\|channel\|>final<\|message\|>"
THOUGHT_MARK = re.compile(f"{_OPENING}|{_CLOSING}", flags=re.IGNORECASE)
CLOSING_MARK = re.compile(_CLOSING, flags=re.IGNORECASE)
# A thought with no other thought inside it.
THOUGHT = re.compile(
    rf"(?:{_OPENING})(?:(?!{_OPENING}).)*?(?:{_CLOSING})", flags=re.IGNORECASE | re.DOTALL
)

HEADER = re.compile(
    r"^[ \t>*_#-]*(?P<number>(?:task[ \t]*)?\d+[ \t]*[.):][ \t]*)?[*_]*"
    r"(?P<field>instruction|input|output)[*_]*[ \t]*:[*_]*",
    flags=re.IGNORECASE | re.MULTILINE,
)
# Text between two blocks: lines of ###, --- or ***, then perhaps the next block's number.
SEPARATOR = re.compile(
    r"(?:^|\n)[ \t]*(?:#{3,}|-{3,}|\*{3,})[ \t]*(?:\n[ \t]*(?:task[ \t]*)?\d*[.):]*[ \t]*)?\s*\Z",
    flags=re.IGNORECASE,
)
# The last line of ###, followed by nothing but a fragment of the next block's first line.
CLOSING = re.compile(r"\n[ \t]*#{3,}[ \t]*\n(?!.*:).*\Z")


class Task(NamedTuple):
    """One task as the teacher wrote it; any field may be empty."""

    instruction: str
    input: str
    output: str


def parse(text: str, *, cut: bool = False) -> list[Task]:
    """Read every task of a reply, in its order; `cut` means that it was cut at the token limit."""
    text = without_thoughts(text)
    return _from_blocks(text, cut) or _from_json(text)


def without_thoughts(text: str) -> str:
    """A reply without its thoughts.

    Removes text between an opening and a closing mark, all text before a lone closing mark, and all
    text after a lone opening mark (the reply was cut inside a thought).
    """
    while (shorter := THOUGHT.sub("\n", text)) != text:
        text = shorter
    marks = list(THOUGHT_MARK.finditer(text))
    closing = [mark.end() for mark in marks if CLOSING_MARK.fullmatch(mark[0])]
    text = text[closing[-1] :] if closing else text
    opening = THOUGHT_MARK.search(text)
    return text[: opening.start()] if opening else text


def block(number: int, task: Task) -> str:
    """One task as a numbered block: the form that a request asks for and shows in its examples."""
    return (
        f"{number}. Instruction: {task.instruction}\n"
        f"{number}. Input:\n{task.input or '<noinput>'}\n"
        f"{number}. Output:\n{task.output}\n###"
    )


def _from_blocks(text: str, cut: bool) -> list[Task]:
    closed = CLOSING.search(text)
    if cut and closed:
        text, cut = text[: closed.start()], False  # only what follows the last ### is lost
    tasks = []
    for headers in _groups(list(HEADER.finditer(text))):
        fields = dict.fromkeys(FIELDS, "")
        for header, end in headers:
            content = text[header.end() : len(text) if end is None else end]
            fields[header["field"].lower()] = SEPARATOR.sub("", content.rstrip()).strip()
        tasks.append(Task(fields["instruction"], _input(fields["input"]), fields["output"]))
    return tasks[:-1] if cut else tasks


def _groups(headers: list[re.Match[str]]) -> list[list[tuple[re.Match[str], int | None]]]:
    """Headers of each task, each with the position where its content ends (None: end of text).

    A header counts only if its field comes after the task's previous field, so that `Input:` and
    `Output:` inside an answer stay text. If a reply's first header is numbered, only numbered
    headers count.
    """
    numbered = bool(headers) and headers[0]["number"] is not None
    groups: list[list[re.Match[str]]] = []
    for header in headers:
        place = FIELDS.index(header["field"].lower())
        if numbered and header["number"] is None:
            continue
        if place == 0:
            groups.append([header])
        elif groups and place > FIELDS.index(groups[-1][-1]["field"].lower()):
            groups[-1].append(header)
    flat = [header for group in groups for header in group]
    ends = [*[header.start() for header in flat[1:]], None] if flat else []
    end = dict(zip([header.start() for header in flat], ends, strict=True))
    return [[(header, end[header.start()]) for header in group] for group in groups]


def _from_json(text: str) -> list[Task]:
    decoder = json.JSONDecoder(strict=False)  # models write raw newlines into strings
    tasks: list[Task] = []
    at = text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            tasks += _tasks_in(value)
        at = text.find("{", end)
    return tasks


def _tasks_in(value: Any) -> Iterator[Task]:
    """Every task object inside a JSON value; `{"tasks": [...]}` is a common wrapping."""
    if isinstance(value, dict):
        named = {str(key).strip().lower(): part for key, part in value.items()}
        if "instruction" in named:
            instruction, given, output = (_text(named.get(field)) for field in FIELDS)
            yield Task(instruction, _input(given), output)
            return
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _tasks_in(part)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value.strip() if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _input(text: str) -> str:
    """The input; empty where the teacher wrote that there is none."""
    return "" if text.strip("<>()[]. \n").lower() in NO_INPUT else text
