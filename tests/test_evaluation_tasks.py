"""The evaluation tasks: well formed, unlike the seeds and each other, decided by their checks."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT

from alpaca.dataset.novelty import THRESHOLD, Index
from alpaca.evaluation import checks, suites

DATA = Path(__file__).resolve().parent.parent / "data"
KINDS = {
    *("explanation", "code", "reasoning", "question", "imperative", "planning"),
    *("creative", "classification", "extraction", "editing", "translation", "summarization"),
}
KEYS = ["id", "kind", "instruction", "input", "output"]
# The first two read files that nltk downloads; the last two turn on one stray word or separator.
UNUSED = {
    "length_constraints:number_sentences",
    "change_case:capital_word_frequency",
    "combination:two_responses",
    "combination:repeat_prompt",
}

Task = dict[str, Any]


def read(name: str) -> list[Task]:
    lines = (DATA / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


TASKS = read("evaluation_tasks.jsonl")
SEEDS = read("seed_tasks.jsonl")
ANSWERED = [task for task in TASKS if "answers" in task]
WANTED = dict(zip([task["id"] for task in TASKS], suites.read(suites.OURS), strict=True))
CHECKED = [task for task in TASKS if "instruction_id_list" in task]


def passes(task: Task, reply: str) -> bool:
    if "answers" in task:
        return checks.matches(reply, task["answers"])
    followed = checks.verified(WANTED[task["id"]], reply)
    assert followed is not None
    return all(followed.strict)


def whole(task: Task) -> str:
    return f"{task['instruction']}\n{task['input']}"


def test_tasks_are_many_of_every_kind_and_have_their_own_ids() -> None:
    assert len(TASKS) >= 150
    assert [task["id"] for task in TASKS] == [f"eval_{n:03d}" for n in range(1, len(TASKS) + 1)]
    counts = Counter(task["kind"] for task in TASKS)
    assert counts.keys() == KINDS
    assert min(counts.values()) >= 10
    assert len(ANSWERED) >= 40
    assert len(CHECKED) >= 40
    assert len(ANSWERED) + len(CHECKED) >= 60


def test_keys_are_exactly_those_documented() -> None:
    for task in TASKS:
        extra = [key for key in task if key not in KEYS]
        assert list(task) == KEYS + extra, task["id"]
        assert extra in ([], ["answers"], ["instruction_id_list", "kwargs"]), task["id"]
        assert all(isinstance(task[key], str) for key in KEYS), task["id"]
        assert all(task[key].strip() for key in KEYS if key != "input"), task["id"]
        assert all(task[key] == task[key].strip() for key in KEYS), task["id"]


def test_accepted_answers_are_few_and_differ_after_normalization() -> None:
    for task in ANSWERED:
        assert 1 <= len(task["answers"]) <= 6, task["id"]
        known = {checks.normalized(answer) for answer in task["answers"]}
        assert len(known) == len(task["answers"]), task["id"]
        assert "" not in known, task["id"]


def test_checks_leave_nothing_to_chance_or_to_a_download() -> None:
    for task in CHECKED:
        assert 1 <= len(task["instruction_id_list"]) == len(task["kwargs"]), task["id"]
        assert not UNUSED & set(task["instruction_id_list"]), task["id"]
        for name, kwargs in zip(task["instruction_id_list"], task["kwargs"], strict=True):
            checker = INSTRUCTION_DICT[name](name)
            checker.build_description(**kwargs)
            # What is missing or invalid, the checker draws by chance.
            used = checker.get_instruction_args() or {}
            assert used.keys() == kwargs.keys(), task["id"]
            for key, value in kwargs.items():
                same = sorted(value) if isinstance(value, list) else value
                assert used[key] == same, task["id"]


@pytest.mark.parametrize("task", ANSWERED + CHECKED, ids=lambda task: task["id"])
def test_reference_passes_its_own_checks(task: Task) -> None:
    assert passes(task, task["output"])


@pytest.mark.parametrize("reply", ["No.", "x", "", "Sorry, I cannot help with that."])
def test_useless_reply_fails_nearly_all_checks(reply: str) -> None:
    for tasks in (ANSWERED, CHECKED):
        failed = sum(not passes(task, reply) for task in tasks)
        assert failed >= 0.9 * len(tasks)


def test_no_task_is_close_to_a_seed_task() -> None:
    index = Index([text for seed in SEEDS for text in (seed["instruction"], whole(seed))])
    for task in TASKS:
        for text in (task["instruction"], whole(task)):
            assert index.scores(text).max() < THRESHOLD, task["id"]


@pytest.mark.parametrize("part", ["instruction", "whole"])
def test_no_two_tasks_are_close_to_each_other(part: str) -> None:
    texts = [task["instruction"] if part == "instruction" else whole(task) for task in TASKS]
    index = Index(texts)
    scores = np.array([index.scores(text) for text in texts])
    np.fill_diagonal(scores, 0)
    assert scores.max() < THRESHOLD


def test_the_documents_say_how_many_tasks_there_are_and_how_many_an_echo_passes() -> None:
    page = (DATA.parent / "docs" / "evaluation.md").read_text(encoding="utf-8")
    echoed = sum(passes(task, task["instruction"]) for task in CHECKED)
    assert f"{len(TASKS)} tasks of ours in {len(KINDS)} kinds" in page
    assert f"{len(ANSWERED)} with exact answers, {len(CHECKED)} with checks" in page
    assert f"an echo of the instruction passes {echoed} of our {len(CHECKED)}" in page
    assert not any(passes(task, task["instruction"]) for task in ANSWERED)
