#!/usr/bin/env bash
# A tokenizer folder of class PreTrainedTokenizerFast, written by transformers 4.57.6, loaded by 5.23.0 and
# saved again unchanged. A good guess: tokenizer_config.json still names that class, so both versions load
# the copy. Seen: 5.23.0 writes "tokenizer_class": "TokenizersBackend", its new name of the class, and
# AutoTokenizer of 4.57.6 refuses the copy, although PreTrainedTokenizerFast of 4.57.6 can still read it.
# Prints: each folder's class and what each version reads; the refusal is last. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for version in 5.23.0 4.57.6; do
  python3 -m venv "$work/$version"
  "$work/$version/bin/pip" install -qq --disable-pip-version-check "transformers==$version"
done
export TRANSFORMERS_VERBOSITY=error
cd "$work"
4.57.6/bin/python - 2> errors <<'PY' || { cat errors; exit 1; }
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

bpe = models.BPE(vocab={"<s>": 0, "a": 1, "b": 2, "ab": 3}, merges=[("a", "b")])
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(bpe), bos_token="<s>")
tokenizer.save_pretrained("original")
PY
5.23.0/bin/python - 2> errors <<'PY' || { cat errors; exit 1; }
from transformers import AutoTokenizer

AutoTokenizer.from_pretrained("original").save_pretrained("copy")
PY
cat > load.py <<'PY'
import json
import sys
from pathlib import Path

import transformers

loader, folder = sys.argv[1:]
named = json.loads(Path(folder, "tokenizer_config.json").read_text())["tokenizer_class"]
try:
    seen = getattr(transformers, loader).from_pretrained(folder)("ab").input_ids
except ValueError as error:
    seen = error
print(f"{folder} ({named}), {loader} of {transformers.__version__}: {seen}")
PY
{
  5.23.0/bin/python load.py AutoTokenizer original
  4.57.6/bin/python load.py AutoTokenizer original
  5.23.0/bin/python load.py AutoTokenizer copy
  4.57.6/bin/python load.py PreTrainedTokenizerFast copy
  4.57.6/bin/python load.py AutoTokenizer copy
} 2> errors | tee seen || { cat errors; exit 1; }
diff seen - <<'TEXT'
original (PreTrainedTokenizerFast), AutoTokenizer of 5.23.0: [3]
original (PreTrainedTokenizerFast), AutoTokenizer of 4.57.6: [3]
copy (TokenizersBackend), AutoTokenizer of 5.23.0: [3]
copy (TokenizersBackend), PreTrainedTokenizerFast of 4.57.6: [3]
copy (TokenizersBackend), AutoTokenizer of 4.57.6: Tokenizer class TokenizersBackend does not exist or is not currently imported.
TEXT
