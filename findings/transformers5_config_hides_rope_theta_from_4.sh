#!/usr/bin/env bash
# transformers 5.23.0 writes a LLaMA's rotary base into config.json as rope_parameters.rope_theta only.
# A good guess: transformers 4.57.6, of a year before, refuses the folder or warns of the key it does not
# know. Seen: it loads the folder and takes rope_theta 10000, its default, without a word (a base of
# 500000 was saved), so every position is turned by the wrong angles. With rope_theta written next to
# rope_parameters both versions agree.
# Prints: 500000.0 saved, read by 5.23.0 as 500000.0, by 4.57.6 as 10000.0. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for version in 5.23.0 4.57.6; do
  python3 -m venv "$work/$version"
  "$work/$version/bin/pip" install -qq --disable-pip-version-check "transformers==$version"
done
"$work/5.23.0/bin/python" - "$work/model" <<'PY'
import sys

from transformers import LlamaConfig

rope = {"rope_type": "default", "rope_theta": 500000.0}
LlamaConfig(rope_parameters=rope, architectures=["LlamaForCausalLM"]).save_pretrained(sys.argv[1])
PY
read_theta() {
  "$work/$1/bin/python" - "$work/model" 2> "$work/errors-$1" <<'PY'
import sys

from transformers import AutoConfig

config = AutoConfig.from_pretrained(sys.argv[1])
print(getattr(config, "rope_theta", None) or config.rope_parameters["rope_theta"])
PY
}
new=$(read_theta 5.23.0)
old=$(read_theta 4.57.6)
echo "500000.0 saved, read by 5.23.0 as $new, by 4.57.6 as $old"
if grep -i rope "$work/errors-4.57.6"; then echo "4.57.6 warned"; exit 1; fi
[ "$new" = 500000.0 ] && [ "$old" = 10000.0 ]
