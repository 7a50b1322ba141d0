"""What a judge is asked about a pair of answers, and what its replies prefer.

Each pair is asked about in both orders, so that a judge's liking for a side cancels out.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from alpaca.evaluation.annotations import Annotation
from alpaca.evaluation.pairs import Pair
from alpaca.passport import text_sha256
from alpaca.prompt import plain

TEMPLATE = """Two assistants were given the same instruction by a person. Decide whose answer \
serves that person better: it does what was asked, it is correct, it is clear and no longer than \
it needs to be. The order in which the answers are shown means nothing.

<instruction>
{instruction}
</instruction>

<answer_1>
{first}
</answer_1>

<answer_2>
{second}
</answer_2>

Reply with one character only: 1 if answer 1 is better, 2 if answer 2 is better, 0 if neither is."""
MARK = re.compile(r"(?<![\d.,-])[012](?!\d|[.,]\d)")  # alone: no digit of another number
SENTENCE = re.compile(r"[\n!?:]+|\.(?!\d)")
VALUES = {"1": 1.0, "2": 2.0, "0": 1.5}  # AlpacaEval's preferences, for the side shown first
CERTAIN = 0.5  # the least probability of the three characters together that is a verdict


def question(pair: Pair, first: int) -> str:
    """The judge's prompt, with the answer of side `first` (0 or 1) shown first."""
    return TEMPLATE.format(
        instruction=plain(pair.instruction, pair.input),
        first=pair.answers[first],
        second=pair.answers[1 - first],
    )


def verdict(text: str, top: Sequence[tuple[str, float]]) -> float | None:
    """The preference of one reply, 1 (what was shown first) to 2; None if it holds none.

    By the probabilities of the three characters as the first token, where the endpoint gives them;
    else by the only one of them in the text's last sentence that has one: "answer 1 is better than
    answer 2" is not guessed at.
    """
    weights = dict.fromkeys(VALUES, 0.0)
    for token, logprob in top:
        if token.strip() in weights:
            weights[token.strip()] += math.exp(min(0.0, logprob))
    total = sum(weights.values())
    if total >= CERTAIN:
        return sum(VALUES[mark] * weight for mark, weight in weights.items()) / total
    marks = [found for part in SENTENCE.split(text) if (found := set(MARK.findall(part)))]
    return VALUES[marks[-1].pop()] if marks and len(marks[-1]) == 1 else None


def keys(pair: Pair) -> tuple[str, str]:
    """What identifies a pair's two questions in the journal: its content, and the side shown first.

    A task that was answered again is thus judged again.
    """
    content = text_sha256(json.dumps([pair.key, *pair.content]))[:16]
    return f"{content}:0", f"{content}:1"


def annotated(
    pair: Pair, names: tuple[str, str], judge: str, found: Mapping[str, dict[str, Any]]
) -> Annotation:
    """The pair's annotation: the mean of its two verdicts, each turned to output_1's side."""
    replies = [found.get(key) for key in keys(pair)]
    shown = [None if one is None else one["preference"] for one in replies]
    turned = [shown[0], None if shown[1] is None else 3 - shown[1]]
    known = [one for one in turned if one is not None]
    # one order alone would let a judge's liking for a side decide
    preference = sum(known) / 2 if len(known) == 2 else None
    if pair.identical:
        preference = 1.5
    return Annotation(
        instruction=pair.instruction,
        output_1=pair.answers[0],
        generator_1=names[0],
        output_2=pair.answers[1],
        generator_2=names[1],
        annotator=judge,
        preference=preference,
        dataset=pair.dataset,
        extra={"input": pair.input, "kind": pair.kind, "verdicts": turned},
    )
