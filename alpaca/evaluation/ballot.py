"""A judge's ballot: which pairs of answers, in which order, on which side, and the votes on disk.

The order depends on the seed only: with the same --limit, all judges see the same pairs. The side
depends on the judge, too. Every vote and every undo rewrites the file of votes (AlpacaEval's
annotations) atomically, so a kill at any moment leaves it complete, with the vote or without it.
"""

from collections import deque
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from alpaca.errors import UserError
from alpaca.evaluation import annotations
from alpaca.evaluation.annotations import Annotation
from alpaca.evaluation.pairs import Contest, Pair, drawn, ordered

IDENTICAL = "identical answers"  # the note of a tie that nobody was asked about
LONGEST_NAME = 60  # characters of a judge's name
CHOICES = ("left", "right", "tie")
TIE = 1.5  # as a preference; 1 and 2 are the better output's number


class Votes:
    """The file of votes; each entry belongs to a pair of the contest."""

    def __init__(self, path: Path, contest: Contest) -> None:
        """Read the file, if there is one.

        Raises:
            UserError: it is damaged, or holds votes on other models' answers or on other answers.
        """
        self.path, self.contest = path, contest
        entries = annotations.read(path) if path.exists() else []
        self._cast = list(zip(self._keys(entries), entries, strict=True))

    def of(self, judge: str) -> dict[str, Annotation]:
        """A judge's votes by the pair's key, in the order in which they were given."""
        return {key: entry for key, entry in self._cast if entry.annotator == judge}

    def add(self, votes: Sequence[tuple[str, Annotation]]) -> None:
        """Put votes, each with its pair's key, at the end; they are on the disk on return."""
        self._write([*self._cast, *votes])

    def remove(self, vote: Annotation) -> None:
        """Delete a vote that `of` has given; it is off the disk on return."""
        self._write([one for one in self._cast if one[1] is not vote])

    def entries(self) -> list[Annotation]:
        """All votes, of all judges."""
        return [entry for _, entry in self._cast]

    def _write(self, cast: list[tuple[str, Annotation]]) -> None:
        annotations.write(self.path, [entry for _, entry in cast])
        self._cast = cast  # only now: a vote that could not be written is not counted

    def _keys(self, entries: list[Annotation]) -> list[str]:
        """The key of each entry's pair."""
        free: dict[tuple[str, ...], list[str]] = {}
        for pair in self.contest.pairs:
            free.setdefault(pair.content, []).append(pair.key)
        taken: dict[tuple[str, ...], int] = {}
        found = []
        for number, entry in enumerate(entries):
            content = content_of(entry)
            keys = free.get(content, [])
            nth = taken.get((entry.annotator, *content), 0)
            why = self._fault(entry, keys, nth)
            if why:
                raise UserError(
                    f"{self.path}: entry {number} is no vote of this comparison: {why}.",
                    "Write to another file with --votes, or name the files that it was made from.",
                )
            taken[entry.annotator, *content] = nth + 1
            found.append(keys[nth])
        return found

    def _fault(self, entry: Annotation, keys: list[str], nth: int) -> str | None:
        names = (entry.generator_1, entry.generator_2)
        if names != self.contest.names:
            return f"it compares {' with '.join(names)}, not {' with '.join(self.contest.names)}"
        if not keys:
            return "it is about other answers, or another task"
        if nth >= len(keys):
            return f"{entry.annotator} has voted on its pair before"
        return None


class Ballot:
    """What one judge has still to judge."""

    def __init__(self, votes: Votes, judge: str, seed: int, limit: int | None = None) -> None:
        """The first `limit` pairs of the seed's order; ties of identical answers are recorded now.

        Raises:
            UserError: the name is empty, too long or not printable.
        """
        self.votes, self.judge, self._seed = votes, named(judge), seed
        pairs = ordered(votes.contest.pairs, seed)[:limit]
        cast = votes.of(self.judge)
        same = [pair for pair in pairs if pair.identical]
        new = [(p.key, self._entry(p, TIE, IDENTICAL)) for p in same if p.key not in cast]
        if new:
            votes.add(new)
        self.identical = len(same)
        self._shown = {pair.key: pair for pair in pairs if not pair.identical}
        self._queue = deque(pair for key, pair in self._shown.items() if key not in cast)
        self.draft = ""  # the note of the vote that was undone last

    @property
    def total(self) -> int:
        """How many pairs the judge is shown in all."""
        return len(self._shown)

    @property
    def done(self) -> int:
        """How many of those have the judge's vote."""
        return len(self._shown) - len(self._queue)

    @property
    def current(self) -> Pair | None:
        """The pair to judge now; None at the end."""
        return self._queue[0] if self._queue else None

    @property
    def ticket(self) -> str | None:
        """The current pair as the page names it, which tells nothing about the sides."""
        pair = self.current
        return None if pair is None else drawn("ticket", self._seed, pair.key, self.judge)[:16]

    @property
    def sides(self) -> tuple[str, str]:
        """The current pair's answers, left and right."""
        assert self.current is not None
        first, second = self.current.answers
        return (first, second) if self._first(self.current) == 1 else (second, first)

    def vote(self, choice: str, note: str) -> None:
        """Record one of CHOICES for the current pair."""
        pair = self.current
        assert pair is not None
        left = self._first(pair)
        preference = {"left": left, "right": 3 - left, "tie": TIE}[choice]
        self.votes.add([(pair.key, self._entry(pair, preference, note))])
        self._queue.popleft()
        self.draft = ""

    def undo(self) -> None:
        """Delete the judge's last vote, also of an earlier session; its pair is current again."""
        cast = [(k, vote) for k, vote in self.votes.of(self.judge).items() if k in self._shown]
        if not cast:
            return
        key, vote = cast[-1]
        self.votes.remove(vote)
        self._queue.appendleft(self._shown[key])
        self.draft = str(vote.extra.get("note") or "")

    def _first(self, pair: Pair) -> int:
        """The number, 1 or 2, of the output that is shown first, on the left."""
        return 1 + int(drawn("side", self._seed, pair.key, self.judge), 16) % 2

    def _entry(self, pair: Pair, preference: float, note: str) -> Annotation:
        first, second = self.votes.contest.names
        return Annotation(
            instruction=pair.instruction,
            output_1=pair.answers[0],
            generator_1=first,
            output_2=pair.answers[1],
            generator_2=second,
            annotator=self.judge,
            preference=preference,
            dataset=pair.dataset,
            extra={
                "input": pair.input,
                "kind": pair.kind,
                "shown_first": self._first(pair),
                "note": note,
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
            },
        )


def content_of(vote: Annotation) -> tuple[str, ...]:
    """As `Pair.content`."""
    asked = (vote.instruction, str(vote.extra.get("input") or ""))
    return (*asked, vote.output_1, vote.output_2)


def named(judge: str) -> str:
    """A judge's name; UserError if it cannot be one."""
    name = " ".join(judge.split())
    if not name or not name.isprintable() or len(name) > LONGEST_NAME:
        raise UserError(
            f"A judge's name has 1 to {LONGEST_NAME} printable characters.",
            "Give a name that tells the judges apart, for example your own.",
        )
    return name
