"""`python -m alpaca judge`: let a model judge two models' answers, in both orders.

A judge may prefer what it reads first, so each pair is shown twice, with the sides exchanged, and
its preference is the mean of both verdicts; how often a side won is reported. Every reply is in a
journal before the next request, with the judge's name: the same command resumes, another judge's
verdicts are never mixed in. The result is AlpacaEval's annotation format.
"""

import argparse
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alpaca.address import base_url
from alpaca.dataset import limits
from alpaca.dataset.journal import Journal, side_file
from alpaca.errors import UserError
from alpaca.evaluation import annotations
from alpaca.evaluation.outputs import check_target
from alpaca.evaluation.pairs import Contest, Pair, joined
from alpaca.evaluation.preference import TEMPLATE, annotated, keys
from alpaca.passport import text_sha256


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
    add("--limit", type=limits.positive, help="only the first pairs")
    limits.add_flags(made)
    add(
        "--max_tokens",
        type=limits.positive,
        default=16,
        help="of one reply; more for one that thinks",
    )
    add("--no-logprobs", action="store_true", help="read the reply's text, not its probabilities")
    add("--html", type=Path, metavar="FILE", help="write the report as a page")
    add("--json", type=Path, metavar="FILE", help="write the report's figures")
    return made


def run(arguments: argparse.Namespace) -> None:
    """Judge what is not judged yet, write the annotations, and print the report."""
    try:
        from alpaca.evaluation.judge_requests import ask
    except ImportError as error:
        raise UserError(
            f"The package {error.name} is missing.", "pip install -e '.[evaluation]'"
        ) from None
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    _check(arguments)
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
        found = ask(arguments, pairs, journal)
    _finish(arguments, contest, pairs, found)


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what no run can have, before anything is paid for."""
    for flag in ("output", "html", "json"):
        path = getattr(arguments, flag)
        if path is not None:
            check_target(path, f"--{flag}", arguments.outputs)
    limits.given(arguments, wanted=0)


def _finish(
    arguments: argparse.Namespace, contest: Contest, pairs: Sequence[Pair], found: Mapping[str, Any]
) -> None:
    from alpaca.evaluation.judgement import report

    complete = [
        annotated(pair, contest.names, arguments.model, found)
        for pair in pairs
        if pair.identical or all(key in found for key in keys(pair))
    ]
    annotations.write(arguments.output, complete)
    print(f"{len(complete)} of {len(pairs)} pairs: {arguments.output}")
    if complete:
        report(complete, arguments.html, arguments.json)
