"""What comes out of a teacher's reply, however it is numbered, marked up or cut."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alpaca.dataset.recipe import fault, opening, request
from alpaca.dataset.reply import NO_INPUT, Task, block, parse

TASKS = [
    Task("Name three rivers.", "", "1. Nile\n2. Loire\n3. Mekong"),
    Task("Sort the numbers.", "5, 3, 9", "3, 5, 9"),
    Task("Show a call and its result.", "", "Input: [1, 2]\nOutput: 3"),
]


def blocks(tasks: list[Task], first: int = 4) -> str:
    return "\n".join(block(number, task) for number, task in enumerate(tasks, start=first))


def objects(tasks: list[Task]) -> list[dict[str, str]]:
    return [task._asdict() for task in tasks]


@pytest.mark.parametrize(
    "text",
    [
        blocks(TASKS),
        "Sure! Here are the tasks:\n\n" + blocks(TASKS),
        blocks(TASKS, first=1),
        re.sub(r"(?m)^\d+\. (?=Instr)", "7. ", blocks(TASKS)),
        re.sub(r"(?m)^(\d+\. (?:Instruction|Input|Output):)", r"**\1**", blocks(TASKS)),
        re.sub(r"(?m)^(\d+)\. (?=I|O)", r"### Task \1: ", blocks(TASKS)).replace("\n###\n", "\n\n"),
        blocks(TASKS).replace("\n###", "\n\n---\n"),
        blocks(TASKS) + "\n7.",
        blocks(TASKS).replace("\n", "\r\n"),
        json.dumps(objects(TASKS)),
        json.dumps({"tasks": objects(TASKS)}, indent=2),
        "```json\n" + json.dumps(objects(TASKS)) + "\n```",
        "\n".join(json.dumps(item) for item in objects(TASKS)),
    ],
)
def test_tasks_are_read_whatever_the_form(text: str) -> None:
    found = [Task(*(field.replace("\r\n", "\n") for field in task)) for task in parse(text)]
    assert found == TASKS


DRAFT = block(1, Task("Name a draft.", "", "No.")) + '\n{"instruction": "Draft", "output": "no"}\n'


@pytest.mark.parametrize(
    "form", [blocks(TASKS), json.dumps(objects(TASKS)), json.dumps({"tasks": objects(TASKS)})]
)
@pytest.mark.parametrize(
    "before",
    [
        f"<think>\n{DRAFT}</think>\n\n",
        f"{DRAFT}</think>\n\n",
        f"<thinking>{DRAFT}</thinking>",
        f"<THINK>{DRAFT}<think>{DRAFT}</think>{DRAFT}</THINK>\n",
        f"<think>{DRAFT}</think>\n<think>{DRAFT}</think>\n",
        f"[THINK]{DRAFT}[/THINK]",
        f"◁think▷{DRAFT}◁/think▷",
        f"<|begin_of_thought|>{DRAFT}<|end_of_thought|>\n",
        f"<|channel|>analysis<|message|>{DRAFT}<|end|><|start|>assistant<|channel|>final<|message|>",
    ],
)
def test_what_a_model_drafts_while_it_thinks_is_no_task(before: str, form: str) -> None:
    assert parse(before + form) == TASKS


def test_thoughts_between_and_after_tasks_are_left_out_and_the_tasks_kept() -> None:
    first, rest = blocks(TASKS[:1]), blocks(TASKS[1:], first=5)
    assert parse(f"{first}\n<think>{DRAFT}</think>\n{rest}") == TASKS
    assert parse(f"{first}\n{rest}\n<think>{DRAFT}") == TASKS
    assert parse(f"<think>{DRAFT}") == []


def test_unnumbered_blocks_keep_list_items_and_field_names_inside_answers() -> None:
    text = re.sub(r"(?m)^\d+\. (?=Instr|Input:|Output:)", "", blocks(TASKS))
    assert parse(text) == TASKS


def test_a_completion_goes_on_after_the_opening() -> None:
    text = request(TASKS, 20)
    assert text.endswith("###\n")
    assert "numbered 4 to 23" in text
    assert opening(TASKS) == "4. Instruction:"
    reply = blocks(TASKS).removeprefix("4. Instruction:")
    assert parse(opening(TASKS) + reply) == TASKS


@given(st.data())
def test_a_reply_cut_anywhere_loses_only_its_last_task(data: st.DataObject) -> None:
    form = data.draw(st.sampled_from([blocks(TASKS), json.dumps(objects(TASKS))]))
    ends = [mark.end() for mark in re.finditer(r"\n###\n|}", form)]
    at = data.draw(st.integers(0, len(form)))
    assert parse(form[:at], cut=True) == TASKS[: sum(end <= at for end in ends)]


# Texts that hold no mark of a block's edge: the form cannot tell those from its own.
plain = (
    st.text(max_size=80)
    .map(str.strip)
    .filter(
        lambda text: (
            not re.search(r"(?i)instruction|input|output|[{}#*_-]", text)
            and text.strip("<>()[]. \n").lower() not in NO_INPUT - {""}
            and (text == "" or text.strip("<>()[]. \n"))
            and "\r" not in text
        )
    )
)
tasks = st.lists(
    st.builds(Task, plain.filter(lambda t: "\n" not in t).filter(bool), plain, plain.filter(bool)),
    min_size=1,
    max_size=5,
)


@given(tasks, st.integers(1, 40))
def test_blocks_and_json_come_back_as_they_were(tasks: list[Task], first: int) -> None:
    assert parse(blocks(tasks, first)) == tasks
    assert parse(json.dumps(objects(tasks))) == tasks
    assert (
        parse("\n".join(json.dumps(item, ensure_ascii=False) for item in objects(tasks))) == tasks
    )


marked = st.lists(
    st.sampled_from(
        [
            "1. Instruction:",
            "Input:",
            "Output:",
            "###",
            "{",
            "}",
            '{"instruction":',
            "[",
            '"',
            "\n",
            "**",
            "4)",
            ",",
            "null",
            "\\ud800",
            "text",
        ]
    )
    | st.text(max_size=5)
).map("".join)


@given(st.text() | marked, st.booleans())
def test_nothing_in_a_reply_raises(text: str, cut: bool) -> None:
    for task in parse(text, cut=cut):
        assert all(isinstance(field, str) for field in task)
        fault(task)


def test_deep_nesting_does_not_raise() -> None:
    assert parse('{"a":' * 5_000) == []
    assert parse("[" * 100_000 + "{") == []


@pytest.mark.parametrize(
    ("reason", "task"),
    [
        (None, Task("List five verbs of motion.", "", "go")),
        (None, Task("Fix it now.", "", "done")),
        ("too_short", Task("Fix it.", "", "done")),
        ("too_long", Task("word " * 151, "", "done")),
        ("needs_media", Task("Draw a cat on a mat.", "", "done")),
        ("needs_media", Task("Describe the picture in detail.", "", "done")),
        ("write_program", Task("Write a program that sorts.", "", "done")),
        ("starts_punctuation", Task('"Hello" in French please', "", "done")),
        ("starts_punctuation", Task("$5 in euros is what?", "", "done")),
        ("starts_non_ascii", Task("Écris un court poème.", "", "done")),
        ("no_output", Task("List five verbs of motion.", "", "")),
        ("no_instruction", Task("", "x", "done")),
        ("not_text", Task("List five verbs of motion.", "\ud800", "go")),
    ],
)
def test_the_recipe_drops_what_it_names(reason: str | None, task: Task) -> None:
    assert fault(task) == reason
