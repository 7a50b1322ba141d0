#!/usr/bin/env bash
# llama.cpp's convert_lora_to_gguf.py (in llama-cpp-python 0.3.36) and rank-stabilized LoRA. A good guess: a PEFT adapter
# that it converts without a word answers as in peft. Seen: `use_rslora` is not read. The GGUF file of an adapter
# with it has the same bytes as one without; llama.cpp scales both by alpha / rank, where peft 0.21.2 scales
# the first by alpha / sqrt(rank): for alpha 8 and rank 4, by 2 for 4. Exit code 0, no warning.
# Prints both scales. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/pip" install -qq --disable-pip-version-check)
"${pip[@]}" torch==2.13.0
"${pip[@]}" numpy==2.4.6 transformers==4.57.6 peft==0.21.2 gguf==0.19.0 sentencepiece==0.2.1 safetensors==0.8.0
"$work/venv/bin/pip" download -qq --disable-pip-version-check --no-deps llama-cpp-python==0.3.36 -d "$work"
tar -xzf "$work"/llama_cpp_python-0.3.36.tar.gz -C "$work"
cat > "$work/seen.py" <<'PY'
import pathlib
import subprocess
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

work = pathlib.Path(sys.argv[1])
converter = next(work.glob("llama_cpp_python-*/vendor/llama.cpp/convert_lora_to_gguf.py"))
config = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2, architectures=["LlamaForCausalLM"],
)
files, scales = [], []
for rank_stabilized in (False, True):
    torch.manual_seed(0)
    base = LlamaForCausalLM(config)
    settings = LoraConfig(r=4, lora_alpha=8, use_rslora=rank_stabilized, target_modules=["q_proj"],
                          init_lora_weights=False)
    model = get_peft_model(base, settings)
    scales.append(model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"])
    folder = work / "adapter"  # the same name for both: it is written into the file
    model.save_pretrained(folder)
    config.save_pretrained(work / "base")
    out = work / "lora.gguf"
    command = [sys.executable, converter, folder, "--base", work / "base", "--outfile", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files.append(out.read_bytes())
print(f"peft scales by {scales[0]:g} and, rank-stabilized, by {scales[1]:g}; "
      f"the GGUF files are {'the same' if files[0] == files[1] else 'different'}")
assert scales == [2, 4] and files[0] == files[1]
PY
"$work/venv/bin/python" "$work/seen.py" "$work"
