"""One run of `generate`: settings and limits from the flags, the loop, the progress bar, the files.

Settings that shape the replies are in the journal's first line, and a resumed run must have the
same. Settings that only limit or pace a run (budget, concurrency, time-outs, how many tasks) may
change from one call to the next.
"""

import argparse
import asyncio
import hashlib
import json
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from tqdm import tqdm

from alpaca.address import base_url
from alpaca.dataset import recipe
from alpaca.dataset.bootstrap import Bootstrap
from alpaca.dataset.files import write
from alpaca.dataset.journal import Entry, Journal, side_file
from alpaca.dataset.limits import Limits, given, progress_bar
from alpaca.dataset.pool import LAG, Pool
from alpaca.dataset.reply import Task
from alpaca.dataset.teacher import Teacher, api_key
from alpaca.errors import UserError
from alpaca.records import read_records


def run(arguments: argparse.Namespace) -> None:
    """Generate, write the files, and print a summary."""
    limits, key = _limits(arguments), api_key()
    body = _body(arguments)
    teacher = Teacher(
        url=base_url(arguments.teacher, "--teacher"),
        model=arguments.model,
        key=key,
        endpoint=arguments.endpoint,
        timeout=arguments.timeout,
        retries=arguments.retries,
        body=body,
    )
    seeds = _seeds(arguments.seed_tasks)
    output = arguments.output
    with Journal(side_file(output, "journal"), _settings(arguments, body, seeds)) as journal:
        pool = Pool(seeds, arguments.seed)
        with progress_bar("tasks", arguments.num_instructions) as bar:
            bootstrap = Bootstrap(
                pool,
                journal,
                teacher,
                limits,
                per_request=arguments.per_request,
                max_tokens=_reply_limit(arguments, body),
                progress=lambda run: _show(bar, run),
            )
            try:
                asyncio.run(_until_done(bootstrap))
            finally:
                write(output, pool, arguments.num_instructions)
    print(_summary(bootstrap, output))
    if bootstrap.ended == "interrupted":
        raise KeyboardInterrupt


async def _until_done(bootstrap: Bootstrap) -> None:
    """Run; the first Ctrl-C (or SIGTERM) waits for requests in flight, the second cancels them."""
    loop = asyncio.get_running_loop()
    work = asyncio.create_task(bootstrap.run())

    def interrupt() -> None:
        if bootstrap.ended == "interrupted":
            work.cancel()
            return
        bootstrap.stop("interrupted")
        tqdm.write(
            f"stopping: waiting for {len(bootstrap.in_flight)} request(s) in flight, which are "
            "already paid for; Ctrl-C again abandons them",
            file=sys.stderr,
        )

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt)
    try:
        await work
    except asyncio.CancelledError:
        pass  # the second Ctrl-C: replies that have arrived are in the journal
    finally:
        for task in bootstrap.in_flight.values():
            task.cancel()
        await bootstrap.teacher.close()


def _settings(arguments: argparse.Namespace, body: Entry, seeds: list[Task]) -> Entry:
    """The settings that shape the replies; a resumed run must have the same."""
    return {
        "model": arguments.model,
        "endpoint": arguments.endpoint,
        "per_request": arguments.per_request,
        "seed": arguments.seed,
        "body": body,
        "seed_tasks_sha256": _sha256(json.dumps(seeds)),
        "request_sha256": _sha256(recipe.REQUEST),
        "lag": LAG,
    }


def _body(arguments: argparse.Namespace) -> Entry:
    flags = {name: getattr(arguments, name) for name in ("temperature", "top_p", "max_tokens")}
    return {name: value for name, value in (flags | arguments.extra).items() if value is not None}


def _reply_limit(arguments: argparse.Namespace, body: Entry) -> int:
    """The most tokens a reply can cost, under either of the names that endpoints have for it."""
    limit = body.get("max_tokens") or body.get("max_completion_tokens") or arguments.max_tokens
    return int(limit)


def _limits(arguments: argparse.Namespace) -> Limits:
    if arguments.concurrency > LAG:
        raise UserError(f"--concurrency is at most {LAG}.", f"Give --concurrency {LAG}.")
    return given(arguments, arguments.num_instructions)


def _show(bar: "tqdm[Any]", run: Bootstrap) -> None:
    """Update the progress bar; tasks that a resumed run starts with do not count as speed."""
    kept = min(len(run.pool.kept), run.limits.wanted)
    if bar.n == 0 and run.journal.entries and bar.initial == 0:
        bar.initial = bar.n = kept
    tokens = f"{run.tokens_in + run.tokens_out:,} tokens"
    cost = f"{run.cost:.2f} spent" if run.limits.price_in or run.limits.price_out else tokens
    bar.set_postfix_str(
        f"{len(run.pool.dropped)} dropped, {cost}, {len(run.in_flight)} in flight", refresh=False
    )
    bar.update(kept - bar.n)


def _summary(run: Bootstrap, output: Path) -> str:
    wanted, kept = run.limits.wanted, len(run.pool.kept)
    reasons = Counter(item["verdict"] for item in run.pool.dropped)
    counted = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
    about = "about " if run.estimated else ""
    lines = [
        f"{min(kept, wanted)} of {wanted} instructions in {output}"
        if kept
        else "nothing kept yet; no file written",
        f"dropped: {len(run.pool.dropped)}{f' ({counted})' if counted else ''}",
        f"spent: {about}{run.tokens_in:,} tokens in, {run.tokens_out:,} out, cost {run.cost:.4f}",
    ]
    if run.ended == "budget":
        lines.append("stopped at the budget; raise it and run the same command to resume")
    return "\n".join(lines)


def _seeds(path: Path) -> list[Task]:
    """The seed tasks; each is an example of how to answer, so an empty output is refused."""
    records = read_records(path)
    empty = [index for index, record in enumerate(records) if not record.output]
    if empty:
        raise UserError(f"{path}: seed task {empty[0]} has an empty output.", "Write an answer.")
    return [Task(record.instruction, record.input, record.output) for record in records]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
