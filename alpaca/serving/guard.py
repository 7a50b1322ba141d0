"""Runs a command in a process group of its own, and ends the whole group with its own parent.

    python guard.py COMMAND...

A child of the command may outlive it or ignore the end of its input, as vLLM's workers do. Whatever
ends this program or its parent ends them all: first by SIGTERM, after three seconds by SIGKILL.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys

GRACE = 3.0  # seconds
PR_SET_PDEATHSIG = 1  # prctl(2)


def main() -> int:
    """Run the command; returns its exit code."""
    parent = os.getppid()
    signal.signal(signal.SIGTERM, ended)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        return 0  # it ended before it could be watched
    process = subprocess.Popen(sys.argv[1:], start_new_session=True)
    try:
        return process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


def ended(*_: object) -> None:
    """Leave `main` by its `finally`, which a second signal must not leave."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(0)


if __name__ == "__main__":
    sys.exit(main())
