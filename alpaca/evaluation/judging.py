"""`python -m alpaca judge`: let a model judge two models' answers, in both orders.

A judge may prefer what it reads first, so each pair is shown twice, with the sides exchanged, and
its preference is the mean of both verdicts; how often a side won is reported. Every reply is in a
journal before the next request, with the judge's name: the same command resumes, another judge's
verdicts are never mixed in. The result is AlpacaEval's annotation format.
"""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alpaca.address import base_url
from alpaca.errors import UserError
from alpaca.passport import text_sha256

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
VERDICT = re.compile(r"(?<![\d.])[012](?![\d.]\d)")
VALUES = {"1": 1.0, "2": 2.0, "0": 1.5}  # AlpacaEval's preferences, for the side shown first
CERTAIN = 0.5  # the least probability of the three characters together that is a verdict


def parser() -> argparse.ArgumentParser:
    """Flags of the verb."""
    made = argparse.ArgumentParser(
        description="let a model judge two models' answers, blind and in both orders; resumable",
        epilog="The endpoint's key is read from OPENAI_API_KEY. Ctrl-C once waits for the requests "
        "in flight, twice abandons them; the same command then resumes.",
    )
    add = made.add_argument
    add("outputs", type=Path, nargs=2, metavar="OUTPUTS", help="baseline's answers, and a model's")
    add("--judge", required=True, metavar="URL", help="OpenAI-compatible endpoint, up to /v1")
    add("--model", required=True, help="the judge's model name at that endpoint")
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="annotations.json")
    add("--limit", type=_positive, help="only the first pairs")
    add("--concurrency", type=_positive, default=8, help="requests in flight")
    add("--max_cost", type=float, help="most money to spend; needs both prices")
    add("--price_in", type=float, help="price per million tokens sent")
    add("--price_out", type=float, help="price per million tokens received")
    add("--max_total_tokens", type=_positive, help="most tokens to use, sent and received")
    add("--max_tokens", type=_positive, default=16, help="of one reply; more for one that thinks")
    add("--no-logprobs", action="store_true", help="read the reply's text, not its probabilities")
    add("--timeout", type=float, default=600, help="timeout of one attempt in seconds")
    add("--retries", type=int, default=8, help="retries after a transient failure")
    add("--html", type=Path, metavar="FILE", help="write the report as a page")
    add("--json", type=Path, metavar="FILE", help="write the report's figures")
    return made


def run(arguments: argparse.Namespace) -> None:
    """Judge what is not judged yet, write the annotations, and print the report."""
    try:
        from alpaca.dataset.files import side_file
        from alpaca.dataset.journal import Journal
        from alpaca.evaluation.pairs import joined
    except ImportError as error:
        raise UserError(
            f"The package {error.name} is missing.", "pip install -e '.[evaluation]'"
        ) from None
    contest = joined(*arguments.outputs)
    pairs = contest.pairs[: arguments.limit]
    settings = {
        "judge": arguments.model,
        "url": base_url(arguments.judge, "--judge"),
        "generators": list(contest.names),
        "max_tokens": arguments.max_tokens,
        "logprobs": not arguments.no_logprobs,
        "template_sha256": text_sha256(TEMPLATE),
    }
    with Journal(side_file(arguments.output, "journal"), settings) as journal:
        found = _judge(arguments, pairs, journal)
    _finish(arguments, contest, pairs, found)


def question(pair: Any, first: int) -> str:
    """The judge's prompt, with the answer of side `first` (0 or 1) shown first."""
    asked = f"{pair.instruction}\n\n{pair.input}" if pair.input else pair.instruction
    return TEMPLATE.format(
        instruction=asked, first=pair.answers[first], second=pair.answers[1 - first]
    )


def verdict(text: str, top: Sequence[tuple[str, float]]) -> float | None:
    """The preference of one reply, 1 (what was shown first) to 2; None if it holds none.

    By the probabilities of the three characters as the first token, where the endpoint gives them;
    else by the last of them that stands alone in the text.
    """
    weights = dict.fromkeys(VALUES, 0.0)
    for token, logprob in top:
        if token.strip() in weights:
            weights[token.strip()] += math.exp(min(0.0, logprob))
    total = sum(weights.values())
    if total >= CERTAIN:
        return sum(VALUES[mark] * weight for mark, weight in weights.items()) / total
    found = VERDICT.findall(text)
    return VALUES[found[-1]] if found else None


def _judge(arguments: argparse.Namespace, pairs: Sequence[Any], journal: Any) -> dict[str, Any]:
    """Ask for the missing verdicts; all entries of the journal by pair and order."""
    from tqdm import tqdm

    from alpaca.dataset.asking import Asker, Question
    from alpaca.dataset.teacher import RefusedError

    found = {entry["key"]: entry for entry in journal.entries}
    # the content is part of the key: a task that was answered again is judged again
    wanted = {f"{digest(pair)}:{side}": (pair, side) for pair in pairs for side in (0, 1)}
    left = [key for key in wanted if key not in found and not wanted[key][0].identical]
    used = [sum(e.get(name, 0) for e in found.values()) for name in ("tokens_in", "tokens_out")]
    asker = Asker(_teacher(arguments), _limits(arguments, len(left)), (used[0], used[1]))
    questions = [Question(key, question(*wanted[key]), arguments.max_tokens) for key in left]
    with tqdm(
        total=len(wanted),
        initial=len(wanted) - len(left),
        unit=" verdicts",
        file=sys.stderr,
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 30,
    ) as bar:
        for key, outcome in asker.ask(questions):
            entry: dict[str, Any] = {"entry": "verdict", "key": key, "preference": None}
            if isinstance(outcome, RefusedError):
                entry["why"] = str(outcome)
                usage = outcome.usage
            else:
                entry |= {"text": outcome.text, "preference": verdict(outcome.text, outcome.top)}
                usage = outcome.usage
            if usage is not None:
                entry |= {"tokens_in": usage.tokens_in, "tokens_out": usage.tokens_out}
            journal.append(entry)
            found[key] = entry
            bar.update()
    if asker.ended == "budget":
        print("stopped at the budget; raise it and run the same command to resume")
    limits = asker.limits
    cost = f", cost {limits.cost(asker.tokens_in, asker.tokens_out):.4f}" if limits.price_in else ""
    print(f"spent: {asker.tokens_in:,} tokens in, {asker.tokens_out:,} out{cost}")
    return found


def digest(pair: Any) -> str:
    """What identifies a pair's content in the journal."""
    return text_sha256(json.dumps([pair.key, *pair.content]))[:16]


def _teacher(arguments: argparse.Namespace) -> Any:
    from alpaca.dataset.teacher import NO_KEY, Teacher

    body: dict[str, Any] = {"max_tokens": arguments.max_tokens, "temperature": 0}
    if not arguments.no_logprobs:
        body |= {"logprobs": True, "top_logprobs": 20}
    return Teacher(
        url=base_url(arguments.judge, "--judge"),
        model=arguments.model,
        key=os.environ.get("OPENAI_API_KEY", "").strip() or NO_KEY,
        timeout=arguments.timeout,
        retries=arguments.retries,
        body=body,
        role="judge",
        flag="--judge",
    )


def _limits(arguments: argparse.Namespace, wanted: int) -> Any:
    from alpaca.dataset.bootstrap import Limits

    if arguments.max_cost is not None and None in (arguments.price_in, arguments.price_out):
        raise UserError("--max_cost needs --price_in and --price_out.", "Give all three.")
    return Limits(
        wanted=wanted,
        concurrency=arguments.concurrency,
        price_in=arguments.price_in or 0.0,
        price_out=arguments.price_out or 0.0,
        max_cost=arguments.max_cost,
        max_total_tokens=arguments.max_total_tokens,
    )


def annotated(
    pair: Any, names: tuple[str, str], judge: str, found: Mapping[str, dict[str, Any]]
) -> Any:
    """The pair's annotation: the mean of its two verdicts, each turned to output_1's side."""
    from alpaca.evaluation.annotations import Annotation

    replies = [found.get(f"{digest(pair)}:{side}") for side in (0, 1)]
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


def _finish(
    arguments: argparse.Namespace, contest: Any, pairs: Sequence[Any], found: Mapping[str, Any]
) -> None:
    from alpaca.evaluation import annotations
    from alpaca.evaluation.judgement import report

    judged = [annotated(pair, contest.names, arguments.model, found) for pair in pairs]
    complete = [
        one for one, pair in zip(judged, pairs, strict=True)
        if pair.identical or all(f"{digest(pair)}:{side}" in found for side in (0, 1))
    ]  # fmt: skip
    annotations.write(arguments.output, complete)
    print(f"{len(complete)} of {len(pairs)} pairs: {arguments.output}")
    if complete:
        report(complete, arguments.html, arguments.json)


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)
