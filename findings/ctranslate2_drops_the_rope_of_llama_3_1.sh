#!/usr/bin/env bash
# ctranslate2 4.8.5's TransformersConverter, on the config.json of a Llama 3.1 (rope_scaling of type llama3,
# rope_theta 500000 beside it, as published). A good guess: it converts both or refuses, as it names llama3
# among the scalings it supports. Seen: it never writes the factor, so nothing is scaled; and under
# transformers 4 it looks for rope_theta inside rope_scaling, does not find it and takes 10000. Exit 0, no
# warning. Prints, under transformers 4.57.6 and 5.14.0, by how much the logits differ from transformers',
# and from transformers' with theta 10000 and without scaling. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/seen.py" <<'PY'
import sys

import ctranslate2
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SHAPE = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
             num_attention_heads=2, max_position_embeddings=131072, initializer_range=0.1)
SCALING = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
               original_max_position_embeddings=8192)
folder = sys.argv[1]
words = [f"w{number}" for number in range(64)]
core = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="w0"))
core.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(
    tokenizer_object=core, unk_token="w0", bos_token="w1", eos_token="w2"
).save_pretrained(folder)
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(**SHAPE, rope_theta=500000.0, rope_scaling=dict(SCALING))).eval()
model.save_pretrained(folder)
ids = torch.randint(3, 64, (1, 400), generator=torch.Generator().manual_seed(1))


def logits(**rope):
    other = LlamaForCausalLM(LlamaConfig(**SHAPE, **rope)).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        return other(ids).logits.numpy()


ctranslate2.converters.TransformersConverter(folder).convert(f"{folder}-ct2")
generator = ctranslate2.Generator(f"{folder}-ct2", compute_type="float32")
found = np.array(generator.forward_batch([[words[one] for one in ids[0].tolist()]]))
with torch.no_grad():
    asked = model(ids).logits.numpy()
apart = {
    "as asked": np.abs(found - asked).max(),
    "theta 500000, not scaled": np.abs(found - logits(rope_theta=500000.0)).max(),
    "theta 10000, not scaled": np.abs(found - logits(rope_theta=10000.0)).max(),
}
print(f"transformers {transformers.__version__}:", {name: float(f"{value:.1e}") for name, value in apart.items()})
four = transformers.__version__.startswith("4.")
equal = "theta 10000, not scaled" if four else "theta 500000, not scaled"
assert [name for name, value in apart.items() if value < 1e-5] == [equal]
PY
for version in 4.57.6 5.14.0; do
  python3 -m venv "$work/$version"
  pip="$work/$version/bin/pip"
  "$pip" install -qq --disable-pip-version-check torch==2.13.0 numpy==2.4.6
  "$pip" install -qq --disable-pip-version-check "transformers==$version" ctranslate2==4.8.5
  "$work/$version/bin/python" "$work/seen.py" "$work/model-$version" 2> "$work/log" || { tail -5 "$work/log"; exit 1; }
done
