#!/usr/bin/env bash
# llama.cpp's convert_hf_to_gguf.py (of llama-cpp-python 0.3.36), transformers 4.57.6: a LLaMA-style
# SentencePiece BPE tokenizer as tokenizer.json alone, which transformers and vLLM load as it is. A good
# guess: the converter keeps the order of the merges, or refuses. Seen: it exits 0, and gives every piece
# the same score, so nothing is left that says which pair llama.cpp should merge first.
# Prints: exit 0, the number of pieces, 1 score among those that merges make. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip="$work/venv/bin/pip"
"$pip" install -qq --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$pip" install -qq --disable-pip-version-check transformers==4.57.6 sentencepiece==0.2.1 protobuf gguf==0.19.0
"$pip" download -qq --disable-pip-version-check --no-deps \
  llama-cpp-python==0.3.36 -d "$work"
tar -xzf "$work"/llama_cpp_python-0.3.36.tar.gz -C "$work"
cat > "$work/make.py" <<'PY'
import json
import sys

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import LlamaConfig, LlamaForCausalLM

folder = sys.argv[1]
pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
letters = ["\u2581", *"abcdefgh"]
merges = [("a", "b"), ("c", "d"), ("ab", "cd"), ("e", "f"), ("\u2581", "abcd"), ("g", "h")]
pieces += letters + ["".join(pair) for pair in merges]
model = models.BPE(
    vocab={piece: at for at, piece in enumerate(pieces)},
    merges=merges,
    unk_token="<unk>",
    fuse_unk=True,
    byte_fallback=True,
)
tokenizer = Tokenizer(model)
tokenizer.normalizer = normalizers.Sequence(
    [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
)
tokenizer.decoder = decoders.Sequence(
    [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
)
tokenizer.add_special_tokens([AddedToken(name, special=True) for name in pieces[:3]])
config = LlamaConfig(
    vocab_size=len(pieces),
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    bos_token_id=1,
    eos_token_id=2,
)
LlamaForCausalLM(config).save_pretrained(folder)
tokenizer.save(f"{folder}/tokenizer.json")
with open(f"{folder}/tokenizer_config.json", "w") as file:
    json.dump({"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
               "unk_token": "<unk>", "legacy": False}, file)
PY
cat > "$work/seen.py" <<'PY'
import sys

import gguf

fields = gguf.GGUFReader(sys.argv[1]).fields
tokens = fields["tokenizer.ggml.tokens"].contents()
scores = dict(zip(tokens, fields["tokenizer.ggml.scores"].contents()))
merged = {scores[piece] for piece in ("ab", "cd", "abcd", "ef", "\u2581abcd", "gh")}
print(f"exit 0, {len(tokens)} pieces, {len(merged)} score among those that merges make: {merged}")
assert len(merged) == 1
PY
"$work/venv/bin/python" "$work/make.py" "$work/model" > "$work/out" 2>&1 || { cat "$work/out"; exit 1; }
"$work/venv/bin/python" "$work"/llama_cpp_python-0.3.36/vendor/llama.cpp/convert_hf_to_gguf.py "$work/model" \
  --outfile "$work/model.gguf" > "$work/out" 2>&1 || { tail -5 "$work/out"; exit 1; }
"$work/venv/bin/python" "$work/seen.py" "$work/model.gguf"
