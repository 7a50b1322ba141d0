"""What is measured of a model's answers: one number a task, or none where it does not apply."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from alpaca.evaluation import checks
from alpaca.evaluation.outputs import Output
from alpaca.evaluation.statistics import Interval, bootstrap, bootstrap_difference
from alpaca.evaluation.suites import Task

NGRAM = 4  # words
SEED = 0


@dataclass(frozen=True)
class Measure:
    """A measure: how it is shown, and which direction is better (1, -1, or 0 for neither)."""

    title: str
    better: int
    share: bool = True  # shown in percent
    digits: int = 3  # of others


MEASURES = {
    "match": Measure("exact match", 1),
    "checks": Measure("follows all checks", 1),
    "checks_loose": Measure("follows all, loosely", 1),
    "loss": Measure("loss of the references", -1, share=False),
    "unfinished": Measure("cut at the limit", -1),
    "empty": Measure("empty", -1),
    "refusal": Measure("refuses", -1),
    "repetition": Measure("repeated 4-grams", -1),
    "language": Measure("in the asked language", 1),
    "words": Measure("words", 0, share=False, digits=1),
}
Values = dict[str, float]  # by the task's key


@dataclass
class Scores:
    """The measures of one model.

    loss is in nats per token of the reference answers. `weights` are those tokens: the loss of
    several tasks is that of all their tokens together.
    """

    generator: str
    outputs: list[Output]
    values: dict[str, Values]
    weights: dict[str, int]
    notices: list[str] = field(default_factory=list)

    def of(self, name: str, keys: Sequence[str] | None = None) -> list[float]:
        """Values whose mean is the measure, of these tasks or all."""
        values = self.values[name]
        chosen = [key for key in (values if keys is None else keys) if key in values]
        if name != "loss" or not chosen:
            return [values[key] for key in chosen]
        # the mean is the loss of all tokens; the spread is that of a ratio (delta method)
        tokens = [self.weights[key] for key in chosen]
        total = sum(tokens)
        ratio = math.fsum(values[k] * n for k, n in zip(chosen, tokens, strict=True)) / total
        return [
            ratio + (values[key] - ratio) * count * len(chosen) / total
            for key, count in zip(chosen, tokens, strict=True)
        ]

    def interval(self, name: str) -> Interval | None:
        """The measure over all tasks it applies to; None if there are none."""
        values = self.of(name)
        return bootstrap(values, seed=SEED) if values else None

    def by_kind(self, name: str) -> dict[str, float]:
        """The measure for each kind of task."""
        keys: dict[str, list[str]] = defaultdict(list)
        for one in self.outputs:
            keys[one.task.kind].append(one.task.key)
        found = {kind: self.of(name, chosen) for kind, chosen in keys.items()}
        return {kind: math.fsum(v) / len(v) for kind, v in sorted(found.items()) if v}


def difference(first: Scores, second: Scores, name: str) -> Interval | None:
    """Second minus first, on the tasks that both have."""
    keys = [key for key in first.values[name] if key in second.values[name]]
    if not keys:
        return None
    return bootstrap_difference(second.of(name, keys), first.of(name, keys), seed=SEED)


def measure(outputs: Sequence[Output], tasks: Mapping[str, Task]) -> Scores:
    """Measure a model's answers; `tasks` are the suite's, by key, with references and checks."""
    scores = Scores(outputs[0].generator, list(outputs), {name: {} for name in MEASURES}, {})
    for one in outputs:
        task = tasks.get(one.task.key, one.task)
        for name, value in plain(one).items():
            scores.values[name][task.key] = value
        if task.answers:
            scores.values["match"][task.key] = checks.matches(one.output, task.answers)
        if one.reference_loss is not None and one.reference_tokens:
            scores.values["loss"][task.key] = one.reference_loss / one.reference_tokens
            scores.weights[task.key] = int(one.reference_tokens)
    scores.notices += _guarded("if-verifiable", partial(_verify, scores, tasks))
    scores.notices += _guarded("ftfy and py3langid", partial(_read, scores))
    return scores


def perplexity(loss: float) -> float:
    """What a loss in nats per token is as a perplexity; of a senseless one, a large number."""
    return math.exp(min(loss, 700.0))


def plain(one: Output) -> Values:
    """The measures that need only the text."""
    words = one.output.split()
    found = {"empty": float(not words), "words": float(len(words)), "repetition": repetition(words)}
    if one.finish_reason is not None:
        found["unfinished"] = float(one.finish_reason == "length")
    return found


def repetition(words: Sequence[str]) -> float:
    """The share of the 4-grams of words that occurred before in the text; 0 to below 1."""
    grams = [tuple(words[at : at + NGRAM]) for at in range(len(words) - NGRAM + 1)]
    return 1 - len(Counter(grams)) / len(grams) if grams else 0.0


def _guarded(package: str, body: Callable[[], str | None]) -> list[str]:
    """Run a part that needs packages of the extra `evaluation`; what is left out is told."""
    try:
        notice = body()
    except ImportError as error:
        missing = (error.name or package).partition(".")[0]
        return [
            f"not measured without {package} ({missing} is missing): pip install -e '.[evaluation]'"
        ]
    return [notice] if notice else []


def _verify(scores: Scores, tasks: Mapping[str, Task]) -> str | None:
    unchecked = 0
    for one in scores.outputs:
        task = tasks.get(one.task.key, one.task)
        followed = checks.verified(task, one.output) if task.checks else None
        if followed is not None:
            scores.values["checks"][task.key] = float(all(followed.strict))
            scores.values["checks_loose"][task.key] = float(all(followed.loose))
        elif task.checks:
            unchecked += 1
    if unchecked:
        return f"{unchecked} tasks are not checked: python -m nltk.downloader punkt_tab"
    return None


def _read(scores: Scores) -> None:
    """Refusals, and the language: of answers to instructions that do not name another one."""
    from alpaca.dataset.checks import refusal
    from alpaca.dataset.findings import Text
    from alpaca.dataset.language import language

    for one in scores.outputs:
        text = Text(one.task.instruction, one.task.input, one.output)
        scores.values["refusal"][one.task.key] = float(refusal(text) is not None)
        asked = language(one.task.instruction)
        answered = language(one.output)
        if one.task.kind != "translation" and asked and answered:
            scores.values["language"][one.task.key] = float(asked == answered)
