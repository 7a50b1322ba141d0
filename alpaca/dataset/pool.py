"""The tasks kept so far, and the verdict on each task of a reply; uses no clock and no network.

Replies are judged in the order of their requests, and the examples of request k depend only on the
seed, on k and on what was kept up to reply k - LAG. So the outcome depends on the replies alone,
not on the order in which they arrive or on how often the run was killed.
"""

import random
from collections.abc import Sequence
from typing import Any

from alpaca.dataset.novelty import THRESHOLD, Index
from alpaca.dataset.recipe import EXAMPLES, fault
from alpaca.dataset.reply import Task, parse

# How many requests may be sent beyond the last judged one. With a larger value one slow reply
# blocks less; with a smaller one generated tasks become examples sooner.
LAG = 128
NEIGHBOURS = 5

Entry = dict[str, Any]


class Pool:
    """Seed tasks, then the kept ones; a task's number in a journal entry counts both from 0."""

    def __init__(self, seeds: Sequence[Task], seed: int) -> None:
        """Start with the seed tasks; `seed` draws the examples of every request."""
        self.seeds = len(seeds)
        self.tasks = list(seeds)
        self.kept: list[Entry] = []
        self.dropped: list[Entry] = []
        self.judged = 0  # requests 0 .. judged - 1 are judged
        self._seed = seed
        self._sizes = [len(seeds)]  # how many tasks there were after each judged request
        self._index = Index(task.instruction for task in seeds)

    def examples(self, request: int) -> list[Task]:
        """The tasks shown in a request: one of the seeds, the rest from seeds and kept tasks."""
        assert request < self.judged + LAG
        known = self._sizes[max(0, request + 1 - LAG)]
        rng = random.Random(f"{self._seed}:{request}")
        numbers = [rng.randrange(self.seeds)]
        while len(numbers) < min(EXAMPLES, known):
            number = rng.randrange(known)
            if number not in numbers:
                numbers.append(number)
        return [self.tasks[number] for number in numbers]

    def judge(self, request: int, text: str, cut: bool) -> Entry:
        """Judge every task of a reply, add the kept ones, and return the journal's entry."""
        tasks = [self._verdict(task) for task in parse(text, cut=cut)]
        entry = {"entry": "judged", "request": request, "tasks": tasks}
        self._finish(entry)
        return entry

    def replay(self, entry: Entry) -> None:
        """Apply an earlier journal entry, without comparing anything again."""
        for item in entry["tasks"]:
            if item["verdict"] == "kept":
                self._add(Task(item["instruction"], item["input"], item["output"]))
        self._finish(entry)

    def _verdict(self, task: Task) -> Entry:
        reason = fault(task)
        found: Entry = task._asdict()
        if reason is None:
            nearest = self._index.nearest(task.instruction, NEIGHBOURS)
            found["nearest"] = [[item.number, item.score] for item in nearest]
            reason = "similar" if nearest and nearest[0].score >= THRESHOLD else None
        if reason is None:
            self._add(task)
        return found | {"verdict": reason or "kept"}

    def _add(self, task: Task) -> None:
        self.tasks.append(task)
        self._index.add(task.instruction)

    def _finish(self, entry: Entry) -> None:
        assert entry["request"] == self.judged, "replies are judged in the order of their requests"
        for item in entry["tasks"]:
            bucket = self.kept if item["verdict"] == "kept" else self.dropped
            bucket.append(item | {"request": entry["request"]})
        self.judged += 1
        self._sizes.append(len(self.tasks))
