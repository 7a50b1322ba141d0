#!/usr/bin/env bash
# onnxruntime-genai 0.18.0's Tokenizer, on a LLaMA-style SentencePiece BPE tokenizer.json (normalizer puts "▁"
# before, no pre-tokenizer, BOS by its post-processor). A good guess: the ids of the file's own library,
# tokenizers. Seen: encode() leaves the BOS out, and a merge of "▁" and a digit is never made, though the file
# holds it ("▁1"); a merge of "▁" and a letter is. Prints both encodings. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip="$work/venv/bin/pip"
"$pip" install -qq --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$pip" install -qq --disable-pip-version-check transformers==5.23.0 accelerate==1.15.0 onnx==1.23.2 onnx-ir==1.1.0 \
  onnxruntime-genai==0.18.0
cat > "$work/make.py" <<'PY'
import sys

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
merges = [("\u2581", "1"), ("\u2581", "a")]
pieces += ["\u2581", *"1234567890ab"] + ["".join(pair) for pair in merges]
core = Tokenizer(models.BPE({one: at for at, one in enumerate(pieces)}, merges, unk_token="<unk>",
                            fuse_unk=True, byte_fallback=True))
core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
core.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
core.add_special_tokens([AddedToken(name, special=True) for name in pieces[:3]])
core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
PreTrainedTokenizerFast(
    tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
).save_pretrained(sys.argv[1])
LlamaForCausalLM(
    LlamaConfig(vocab_size=len(pieces), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                num_attention_heads=2, bos_token_id=1, eos_token_id=2)
).save_pretrained(sys.argv[1])
PY
cat > "$work/seen.py" <<'PY'
import sys

import onnxruntime_genai as og
from tokenizers import Tokenizer

folder, model = sys.argv[1:]
right = Tokenizer.from_file(f"{folder}/tokenizer.json")
own = og.Tokenizer(og.Model(model))
for text in ("a a", "1 1"):
    expected = right.encode(text).tokens
    found = [right.id_to_token(int(one)) for one in own.encode(text)]
    print(repr(text), "tokenizers", expected, "onnxruntime-genai", found)
    assert expected[0] == "<s>" and found[0] != "<s>"
    assert found[-1] == expected[-1] if text == "a a" else found[-2:] == ["\u2581", "1"]
PY
"$work/venv/bin/python" "$work/make.py" "$work/model" > "$work/log" 2>&1 || { tail -5 "$work/log"; exit 1; }
"$work/venv/bin/python" -m onnxruntime_genai.models.builder -m "$work/model" -o "$work/onnx" -p fp32 -e cpu \
  > "$work/log" 2>&1 || { tail -5 "$work/log"; exit 1; }
"$work/venv/bin/python" "$work/seen.py" "$work/model" "$work/onnx"
