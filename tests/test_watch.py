"""`python -m alpaca watch` as people run it, in a terminal and without, and what it reads."""

import codecs
import fcntl
import json
import math
import os
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from training_runs import ROOT, lines, losses, train

from alpaca import atomic, passport
from alpaca.prompt import render
from alpaca.web.runs import POINTS, Run, thinned
from alpaca.web.watch import plain, status

CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
SCREEN_ON, SCREEN_OFF, CURSOR_ON, HOME = "\x1b[?1049h", "\x1b[?1049l", "\x1b[?25h", "\x1b[H"
KEYS = {
    "folder", "step", "total_steps", "loss", "eval_loss", "learning_rate", "tokens_per_second",
    "seconds_left", "finished", "updated", "samples",
}  # fmt: skip


class Terminal:
    """A terminal of its own with the command in it, which gets its keys and window sizes."""

    def __init__(self, folder: Path, columns: int = 80, rows: int = 24) -> None:
        self.keyboard, there = os.openpty()
        environment = {**os.environ, "TERM": "xterm-256color"}
        for name in ("COLUMNS", "LINES"):  # rich takes them for the terminal's size
            environment.pop(name, None)
        self.resize(columns, rows)
        self.job = subprocess.Popen(
            ["setsid", "--ctty", sys.executable, "-m", "alpaca", "watch", str(folder)],
            cwd=ROOT,
            env=environment,
            stdin=there,
            stdout=there,
            stderr=there,
            # a suite started in the background ignores Ctrl-C, and so would its children
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        os.close(there)
        self.output, self.decoder = "", codecs.getincrementaldecoder("utf-8")()

    def resize(self, columns: int, rows: int) -> None:
        size = struct.pack("HHHH", rows, columns, 0, 0)
        fcntl.ioctl(self.keyboard, termios.TIOCSWINSZ, size)

    def read(self, text: str | None = None, seconds: float = 60) -> str:
        """The output from now until `text` is in it, or to its end."""
        start, deadline = len(self.output), time.monotonic() + seconds
        while text is None or text not in self.output[start:]:
            assert time.monotonic() < deadline, self.output[start:]
            if select.select([self.keyboard], [], [], 0.2)[0]:
                try:
                    self.output += self.decoder.decode(os.read(self.keyboard, 65536))
                except OSError:  # the command has closed its side
                    assert text is None, self.output[start:]
                    break
        return self.output[start:]

    def press(self, key: str) -> None:
        os.write(self.keyboard, key.encode())


@contextmanager
def terminal(folder: Path, columns: int = 80, rows: int = 24) -> Iterator[Terminal]:
    opened = Terminal(folder, columns, rows)
    try:
        yield opened
    finally:
        opened.job.kill()
        opened.job.wait()
        os.close(opened.keyboard)


def watch(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "alpaca", "watch", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def line(step: int, **more: Any) -> str:
    """A line as the trainer writes it, as far as it is read here."""
    figures = {"loss": 2 + 1 / step, "grad_norm": 1.5, "lr": 2e-5, "step_seconds": 2.0}
    return json.dumps({"step": step, **figures, "tokens_per_second": 1500.0, "memory": 4e8, **more})


def write(folder: Path, *texts: str) -> Path:
    folder.mkdir(exist_ok=True)
    atomic.write_text(folder / "log.jsonl", "".join(f"{text}\n" for text in texts))
    return folder / "log.jsonl"


def append(folder: Path, text: str) -> None:
    with open(folder / "log.jsonl", "a") as file:
        file.write(text)


def read(folder: Path) -> Run:
    run = Run(folder)
    run.refresh()
    return run


def steps(run: Run) -> list[int]:
    return [step for step, _ in run.series["loss"]]


@pytest.fixture(scope="module")
def followed(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, str, int]]:
    """A run of three steps, what a terminal that was opened before it showed, and its exit code."""
    out = tmp_path_factory.mktemp("watched") / "alpaca_out"
    with terminal(out) as opened:
        opened.read("Waiting for log.jsonl")
        flags = {"model_name_or_path": tiny_model, "data_path": ROOT / "data/seed_tasks.jsonl"}
        flags |= {"output_dir": out, "max_steps": 3, "eval_fraction": 0.02}
        flags |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
        done = train(*(f"--{name}={value}" for name, value in flags.items()))
        assert done.returncode == 0, done.stderr
        opened.read()
        yield out, opened.output, opened.job.wait()


def test_a_run_is_followed_from_before_its_first_line_to_its_end(
    followed: tuple[Path, str, int],
) -> None:
    out, output, code = followed
    assert code == 0
    during, _, after = output.partition(SCREEN_OFF)
    assert SCREEN_ON in during
    assert "step 3 of 3 (100%)" in during
    assert "step 3 of 3 (100%)" in after
    assert "Finished" in after
    assert f"{losses(out)[-1]:.4f} at step 3" in after
    assert "Traceback" not in output


def test_the_summary_of_a_run_is_what_its_log_and_passport_say(
    followed: tuple[Path, str, int],
) -> None:
    out, _, _ = followed
    found = read(out).summary()
    assert found == json.loads(json.dumps(found))
    assert set(found) == KEYS
    assert (found["folder"], found["step"], found["total_steps"]) == ("alpaca_out", 3, 3)
    assert found["finished"]
    assert found["seconds_left"] == 0
    assert found["updated"] == (out / "log.jsonl").stat().st_mtime
    log = lines(out)
    for name, key in (("loss", "loss"), ("eval_loss", "eval_loss"), ("learning_rate", "lr")):
        assert len(found[name]) >= 2
        assert found[name] == [[entry["step"], entry[key]] for entry in log if key in entry]


def test_a_model_that_is_being_replaced_is_not_a_finished_run(
    followed: tuple[Path, str, int], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(followed[0], out)
    assert read(out).finished
    passport.forget_extras(out)  # as train.py does before it trains again
    assert not read(out).finished


def test_a_half_written_line_waits_for_its_end(tmp_path: Path) -> None:
    write(tmp_path, line(1))
    append(tmp_path, line(2)[:30])
    run = read(tmp_path)
    assert (steps(run), run.damaged) == ([1], 0)
    append(tmp_path, line(2)[30:])
    run.refresh()
    assert (steps(run), run.damaged) == ([1], 0)
    append(tmp_path, "\n" + line(3) + "\n")
    run.refresh()
    assert (steps(run), run.damaged) == ([1, 2, 3], 0)


@pytest.mark.parametrize("later", [5, 12, 30])
def test_a_log_that_a_resumed_run_rolled_back_is_read_again(tmp_path: Path, later: int) -> None:
    """It may be shorter than before, or already longer."""
    write(tmp_path, *(line(step) for step in range(1, 11)))
    run = read(tmp_path)
    resumed = [line(step) for step in range(1, 5)]
    resumed += [line(step, loss=9.0 + step) for step in range(5, later + 1)]
    write(tmp_path, *resumed)
    run.refresh()
    assert steps(run) == list(range(1, later + 1))
    assert run.series["loss"][4] == (5, 14.0)
    assert run.series["loss"][3][1] == 2.25


def test_a_log_that_was_rewritten_in_place_is_read_again(tmp_path: Path) -> None:
    log = write(tmp_path, line(1), line(2))
    run = read(tmp_path)
    same = log.stat().st_ino
    log.write_text("".join(f"{line(step, loss=7.0)}\n" for step in (1, 2, 3)))
    assert log.stat().st_ino == same
    run.refresh()
    assert run.series["loss"] == [(1, 7.0), (2, 7.0), (3, 7.0)]
    log.write_text("")
    run.refresh()
    assert (run.step, steps(run)) == (0, [])
    shutil.rmtree(tmp_path)
    run.refresh()
    assert run.updated is None


def test_damaged_lines_are_left_out_counted_and_said(tmp_path: Path) -> None:
    log = write(tmp_path, line(1))
    bad = (b"\xff\xfe", b"{", b"[1]", b"null", b'{"loss": 1.0}', b'{"step": true}', b'{"step": -1}')
    bad += (b'{"step": 1, "samples": [7]}', b"[" * 100_000)
    with open(log, "ab") as file:
        file.write(b"\n".join([*bad, b'{"step": 2, "loss": 1e400, "lr": null}', b""]))
    append(tmp_path, line(3) + "\n")
    assert steps(read(tmp_path)) == [1, 3]
    done = watch(tmp_path, "--once")
    assert done.returncode == 0, done.stderr
    assert re.search(rf"damaged lines +{len(bad)} of the log", done.stdout)


def test_of_20000_lines_only_new_ones_are_read_and_extremes_are_kept(tmp_path: Path) -> None:
    texts = [line(step) for step in range(1, 20_001)]
    texts[776], texts[12_344] = line(777, loss=50.0), line(12_345, loss=0.001)
    log = write(tmp_path, *texts)
    run = read(tmp_path)
    with open(log, "r+b") as file:  # what was read before would be damaged if it was read again
        file.write(b"?" * 10_000)
    append(tmp_path, line(20_001) + "\n")
    run.refresh()
    assert (len(steps(run)), run.damaged) == (20_001, 0)
    found = run.summary()
    assert 400 < len(found["loss"]) <= POINTS
    assert found["loss"][0] == [1, 3.0]
    assert found["loss"][-1][0] == 20_001
    assert [777, 50.0] in found["loss"]
    assert [12_345, 0.001] in found["loss"]
    assert found["loss"] == sorted(found["loss"])


@pytest.mark.parametrize("count", [0, 1, 4, 499, 500, 501, 502, 999, 3_001])
def test_thinning_keeps_the_ends_and_never_exceeds_its_limit(count: int) -> None:
    points = [(step, math.sin(step * step)) for step in range(count)]
    kept = thinned(points)
    assert len(kept) == min(count, len(kept)) <= POINTS
    assert kept == sorted(set(kept))
    assert kept[:1] + kept[-1:] == points[:1] + points[-1:]
    for extreme in (min, max):
        assert not points or extreme(v for _, v in points) == extreme(v for _, v in kept)


def test_the_steps_in_all_are_the_logs_else_the_newest_checkpoints_else_unknown(
    tmp_path: Path,
) -> None:
    write(tmp_path, *(line(step) for step in range(1, 11)))
    run = read(tmp_path)
    assert run.total_steps is None
    assert run.seconds_left is None
    assert "no checkpoint holds them yet" in plain(run, time.time())
    for step, total in (("9", 8), ("10", 40), ("x", 99)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        record = json.dumps({"run": {"steps": total}})
        (tmp_path / f"checkpoint-{step}" / "run.json").write_text(record)
    run.refresh()
    assert (run.total_steps, run.seconds_left) == (40, 60.0)
    append(tmp_path, line(11, total_steps=50) + "\n")
    run.refresh()
    assert (run.total_steps, run.seconds_left) == (50, 78.0)


def test_a_summary_without_a_terminal_is_plain_text(tmp_path: Path) -> None:
    answer = {"prompt": render("Name three [red]colors."), "answer": "Red,\x1b[31m\x07 blue."}
    write(
        tmp_path,
        line(1),
        json.dumps({"step": 1, "samples": [{"prompt": "earlier", "answer": "earlier"}]}),
        line(2, total_steps=4),
        json.dumps({"step": 2, "eval_loss": 2.75}),
        json.dumps({"step": 2, "samples": [answer]}),
    )
    for words in ([tmp_path], [tmp_path, "--once"]):
        done = watch(*words)
        assert done.returncode == 0, done.stderr
        assert done.stdout.replace("\n", "").isprintable()
        for text in (
            "step 2 of 4 (50%)",
            "2.5000 at step 2; 3.0000 at step 1",
            "2.7500 at step 2",
            "0.40 GB",
            "answer at step 2: Name three [red]colors.\n    Red, [31m blue.",
        ):
            assert text in done.stdout
        assert "earlier" not in done.stdout
    assert read(tmp_path).summary()["samples"][-1] == {"step": 2, **answer}


@pytest.mark.parametrize("made", [False, True])
def test_without_a_log_once_says_what_to_name(tmp_path: Path, made: bool) -> None:
    out = tmp_path / "out"
    if made:
        out.mkdir()
    done = watch(out, "--once")
    assert done.returncode == 2
    assert done.stderr.startswith(f"alpaca watch: error: There is no {out / 'log.jsonl'}.")
    assert "--output_dir" in done.stderr
    assert not done.stdout


def test_ctrl_c_ends_the_view_and_restores_the_terminal(tmp_path: Path) -> None:
    write(tmp_path, line(1, total_steps=4), line(2))
    with terminal(tmp_path) as opened:
        opened.read("step 2 of 4")
        append(tmp_path, line(3) + "\n")
        opened.read("step 3 of 4")
        opened.press("\x03")
        opened.read()
        assert opened.job.wait() == 0
        before, _, after = opened.output.rpartition(SCREEN_OFF)
        assert SCREEN_ON in before
        assert CURSOR_ON in opened.output
        assert "step 3 of 4" in after
        assert "Traceback" not in opened.output


def test_the_view_fits_the_terminal_also_after_its_size_changed(tmp_path: Path) -> None:
    texts = [line(step, total_steps=1_000_000) for step in range(1, 300)]
    sample = {"prompt": "Say it. " * 30, "answer": "รามาเกียรติ์ 漢字 " * 20}
    write(tmp_path, *texts, json.dumps({"step": 299, "eval_loss": 2.5, "samples": [sample]}))
    with terminal(tmp_path, 120, 40) as opened:
        opened.read("step 299 of 1,000,000")
        for columns, rows in ((80, 24), (37, 20)):
            opened.resize(columns, rows)
            drawn: list[str] = []
            deadline = time.monotonic() + 60
            while len(drawn) != rows:  # pictures of before the change may come first
                assert time.monotonic() < deadline, drawn
                opened.read(HOME)
                drawn = CODES.sub("", opened.output.split(HOME)[-2]).split("\r\n")
            assert {cell_len(row) for row in drawn} == {columns}
            assert any(0x2800 < ord(cell) <= 0x28FF for row in drawn for cell in row)


def test_what_the_run_does_is_told_from_its_files_and_the_time(tmp_path: Path) -> None:
    lock = tmp_path / ".train.lock"
    log = write(tmp_path, *(line(step, total_steps=9) for step in range(1, 9)))
    written = log.stat().st_mtime
    assert "Stopped" in status(read(tmp_path), written + 1)[0]
    lock.touch()
    os.utime(lock, (written - 100, written - 100))
    assert status(read(tmp_path), written + 3)[0] == (
        "Training at 1,500 tokens/s, about 2 s left, last line 3 s ago."
    )
    assert "WARNING: no line for 1 min 0 s" in status(read(tmp_path), written + 60)[0]
    append(tmp_path, line(9) + "\n")
    assert "the model is being written" in status(read(tmp_path), written + 60)[0]
    os.utime(lock, (time.time() + 50, time.time() + 50))
    assert "loads its model" in status(read(tmp_path), written + 60)[0]


def test_to_watch_imports_no_torch() -> None:
    code = "import sys, alpaca.web.watch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
