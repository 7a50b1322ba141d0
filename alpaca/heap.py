"""tcmalloc in place of the C library's heap, for programs that train on a CPU.

torch asks for blocks aligned to 64 bytes. glibc cuts such a block from a larger one, so the hole
that it leaves when freed is too small for the next block of its size: of blocks freed between
others none is used again (glibc 2.36, `findings/glibc_never_reuses_torchs_blocks.sh`). A training
step on a CPU then takes up to twice the memory that it uses. tcmalloc keeps blocks by their size.
"""

import ctypes
import os
import sys
from pathlib import Path

LIBRARY = "libtcmalloc_minimal.so.4"  # of gperftools: Debian's and Ubuntu's libtcmalloc-minimal4
SWITCH = "ALPACA_TCMALLOC"  # 0: leave the heap as it is
GPU = Path("/dev/nvidiactl")


def replaced() -> bool:
    """Whether this process allocates with tcmalloc."""
    return "tcmalloc" in os.environ.get("LD_PRELOAD", "")


def installed() -> bool:
    """Whether the library is there to be used."""
    try:
        ctypes.CDLL(LIBRARY)
    except OSError:
        return False
    return True


def replace() -> None:
    """Start this program again with tcmalloc, if that helps and is possible.

    Not beside a GPU, where a step's tensors are elsewhere, and not if a library is preloaded.
    """
    wanted = sys.platform == "linux" and os.environ.get(SWITCH) != "0" and not GPU.exists()
    if not wanted or "LD_PRELOAD" in os.environ or not installed():
        return
    environment = {**os.environ, "LD_PRELOAD": LIBRARY}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
