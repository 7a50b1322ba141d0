"""Ask a judge for the verdicts that its journal does not have yet.

Every reply is in the journal, with the tokens it cost, before the next one is looked at.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from alpaca.address import base_url
from alpaca.dataset import limits
from alpaca.dataset.asking import Asker, Outcome, Question
from alpaca.dataset.journal import Entry, Journal
from alpaca.dataset.limits import progress_bar
from alpaca.dataset.teacher import Reply, Teacher, Usage, api_key
from alpaca.evaluation.pairs import Pair
from alpaca.evaluation.preference import keys, question, verdict


def ask(arguments: argparse.Namespace, pairs: Sequence[Pair], journal: Journal) -> dict[str, Entry]:
    """Ask for the missing verdicts; all verdicts of the journal by pair and order."""
    found = {entry["key"]: entry for entry in journal.entries if "key" in entry}
    wanted = {key: (pair, side) for pair in pairs for side, key in enumerate(keys(pair))}
    left = [key for key in wanted if key not in found and not wanted[key][0].identical]
    asker = _asker(arguments, journal, len(left))
    questions = [Question(key, question(*wanted[key]), arguments.max_tokens) for key in left]
    with progress_bar("verdicts", len(wanted), len(wanted) - len(left)) as bar:
        for key, outcome in asker.ask(questions):
            found[key] = _entry(key, outcome)
            journal.append(found[key])
            bar.update()
    if asker.ended == "budget":
        print("stopped at the budget; raise it and run the same command to resume")
    spent = asker.limits.cost(asker.tokens_in, asker.tokens_out)
    cost = f", cost {spent:.4f}" if asker.limits.price_in else ""
    print(f"spent: {asker.tokens_in:,} tokens in, {asker.tokens_out:,} out{cost}")
    return found


def _entry(key: str, outcome: Outcome) -> Entry:
    """A reply as the journal has it, with its preference, or why there is none."""
    entry: Entry = {"entry": "verdict", "key": key, "preference": None}
    if isinstance(outcome, Reply):
        entry |= {"text": outcome.text, "preference": verdict(outcome.text, outcome.top)}
    else:
        entry["why"] = str(outcome)
    return entry | (_spent(outcome.usage) if outcome.usage else {})


def _spent(usage: Usage) -> Entry:
    return {"tokens_in": usage.tokens_in, "tokens_out": usage.tokens_out}


def _asker(arguments: argparse.Namespace, journal: Journal, wanted: int) -> Asker:
    """What asks the judge, with what earlier runs spent; see `Asker`."""
    names = ("tokens_in", "tokens_out")
    spent_in, spent_out = (sum(e.get(name, 0) for e in journal.entries) for name in names)
    return Asker(
        _teacher(arguments),
        limits.given(arguments, wanted),
        (spent_in, spent_out),
        answered=any("text" in entry for entry in journal.entries),
        remedy="Without log probabilities: --no-logprobs; for a judge that thinks first: a larger "
        "--max_tokens; and another --output.",
        wasted=lambda usage: journal.append({"entry": "wasted", **_spent(usage)}),
    )


def _teacher(arguments: argparse.Namespace) -> Teacher:
    body: dict[str, Any] = {"max_tokens": arguments.max_tokens, "temperature": 0}
    if not arguments.no_logprobs:
        body |= {"logprobs": True, "top_logprobs": 20}
    return Teacher(
        url=base_url(arguments.judge, "--judge"),
        model=arguments.model,
        key=api_key(),
        timeout=arguments.timeout,
        retries=arguments.retries,
        body=body,
        role="judge",
        flag="--judge",
        empty=True,
    )
