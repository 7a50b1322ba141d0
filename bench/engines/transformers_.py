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
answers, gaps = [], []
for ids in templates:
    given = torch.tensor([ids])
    out = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=task["new"],
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    answers.append(common.without(out.sequences[0, len(ids) :].tolist(), common.stops(folder)))
    best = torch.stack([logits[0].float().topk(2).values for logits in out.logits])
    gaps.append((best[:, 0] - best[:, 1]).tolist())
common.report(
    version=f"transformers {transformers.__version__}",
    texts=[tokenizer(text).input_ids for text in task["texts"]],
    templates=templates,
    answers=answers,
    gaps=gaps,
    answer_texts=[tokenizer.decode(ids, skip_special_tokens=True) for ids in answers],
)
