#!/usr/bin/env bash
# torch 2.13.0: torchrun --standalone --max-restarts 1, of two ranks, where one fails in the first attempt.
# A good guess: the restarted ranks meet in an empty key-value store (a comment in torch's rendezvous.py:
# "We create a new TCPStore for every retry so no need to add prefix for each attempt"). Seen: it is the
# same store at the same port, and a key that a dead rank wrote is still there. So are the addresses that
# dead ranks left to be connected to (pytorch issue 135712).
# Prints: in attempt 0 the key is absent, in attempt 1 both ranks read it. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$work/rank.py" <<'PY'
import os
import sys
from pathlib import Path

from torch.distributed import rendezvous

store, rank, _ = next(rendezvous("env://"))
attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
found = store.get("key").decode() if store.check(["key"]) else "absent"
Path(sys.argv[1], f"{attempt}-{rank}").write_text(f"{os.environ['MASTER_PORT']} {found}")
store.set(f"looked/{attempt}/{rank}", "")
store.wait([f"looked/{attempt}/0", f"looked/{attempt}/1"])
if attempt == "0" and rank == 0:
    store.set("key", "of attempt 0")
    sys.exit(1)
PY
mkdir "$work/seen"
OMP_NUM_THREADS=1 "$work/venv/bin/torchrun" --standalone --nproc-per-node 2 --max-restarts 1 \
  "$work/rank.py" "$work/seen" 2> "$work/log" || { cat "$work/log"; exit 1; }
cat > "$work/seen.py" <<'PY'
import sys
from pathlib import Path

ports = {}
for path in sorted(Path(sys.argv[1]).iterdir()):
    attempt, rank = path.name.split("-")
    ports[path.name], found = path.read_text().split(" ", 1)
    print(f"torch 2.13.0: attempt {attempt}, rank {rank}: key {found}")
    assert found == ("absent" if attempt == "0" else "of attempt 0")
assert list(ports) == ["0-0", "0-1", "1-0", "1-1"]
assert len(set(ports.values())) == 1, f"not the same port: {ports}"
PY
python3 "$work/seen.py" "$work/seen"
