"""Training as a child process, which Cog's training API starts, follows and can cancel."""

import asyncio
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch

from alpaca.errors import UserError

BASES = Path(".cache/bases")  # models of the Hub, converted
GRACE_SECONDS = 4.0
TAIL = 4000  # characters of output that an error message repeats


async def launch(flags: list[str], root: Path, secrets: Mapping[str, str]) -> None:
    """Run train.py on all GPUs, or on two CPU ranks, and print its output.

    `secrets`: variables that only the job sees.

    Raises:
        UserError: the job failed; the error repeats the end of its output.
    """
    ranks = torch.cuda.device_count() or 2
    words = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    await run("Training", [*words, "train.py", *flags], root, {**threads, **secrets})


async def fetched(name: str, root: Path, secrets: Mapping[str, str]) -> Path:
    """The folder of a base model: `name` itself, or OWNER/NAME of the Hub, fetched and converted.

    Raises:
        UserError: it could not be fetched or converted.
    """
    owner, _, short = name.partition("/")
    if (root / owner).exists() or not owner or not short or "/" in short:
        return Path(name)
    final = root / BASES / short.lower()
    if not (final / "config.json").is_file():
        given = root / BASES / "fetched"
        fetch = ["-m", "alpaca", "fetch", name, f"--input_dir={given}"]
        await run("Fetching the base", fetch, root, secrets)
        convert = ["-m", "alpaca", "convert", f"--input_dir={given / short}", "--no-tokenizer"]
        await run("Converting the base", [*convert, f"--output_dir={final.parent}"], root, {})
    return final


async def run(what: str, words: list[str], root: Path, variables: Mapping[str, str]) -> None:
    """Run Python with these arguments and print its output.

    It and all that it started are ended when this function returns or is cancelled.

    Raises:
        UserError: it failed; the error repeats the end of its output.
    """
    environment = {**os.environ, **variables, "PYTHONUNBUFFERED": "1"}
    job = await asyncio.create_subprocess_exec(
        sys.executable,
        *words,
        cwd=root,
        env=environment,
        start_new_session=True,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    tail = ""
    try:
        assert job.stdout is not None
        # The progress bar redraws its line, so output is read in pieces, not in lines.
        while piece := await job.stdout.read(4096):
            text = piece.decode(errors="replace")
            print(text, end="", flush=True)
            tail = (tail + text)[-TAIL:]
        code = await job.wait()
    finally:
        end_family(job.pid)
    if code:
        # Cog returns the error separately; the last lines of the logs may arrive too late.
        told = re.search(r"^(train|alpaca \w+): error:", tail, re.MULTILINE)
        reason = tail[told.start() :] if told else tail
        raise UserError(f"{what} failed with exit code {code}:\n{reason.strip()}")


def end_family(pid: int) -> None:
    """End a process and its descendants: SIGTERM, so that they save, and SIGKILL after 4 s.

    torchrun starts each rank in its own session, so no process group contains all of them.
    """
    try:
        parent = psutil.Process(pid)
        family = [parent, *parent.children(recursive=True)]
        parent.terminate()
    except psutil.NoSuchProcess:
        return
    _, alive = psutil.wait_procs(family, timeout=GRACE_SECONDS)
    for process in alive:
        process.kill()
