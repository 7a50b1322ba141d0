"""transformers, of whatever environment runs this."""

import common
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, task = common.task()
torch.set_num_threads(2)
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
templates = common.templates(tokenizer, task["prompts"])
answers = []
for ids in templates:
    given = torch.tensor([ids])
    out = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=task["new"],
        do_sample=False,
    )
    answers.append(common.without(out[0, len(ids) :].tolist(), common.stops(folder)))
common.report(
    version=f"transformers {transformers.__version__}",
    texts=[tokenizer(text).input_ids for text in task["texts"]],
    templates=templates,
    answers=answers,
    answer_texts=[tokenizer.decode(ids, skip_special_tokens=True) for ids in answers],
)
