"""Training as a child process, which Cog's training API starts, follows and can cancel."""

import asyncio
import os
import sys
from pathlib import Path

import psutil
import torch

from alpaca.errors import UserError

GRACE_SECONDS = 4.0
TAIL = 4000  # characters of output that an error message repeats


async def launch(flags: list[str], root: Path) -> None:
    """Run train.py on all GPUs, or on two CPU ranks, and print its output.

    All ranks are ended when this function returns or is cancelled.

    Raises:
        UserError: the job failed; the error repeats the end of its output.
    """
    ranks = torch.cuda.device_count() or 2
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={ranks}", "train.py", *flags]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1"}
    job = await asyncio.create_subprocess_exec(
        *command,
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
        reason = tail[tail.find("train: error:") :] if "train: error:" in tail else tail
        raise UserError(f"Training failed with exit code {code}:\n{reason.strip()}")


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
