"""mlx-lm on a CPU, with the weights in fp32."""

from importlib.metadata import version

import common
import mlx.core as mx
from mlx_lm import load
from mlx_lm.generate import generate_step

folder, task = common.task()
mx.set_default_device(mx.cpu)
model, tokenizer = load(folder)
model.set_dtype(mx.float32)
templates = common.templates(tokenizer._tokenizer, task["prompts"])
ends = set(tokenizer.eos_token_ids)
answers = []
for ids in templates:
    made: list[int] = []
    for token, _ in generate_step(mx.array(ids), model, max_tokens=task["new"]):
        if int(token) in ends:
            break
        made.append(int(token))
    answers.append(made)
common.report(
    version=f"mlx-lm {version('mlx-lm')}",
    texts=[tokenizer.encode(text) for text in task["texts"]],
    templates=templates,
    answers=answers,
)
