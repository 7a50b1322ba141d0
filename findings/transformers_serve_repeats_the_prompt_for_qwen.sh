#!/usr/bin/env bash
# `transformers serve` 5.23.0, on a Qwen 2 model whose chat template is not ChatML (an Alpaca one, say), as
# fine-tuning in another format leaves it. A good guess: the chat completion is the answer. Seen: for Qwen
# model types it parses answers with a response template of its own, which looks for "<|im_start|>assistant"
# in the prompt; without that anchor the message holds the whole prompt and then the answer. The same weights
# as a Llama come back without it. Prints both messages. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
server=
trap 'test -z "$server" || kill "$server" 2> /dev/null || true; rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip="$work/venv/bin/pip"
"$pip" install -qq --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$pip" install -qq --disable-pip-version-check "transformers[serving]==5.23.0" accelerate==1.15.0
cat > "$work/make.py" <<'PY'
import sys

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
core = Tokenizer(models.BPE({one: at for at, one in enumerate([*letters, "<end>"])}, []))
core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
core.decoder = decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")
tokenizer.chat_template = "### Instruction:\n{{ messages[0]['content'] }}\n\n### Response:"
shape = dict(vocab_size=257, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
             num_attention_heads=2, num_key_value_heads=2, eos_token_id=256)
for name, config, kind in (("qwen2", Qwen2Config, Qwen2ForCausalLM), ("llama", LlamaConfig, LlamaForCausalLM)):
    torch.manual_seed(0)
    kind(config(**shape)).save_pretrained(f"{sys.argv[1]}/{name}")
    tokenizer.save_pretrained(f"{sys.argv[1]}/{name}")
PY
cat > "$work/ask.py" <<'PY'
import json
import sys
import time
import urllib.request

folder, port = sys.argv[1:]
body = {"model": folder, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 4,
        "temperature": 0, "stream": False}
request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(),
                                 {"Content-Type": "application/json"})
for _ in range(300):
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
        break
    except OSError:
        time.sleep(0.2)
with urllib.request.urlopen(request) as answer:
    message = json.load(answer)["choices"][0]["message"]["content"]
print(folder.rpartition("/")[2], repr(message))
assert ("### Instruction:" in message) == folder.endswith("qwen2")
PY
export HF_HUB_OFFLINE=1
"$work/venv/bin/python" "$work/make.py" "$work" > "$work/log" 2>&1 || { tail -5 "$work/log"; exit 1; }
for name in qwen2 llama; do
  port=$("$work/venv/bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  "$work/venv/bin/transformers" serve "$work/$name" --host 127.0.0.1 --port "$port" --device cpu > "$work/log" 2>&1 &
  server=$!
  "$work/venv/bin/python" "$work/ask.py" "$work/$name" "$port" || { tail -5 "$work/log"; exit 1; }
  kill "$server"
  wait "$server" || true
  server=
done
