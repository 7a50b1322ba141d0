"""Killed at any moment, a run goes on: nothing asked for twice, the same files in the end."""

import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from scripted_teacher import ScriptedTeacher, entries, files, flags, generate, scripted_teacher

from alpaca.records import read_records

ROOT = Path(__file__).resolve().parent.parent


def campaign(tmp_path: Path, kills: int, how: signal.Signals) -> None:
    """Kill a run `kills` times at random moments; what it leaves equals an undisturbed run's."""
    plain, disturbed = tmp_path / "plain", tmp_path / "disturbed"
    with scripted_teacher() as teacher:
        assert generate(teacher, plain / "data.json", wanted=40 * (kills + 1)) == 0
    rng = random.Random(kills)
    output = disturbed / "data.json"
    with scripted_teacher() as teacher:
        for _ in range(kills):
            kill_one(teacher, output, rng, how, wanted=40 * (kills + 1))
        journalled = {reply["text"] for reply in entries(output, "reply")}
        before = Counter(text for text in teacher.paid if text in journalled)
        teacher.on_paid = lambda count: None
        assert generate(teacher, output, wanted=40 * (kills + 1)) == 0
        after = Counter(text for text in teacher.paid if text in journalled)
    assert after == before  # what is in the journal was never asked for again
    assert files(disturbed) == files(plain)


def kill_one(
    teacher: ScriptedTeacher, output: Path, rng: random.Random, how: signal.Signals, wanted: int
) -> None:
    """Run the command in a process of its own and end it a moment after some reply."""
    reached = threading.Event()
    at = len(teacher.paid) + rng.randrange(1, 3)
    teacher.on_paid = lambda count: reached.set() if count >= at else None
    command = [sys.executable, "-m", "alpaca", *flags(teacher, output, "--concurrency", "3")]
    command[command.index("--num_instructions") + 1] = str(wanted)
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    while not reached.wait(0.05) and process.poll() is None:
        pass
    time.sleep(rng.random() / 20)
    process.send_signal(how)
    process.communicate()
    finished = output.exists() and how == signal.SIGKILL
    assert process.returncode in ((0, -how) if finished else (-how, 130))


def test_killed_three_times_the_result_is_that_of_an_undisturbed_run(tmp_path: Path) -> None:
    campaign(tmp_path, 3, signal.SIGKILL)


@pytest.mark.slow
def test_killed_twenty_times_the_result_is_that_of_an_undisturbed_run(tmp_path: Path) -> None:
    campaign(tmp_path, 20, signal.SIGKILL)


def test_ctrl_c_waits_for_what_is_paid_and_the_same_command_goes_on(tmp_path: Path) -> None:
    output = tmp_path / "data.json"
    with scripted_teacher("slow stream") as teacher:
        at = threading.Event()
        teacher.on_paid = lambda count: at.set() if count == 4 else None
        command = [sys.executable, "-m", "alpaca", *flags(teacher, output)]
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert at.wait(60)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "Traceback" not in err
        assert "run the same command again" in err
        replies = [reply["text"] for reply in entries(output, "reply")]
        assert Counter(replies) == Counter(teacher.paid)
        assert f"{len(read_records(output))} of 500" in out
        assert generate(teacher, output) == 0
        assert len(read_records(output)) == 500
        assert len(set(teacher.paid)) == len(teacher.paid)
