"""What a request asks of the teacher, and which of the tasks it returns are dropped.

The requirements and filters are those of the recipe of 2023 (Wang et al., "Self-Instruct", 2022;
Taori et al., "Stanford Alpaca", 2023); the wording is ours. Examples are numbered from 1 and new
tasks continue the numbering, so a teacher that just continues the list uses the right numbers.
"""

import re
import unicodedata
from collections.abc import Sequence

from alpaca.dataset.reply import Task, block

EXAMPLES = 3
LEAST_WORDS = 3
MOST_WORDS = 150

REQUEST = """\
You write tasks for teaching a language model to follow instructions. {examples} tasks are given \
at the end; write {count} new ones, numbered {first} to {last}.

What the set of tasks must be like:
- Hardly any verb opens two instructions. Cover many verbs.
- Some instructions are questions, others are imperatives.
- The kinds of task differ: open questions, explanations, classification, extraction, editing, \
summaries, translation, planning, reasoning, stories and poems, code.
- A model that only reads and writes text can do each of them completely. Nothing needs a picture, \
a sound, a video, a file, the web, the present date or an action in the world.

What each task must be like:
- Everything is in English, apart from the foreign words of a translation.
- The instruction is one or two sentences.
- The input is the particular text or data that the instruction is about: realistic, concrete, at \
most 100 words, never a placeholder. Where the instruction stands by itself, such as a question of \
general knowledge, write <noinput>.
- The output is a right and complete answer, as short as it can be, below 100 words.

Give each task exactly this form, and nothing before, between or after the tasks:

N. Instruction: the instruction
N. Input:
the input or <noinput>
N. Output:
the answer
###

{shown}
"""

# What a model that only reads and writes text cannot show, open or do.
MEDIA = re.compile(
    r"\b(?:audio|diagrams?|draw|files?|flow ?charts?|graphs?|images?|maps?|music|photos?|pictures?"
    r"|plots?|screenshots?|videos?|go to)\b",
    flags=re.IGNORECASE,
)


def request(examples: Sequence[Task], count: int) -> str:
    """The text of one request: the requirements and the examples, ending where task N begins."""
    shown = "\n".join(block(number, task) for number, task in enumerate(examples, start=1))
    first = len(examples) + 1
    return REQUEST.format(
        examples=len(examples), count=count, first=first, last=first + count - 1, shown=shown
    )


def opening(examples: Sequence[Task]) -> str:
    """The start of the reply, which the prompt ends with and a completion continues."""
    return f"{len(examples) + 1}. Instruction:"


def fault(task: Task) -> str | None:
    """Why the recipe drops a task, whatever else is kept: one word, or None when it does not."""
    length = len(task.instruction.split())
    checks = (
        ("not_text", not all(map(_is_text, task))),
        ("no_instruction", not task.instruction),
        ("no_output", not task.output),
        ("too_short", length < LEAST_WORDS),
        ("too_long", length > MOST_WORDS),
        ("needs_media", bool(MEDIA.search(task.instruction))),
        # The recipe's reason: it is unclear whether the program or its result is wanted.
        ("write_program", task.instruction.lower().startswith("write a program")),
        ("starts_non_ascii", not task.instruction[:1].isascii()),
        ("starts_punctuation", unicodedata.category(task.instruction[:1] or "a")[0] in "PS"),
    )
    return next((reason for reason, wrong in checks if wrong), None)


def _is_text(text: str) -> bool:
    """Whether there are no lone surrogates and no control characters except tab and line ends."""
    return not re.search(r"[\ud800-\udfff\x00-\x08\x0b\x0c\x0e-\x1f]", text)
