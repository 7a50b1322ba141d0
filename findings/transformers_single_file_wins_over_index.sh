#!/usr/bin/env bash
# transformers 5.23.0: a model folder that holds model.safetensors and, from another save, shards with
# model.safetensors.index.json. A good guess: the index, which lists every tensor, says which files are
# read. Seen: the single file is read and the index is not looked at, without a warning, so a folder
# that a sharded save was copied over keeps its old weights.
# Prints: loaded from model.safetensors. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0
"$work/venv/bin/pip" install -qq --disable-pip-version-check transformers==5.23.0 numpy==2.4.6
cat > "$work/seen.py" <<'PY'
import sys
import warnings
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

folder = Path(sys.argv[1])
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2,
)
models = {}
for kind, size in (("model.safetensors", "5GB"), ("the index", "20KB")):
    torch.manual_seed(len(models))
    models[kind] = LlamaForCausalLM(config)
    kept = {path.name: path.read_bytes() for path in folder.glob("*")} if folder.exists() else {}
    models[kind].save_pretrained(folder, max_shard_size=size)
    for name, content in kept.items():  # save_pretrained deletes the weights of an earlier save
        if not (folder / name).exists():
            (folder / name).write_bytes(content)
assert (folder / "model.safetensors").exists()
assert (folder / "model.safetensors.index.json").exists()
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    loaded = LlamaForCausalLM.from_pretrained(folder)
found = [
    kind for kind, model in models.items()
    if model.lm_head.weight.equal(loaded.lm_head.weight)
]
print(f"transformers {transformers.__version__}: loaded from {found[0]}, {len(warned)} warnings")
assert found == ["model.safetensors"] and not warned
PY
"$work/venv/bin/python" "$work/seen.py" "$work/model"
