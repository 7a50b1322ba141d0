"""Run every step once with a tiny model, in this environment, with the commands that people type.

The steps are: convert, train on all ranks, kill, resume, export, verify, serve, predict, stream,
cancel. What works with two layers works with eighty, as far as the environment decides it. The
first stage that fails ends the rehearsal.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from alpaca.doctor import asking, devices, tiny
from alpaca.doctor.finding import Finding

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data/seed_tasks.jsonl"
STEPS = 24
SECONDS = 120.0  # the most one stage may take
FIRST_PORT = 5050


class FailedError(Exception):
    """A stage failed; the message says what happened."""


class Rehearsal:
    """The stages, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        """`folder` is empty; the caller removes it."""
        self.folder = folder
        self.base, self.out = folder / "weights/tiny", folder / "alpaca_out"
        self.log = folder / "server.log"
        self.ranks = devices.driver().gpus or devices.CPU_RANKS
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.server: subprocess.Popen[bytes] | None = None

    def stages(self) -> list[tuple[str, Callable[[], str]]]:
        """Name and body of each stage, in order."""
        return [
            ("convert", self.convert),
            ("train, kill", self.train_and_kill),
            ("resume", self.resume),
            ("verify", self.verify),
            ("adapter", self.adapter),
            ("serve", self.serve),
            ("predict", self.predict),
            ("stream", self.stream_and_cancel),
        ]

    def convert(self) -> str:
        """Convert a tiny Hugging Face folder."""
        tiny.write(self.folder / "source/tiny", DATA)
        run("convert", "--input_dir", self.folder / "source/tiny", "--output_dir", self.base.parent)
        return f"{len(list(self.base.iterdir()))} files"

    def training(self, **more: object) -> list[str]:
        """The training command, the same for the killed run and the resumed one; with `more`."""
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.ranks}"]
        flags = {
            "model_name_or_path": self.base,
            "data_path": DATA,
            "output_dir": self.out,
            "max_steps": STEPS,
            "save_steps": 2,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-6,
            "bf16": True,
            **more,
        }
        words = [f"--{name}={value}" for name, value in flags.items()]
        return [sys.executable, *launcher, "train.py", *words]

    def train_and_kill(self) -> str:
        """Train until there is a checkpoint, then kill every process."""
        process = subprocess.Popen(
            self.training(),
            cwd=ROOT,
            env=_environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        deadline = time.monotonic() + SECONDS
        try:
            while not any(self.out.glob("checkpoint-*")):
                if process.poll() is not None:
                    raise FailedError(tail(process.communicate()[0]))
                if time.monotonic() > deadline:
                    raise FailedError(f"no checkpoint within {SECONDS:.0f} s")
                time.sleep(0.02)
        finally:
            kill(process)
        return f"{self.ranks} rank(s), killed after step {self.steps()[-1]} of {STEPS}"

    def steps(self) -> list[int]:
        """The steps in the log."""
        lines = (self.out / "log.jsonl").read_text().splitlines()
        return [line["step"] for line in map(json.loads, lines) if "loss" in line]

    def resume(self) -> str:
        """The same command resumes from the checkpoint, and exports."""
        done(self.training())
        if self.steps() != list(range(1, STEPS + 1)):
            raise FailedError(f"the log's steps are {self.steps()}")
        return f"resumed, trained to step {STEPS} and exported"

    def verify(self) -> str:
        """The exported folder matches its passport."""
        run("verify", self.out)
        return "the exported folder is intact"

    def adapter(self) -> str:
        """A LoRA over a base in 4 bits: peft and bitsandbytes work on these devices."""
        out = self.folder / "lora"
        flags = {"output_dir": out, "max_steps": 2, "lora_rank": 4, "quantize_base": "nf4"}
        done(self.training(**flags, learning_rate=1e-4))
        run("verify", out, "--base", self.base)
        return "a LoRA over nf4 was trained, and is intact"

    def serve(self) -> str:
        """Start Cog's server on the trained model."""
        words = [sys.executable, "-m", "alpaca", "serve", "--weights", self.out]
        with open(self.log, "wb") as log:
            self.server = subprocess.Popen(
                [*map(str, words), "--port", str(self.port)],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        status = asking.wait_until_ready(self.url, SECONDS)
        if status != "READY":
            raise FailedError(f"the server says {status}: {tail(self.log.read_text())}")
        return f"ready on port {self.port}"

    def predict(self) -> str:
        """One answer to one question."""
        inputs = {"prompt": "Say hello.", "max_new_tokens": 8, "seed": 1}
        answer = asking.post(f"{self.url}/predictions", {"input": inputs})
        if answer.get("status") != "succeeded" or len(answer["output"]) != 1:
            raise FailedError(f"the server answered {answer}")
        return f"{answer['metrics']['completion_tokens']} tokens"

    def stream_and_cancel(self) -> str:
        """A long answer is streamed, and ends when it is cancelled."""
        inputs = {
            "prompt": "Go on.",
            "max_new_tokens": tiny.CONTEXT - 200,
            "total_tokens": 10**6,
            "temperature": 0,
            "stream": True,
        }
        request = {"id": "rehearsal", "input": inputs}
        pieces, last = 0, {}
        for name, data in asking.stream(f"{self.url}/predictions", request):
            last = data
            pieces += name == "output"
            if name == "output" and pieces == 3:
                asking.post(f"{self.url}/predictions/rehearsal/cancel")
        if last.get("status") != "canceled":
            raise FailedError(f"after {pieces} pieces it was {last.get('status')}, not canceled")
        return f"{pieces} pieces arrived, then it was cancelled"

    def stop(self) -> None:
        """Stop the server, if it is running."""
        if self.server is not None and self.server.poll() is None:
            self.server.terminate()
            try:
                self.server.wait(timeout=20)
            except subprocess.TimeoutExpired:
                kill(self.server)


def rehearse() -> Iterator[Finding]:
    """Run the stages; one finding each, and one for the whole when all have passed."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="alpaca-rehearsal-") as folder:
        rehearsal = Rehearsal(Path(folder))
        try:
            for name, body in rehearsal.stages():
                started = time.monotonic()
                try:
                    detail = body()
                except (FailedError, OSError, subprocess.SubprocessError) as error:
                    yield Finding(name, False, str(error), "The lines above show where it failed.")
                    return
                yield Finding(name, True, f"{detail} ({time.monotonic() - started:.0f} s)")
        finally:
            rehearsal.stop()
    spent = time.monotonic() - began
    yield Finding("rehearsal", True, f"the whole pipeline works here ({spent:.0f} s)")


def run(*words: object) -> None:
    """Run a verb of this program; raises FailedError with the end of its output."""
    done([sys.executable, "-m", "alpaca", *map(str, words)])


def done(command: list[str]) -> None:
    """Run a command to its end; raises FailedError with the end of its output."""
    ended = subprocess.run(
        command,
        cwd=ROOT,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    if ended.returncode:
        raise FailedError(tail(ended.stdout + ended.stderr))


def tail(output: str) -> str:
    """The end of a program's output, for a one-line message."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    named = [line for line in lines if "error:" in line.lower()]
    return " | ".join((named or lines)[-3:])[:600]


def kill(process: "subprocess.Popen[Any]") -> None:
    """Kill a process and its descendants, also torchrun's ranks, which have their own sessions."""
    try:
        parent = psutil.Process(process.pid)
        processes = [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return
    for member in processes:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.communicate()


def free_port() -> int:
    """A port that no process listens on."""
    taken = {found.laddr.port for found in psutil.net_connections("tcp") if found.laddr}
    return next(port for port in range(FIRST_PORT, 65536) if port not in taken)


def _environment() -> dict[str, str]:
    return {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1"}
