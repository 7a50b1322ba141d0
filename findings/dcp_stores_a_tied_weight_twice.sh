#!/usr/bin/env bash
# torch 2.13.0 (CPU): a distributed checkpoint of a model whose output matrix is its embedding. A good
# guess: the shared weight is written once, as torch.save writes a shared storage once. Seen:
# get_state_dict lists it under both names (the optimizer's state under one), and
# torch.distributed.checkpoint writes it twice, so SmolLM2-135M's checkpoint has 113 MB more.
# Prints: names 2, moments 1, torch.save 1 copy, distributed checkpoint 2 copies. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$work/seen.py" <<'PY'
import io
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict

ROWS, WIDTH = 4096, 256


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(ROWS, WIDTH)
        self.head = torch.nn.Linear(WIDTH, ROWS, bias=False)
        self.head.weight = self.embedding.weight


dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model = Tied()
optimizer = torch.optim.AdamW(model.parameters())
model.head(model.embedding(torch.arange(3))).sum().backward()
optimizer.step()
weights, moments = get_state_dict(model, optimizer)
one = ROWS * WIDTH * 4
dcp.save({"model": weights}, checkpoint_id=sys.argv[1])
written = sum(path.stat().st_size for path in Path(sys.argv[1]).iterdir())
plain = io.BytesIO()
torch.save(model.state_dict(), plain)
copies = [round(size / one) for size in (plain.tell(), written)]
dist.destroy_process_group()
print(
    f"torch {torch.__version__}: names {len(weights)}, moments {len(moments['state'])}, "
    f"torch.save {copies[0]} copy, distributed checkpoint {copies[1]} copies"
)
assert (len(weights), len(moments["state"]), *copies) == (2, 1, 1, 2)
PY
"$work/venv/bin/python" "$work/seen.py" "$work/checkpoint" 2> "$work/errors" || { cat "$work/errors"; exit 1; }
