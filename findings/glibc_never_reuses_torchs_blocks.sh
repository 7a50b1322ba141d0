#!/usr/bin/env bash
# torch 2.13.0 (CPU) on glibc 2.36 (Debian 12): memory of freed tensors. A good guess: a freed tensor's block
# is used for the next tensor of the same size. Seen: of 64 freed tensors of 3 MB, between others that are
# in use, none is. torch asks posix_memalign for blocks aligned to 64 bytes; glibc cuts such a block out of
# one up to 96 bytes larger, so the freed hole is too small for the same request. The heap of a training step
# then grows to twice what is in use. malloc itself, and posix_memalign of tcmalloc (gperftools, Debian's
# libtcmalloc-minimal4 2.10), use all 64 again. Where tcmalloc is not installed only glibc is shown.
# Prints for each how many of 64 were used again. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
[ "$(getconf GNU_LIBC_VERSION)" = "glibc 2.36" ] || { echo "needs glibc 2.36 (Debian 12)"; exit 1; }
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$work/seen.py" <<'PY'
import ctypes
import sys

import torch

ctypes.CDLL(None).mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: where it moves to by itself in training


def made():
    return [torch.empty(3 << 18) for _ in range(128)]  # 3 MB each, in one row


held = made()
freed = {tensor.data_ptr() for tensor in held[::2]}
del held[::2]
again = [torch.empty(3 << 18) for _ in range(64)]
reused = sum(tensor.data_ptr() in freed for tensor in again)
print(f"torch {torch.__version__}, {sys.argv[1]}: {reused} of 64 blocks used again")
assert reused == int(sys.argv[2])
PY
"$work/venv/bin/python" "$work/seen.py" "glibc 2.36" 0
library=libtcmalloc_minimal.so.4
if [ -n "$(ldconfig -p | grep "$library")" ]; then
  LD_PRELOAD=$library "$work/venv/bin/python" "$work/seen.py" tcmalloc 64
fi
