#!/usr/bin/env bash
# if-verifiable 0.1.2, IFEval's checks. A good guess: an instruction whose name it does not know, or a
# letter count whose letter is not a to z, is an error; "5" does not answer in German. Seen: the
# unknown name is left out, and the answer follows all of the rest; the letter is replaced by one
# drawn by chance; a reply in which no language can be detected is in every language.
# Prints: 1.0 followed of two names, one known; letters drawn for é; German followed by "5". Fails if
# that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check \
  if-verifiable==0.1.2 nltk==3.10.4 langdetect==1.0.9
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
from if_verifiable.common import evaluate_instructions
from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT


def followed(reply, names, arguments):
    results, scores = evaluate_instructions(reply, names, arguments, "", INSTRUCTION_DICT)
    return len(results), scores.binary_strict


names = ["punctuation:no_comma", "punctuation:no_commas"]
checked, score = followed("No signs at all", names, [{}, {}])
print(f"if-verifiable 0.1.2: {len(names)} names, {checked} checked, followed: {score}")
assert (checked, score) == (1, 1.0)

given = {"letter": "é", "let_frequency": 3, "let_relation": "at least"}
drawn = set()
for _ in range(60):
    checker = INSTRUCTION_DICT["keywords:letter_frequency"]("keywords:letter_frequency")
    checker.build_description(**given)
    drawn.add(checker.get_instruction_args()["letter"])
print("letters that stand for é:", *sorted(drawn))
assert len(drawn) > 5 and "é" not in drawn

_, german = followed("5", ["language:response_language"], [{"language": "de"}])
print(f'"5" follows "answer in German": {german}')
assert german == 1.0
PY
