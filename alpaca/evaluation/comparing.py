"""`python -m alpaca compare A.json B.json`: judge two models' answers blind.

A page on this machine shows the pairs one by one, and the votes are written to a file in
AlpacaEval's format. `--report` tells what files of votes say: who is better, by how much, and how
far judges and sides can be trusted.
"""

import argparse
import io
import shlex
import sys
import threading
import webbrowser
from pathlib import Path

from alpaca import atomic
from alpaca.dataset.limits import positive
from alpaca.errors import UNLOCKED, UserError
from alpaca.evaluation import verdict_forms, verdicts
from alpaca.evaluation.ballot import Ballot, Votes
from alpaca.evaluation.booth import HOST, Booth, listening
from alpaca.evaluation.pairs import joined


def parser() -> argparse.ArgumentParser:
    """The command line of `compare`."""
    made = argparse.ArgumentParser(
        description="Judge two models' answers blind, on a local page; or report on votes.",
        epilog="Ctrl-C ends it; every vote is saved, and the same command continues.",
    )
    add = made.add_argument
    add("first", type=Path, nargs="?", metavar="A.json", help="answers (AlpacaEval's form)")
    add("second", type=Path, nargs="?", metavar="B.json", help="another model's, same tasks")
    add(
        "--votes",
        type=Path,
        metavar="FILE",
        help="where the votes are kept (A-vs-B.votes.json, next to A)",
    )
    add("--judge", metavar="NAME", help="who judges (the page asks)")
    add("--seed", type=int, default=0, help="draws the order and the sides (%(default)s)")
    add("--limit", type=positive, metavar="N", help="judge only the first N pairs of that order")
    add("--port", type=int, default=0, help="of the page (a free one)")
    add("--no-browser", action="store_true", help="only print the page's address")
    add(
        "--report",
        type=Path,
        nargs="+",
        metavar="VOTES",
        help="report on files of votes, of one judge or several",
    )
    add("--html", type=Path, metavar="FILE", help="write the report as a page, too")
    add("--json", type=Path, metavar="FILE", help="write the report's figures, too")
    return made


def run(arguments: argparse.Namespace) -> None:
    """Serve the page until all pairs are judged, then report; with --report, only that.

    Exits with code 130 if Ctrl-C came before the last vote.

    Raises:
        UserError: the files are not given, or as `joined`, `Votes`, `Ballot` and `verdicts.load`.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    given = [path for path in (arguments.first, arguments.second) if path]
    if arguments.report:
        if given:
            raise UserError("--report takes files of votes only.", "Leave out A.json and B.json.")
        verdict_forms.tell(verdicts.load(arguments.report), arguments.html, arguments.json)
        return
    if len(given) < 2:
        raise UserError(
            "compare needs two files of answers.",
            "python -m alpaca compare A.json B.json; or --report VOTES for votes already given.",
        )
    path = arguments.votes or votes_of(*given)
    busy = UserError(
        f"{path} is open in another compare.",
        "End that one first; or keep this judge's votes in another file: --votes FILE. "
        "--report reads several files.",
    )
    with atomic.locked(path.with_name(f".{path.name}.lock"), busy) as held:
        if not held:
            print(f"compare: {UNLOCKED.format(path.absolute().parent)}", file=sys.stderr)
        _judge(Votes(path, joined(*given)), arguments)


def votes_of(first: Path, second: Path) -> Path:
    """Where the votes on two files' answers are kept."""
    return first.with_name(f"{first.stem}-vs-{second.stem}.votes.json")


def _judge(votes: Votes, arguments: argparse.Namespace) -> None:
    """Serve the page, and tell how it ended."""
    contest = votes.contest
    pairs, (ours, theirs) = contest.pairs, contest.alone
    said = f"Pairs: {len(pairs):,}"
    if ours or theirs:
        said += f"; tasks left out: {ours:,} only in {arguments.first}"
        said += f", {theirs:,} only in {arguments.second}"
    print(said)
    booth = Booth(
        opened=lambda name: Ballot(votes, name, arguments.seed, arguments.limit),
        result=lambda: verdict_forms.shown(verdicts.judged(votes.entries())),
        judge=arguments.judge,
    )
    if booth.ballot is None or booth.ballot.current is not None:
        _serve(booth, arguments)
    ballot = booth.ballot
    if ballot is not None and ballot.current is None:
        told = f"{ballot.judge} has judged all of {ballot.total:,}"
        if ballot.identical:
            told += f"; identical answers, counted as ties: {ballot.identical:,}"
        print(f"{told}. The votes are in {votes.path}.")
        verdict_forms.tell(verdicts.judged(votes.entries()), arguments.html, arguments.json)
        return
    if ballot is None:
        print("\nNobody has judged yet.")
    else:
        print(
            f"\n{ballot.done:,} of {ballot.total:,} votes of {ballot.judge} are saved in "
            f"{votes.path}. To continue:\n    {command(arguments, ballot.judge)}"
        )
    sys.exit(130)


def _serve(booth: Booth, arguments: argparse.Namespace) -> None:
    listener = listening(arguments.port)
    url = f"http://{HOST}:{listener.getsockname()[1]}/"
    print(f"The page: {url} (Ctrl-C ends it; every vote is saved)", flush=True)
    if not arguments.no_browser:  # in a thread: a browser of the terminal returns when it is left
        threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
    booth.serve(listener)


def command(arguments: argparse.Namespace, judge: str) -> str:
    """The command that continues."""
    words = ["python", "-m", "alpaca", "compare", arguments.first, arguments.second]
    words += ["--votes", arguments.votes] if arguments.votes else []
    words += ["--judge", judge]
    words += ["--seed", arguments.seed] if arguments.seed else []
    words += ["--limit", arguments.limit] if arguments.limit else []
    return shlex.join(map(str, words))
