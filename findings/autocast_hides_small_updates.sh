#!/usr/bin/env bash
# torch 2.13.0 (CPU): fp32 weights under bf16 autocast. A good guess: with fp32 master weights, no AdamW
# update is lost in bf16 training. Seen: where the weights start as bf16 numbers (as in the published
# checkpoints of Llama 2 and 3, Mistral, Qwen), a step at a learning rate of 2e-5 changes every fp32
# weight of 0.02 to 0.1, and the layer's output under autocast does not change in a single bit.
# Prints: masters changed 100%, outputs changed 0%. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$work/seen.py" <<'PY'
import torch

torch.manual_seed(0)
layer = torch.nn.Linear(256, 256, bias=False)
with torch.no_grad():  # magnitudes of 0.02 to 0.1, all of them bf16 numbers held in fp32
    size = torch.empty_like(layer.weight).uniform_(0.02, 0.1)
    sign = torch.randint(0, 2, size.shape) * 2 - 1
    layer.weight.copy_((size * sign).bfloat16())
optimizer = torch.optim.AdamW(layer.parameters(), lr=2e-5, weight_decay=0.0)
x = torch.randn(64, 256)


def output():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return layer(x)


before, weights = output(), layer.weight.detach().clone()
before.float().square().mean().backward()
optimizer.step()
after = output()
masters = (layer.weight != weights).float().mean().item()
outputs = (after != before).float().mean().item()
print(f"torch {torch.__version__}: masters changed {masters:.0%}, outputs changed {outputs:.0%}")
assert masters > 0.99 and outputs == 0
PY
"$work/venv/bin/python" "$work/seen.py"
