"""ctranslate2: its converter's model in fp32, with the folder's own tokenizer."""

import common
import ctranslate2
from transformers import AutoTokenizer

folder, task = common.task()
tokenizer = AutoTokenizer.from_pretrained(folder)
ctranslate2.converters.TransformersConverter(folder).convert("model")
generator = ctranslate2.Generator("model", compute_type="float32", intra_threads=2)
templates = common.templates(tokenizer, task["prompts"])
answers = []
for ids in templates:
    (found,) = generator.generate_batch(
        [tokenizer.convert_ids_to_tokens(ids)],
        max_length=task["new"],
        sampling_topk=1,
        include_prompt_in_result=False,
    )
    answers.append(common.without(found.sequences_ids[0], common.stops(folder)))
common.report(
    version=f"ctranslate2 {ctranslate2.__version__}", templates=templates, answers=answers
)
