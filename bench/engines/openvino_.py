"""OpenVINO GenAI: optimum's export in fp32, OpenVINO's own tokenizer."""

import subprocess
import sys
from pathlib import Path

import common
import numpy as np
import openvino
import openvino_genai
from transformers import AutoTokenizer

folder, task = common.task()
program = Path(sys.executable).parent / "optimum-cli"
command = [program, "export", "openvino", "--model", folder, "--task", "text-generation-with-past"]
subprocess.run([*command, "--weight-format", "fp32", "model"], check=True, capture_output=True)
exact = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
}  # its cache is u8 otherwise
pipe = openvino_genai.LLMPipeline("model", "CPU", **exact)
own = pipe.get_tokenizer()
templates = common.templates(AutoTokenizer.from_pretrained(folder), task["prompts"])
config = openvino_genai.GenerationConfig()
config.max_new_tokens, config.do_sample = task["new"], False
config.stop_token_ids = set(common.stops(folder))
answers = []
for ids in templates:
    given = openvino.Tensor(np.array([ids], dtype=np.int64))
    mask = openvino.Tensor(np.ones((1, len(ids)), dtype=np.int64))
    out = pipe.generate(openvino_genai.TokenizedInputs(given, mask), config)
    answers.append(common.without(list(out.tokens[0]), common.stops(folder)))
common.report(
    version=f"OpenVINO GenAI {openvino_genai.__version__}",
    texts=[own.encode(text).input_ids.data[0].tolist() for text in task["texts"]],
    templates=templates,
    answers=answers,
)
