"""onnxruntime-genai: its model builder's export in fp32, its own tokenizer."""

import subprocess
import sys

import common
import onnxruntime_genai as og
from transformers import AutoTokenizer

folder, task = common.task()
command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", folder, "-o", "model"]
subprocess.run([*command, "-p", "fp32", "-e", "cpu"], check=True, capture_output=True)
model = og.Model("model")
own, theirs = og.Tokenizer(model), AutoTokenizer.from_pretrained(folder)
templates = common.templates(theirs, task["prompts"])
left_out = theirs("").input_ids  # the model's BOS, where its encode() does not add it
if own.encode("").tolist() == left_out:
    left_out = []
answers = []
for ids in templates:
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + task["new"], do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(ids)
    made: list[int] = []
    while not generator.is_done():
        generator.generate_next_token()
        made.append(int(generator.get_next_tokens()[0]))
    answers.append(common.without(made, common.stops(folder)))
common.report(
    version=f"onnxruntime-genai {og.__version__}",
    texts=[left_out + own.encode(text).tolist() for text in task["texts"]],
    note="with the BOS that its encode() leaves out" if left_out else "",
    templates=templates,
    answers=answers,
)
