"""lm-eval's own loading of a folder, and its greedy generation up to EOS."""

from importlib.metadata import version

import common
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

folder, task = common.task()
model = HFLM(pretrained=folder, dtype="float32", device="cpu", batch_size=1)
chats = [[{"role": "user", "content": prompt}] for prompt in task["prompts"]]
texts = [model.apply_chat_template(chat) for chat in chats]
settings = {"max_gen_toks": task["new"], "do_sample": False, "until": []}
asked = [
    Instance("generate_until", {}, (text, settings), index) for index, text in enumerate(texts)
]
made = model.generate_until(asked, disable_tqdm=True)
common.report(
    version=f"lm-eval {version('lm-eval')}",
    texts=[model.tok_encode(text) for text in task["texts"]],
    templates=common.templates(model.tokenizer, task["prompts"]),
    answer_texts=made,
)
