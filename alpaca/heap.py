"""tcmalloc in place of the C library's heap, for programs that train on a CPU.

torch asks for blocks aligned to 64 bytes. glibc cuts such a block from a larger one, so the hole
that it leaves when freed is too small for the next block of its size: of blocks freed between
others none is used again (glibc 2.36, `findings/glibc_never_reuses_torchs_blocks.sh`). A training
step on a CPU then takes up to twice the memory that it uses. tcmalloc keeps blocks by their size.
"""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

LIBRARY = "libtcmalloc_minimal.so.4"  # of gperftools: Debian's and Ubuntu's libtcmalloc-minimal4
SWITCH = "ALPACA_TCMALLOC"  # 0: leave the heap as it is
GPU = Path("/dev/nvidiactl")


def replaced() -> bool:
    """Whether this process allocates with tcmalloc."""
    return "tcmalloc" in os.environ.get("LD_PRELOAD", "")


def expected() -> bool:
    """Whether a training program that is started here will allocate with tcmalloc."""
    return replaced() or _wanted()


def _wanted() -> bool:
    fitting = sys.platform == "linux" and os.environ.get(SWITCH) != "0" and not GPU.exists()
    return fitting and "LD_PRELOAD" not in os.environ and installed()


@cache
def installed() -> bool:
    """Whether the dynamic linker finds the library; loading it here would mix two heaps."""
    environment = {**os.environ, "LD_PRELOAD": LIBRARY}
    try:
        tried = subprocess.run(["true"], env=environment, capture_output=True, check=False)
    except OSError:
        return False
    return not tried.stderr  # ld.so says there that it ignores what it cannot preload


def replace() -> None:
    """Start this program again with tcmalloc, if that helps and is possible.

    Not beside a GPU, where a step's tensors are elsewhere, not if a library is preloaded, and not
    if the program itself came through standard input, which cannot be read twice.
    """
    if not _wanted() or sys.argv[0] in ("", "-"):
        return
    environment = {**os.environ, "LD_PRELOAD": LIBRARY}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
