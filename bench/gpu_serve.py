"""Decoding speed on one GPU, compared with what its memory bandwidth allows, and with vLLM.

    PYTHONPATH=. python bench/gpu_serve.py [--vllm .venvs/vllm/bin/python]

A model of LLaMA 7B's shape with random bf16 weights decodes under CUDA graphs at batch 1, 8, 32
and 64. A step cannot take less time than reading every weight and every key and value once; that
bound uses the bandwidth measured here, by copying. The timing covers the model's pass and the
sampler, from a step's numbers in Python to its tokens in Python, but not the engine's scheduling or
text. Needs a GPU with 40 GB (computed: weights 13.5, keys and values of 64 slots 15.5, copying
4.3) and a minute, but no network. `--vllm` names a Python that has vLLM, which decodes the same
shape afterwards, with its scheduler and sampler: what 100 tokens more take. The last line is JSON.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from alpaca.serving.attention import PrefillChunk
from alpaca.serving.cache import Capacity
from alpaca.serving.forward import Batch
from alpaca.serving.graphs import GraphModel
from alpaca.serving.request import Sampling
from alpaca.serving.sampling import Draws, choose

PROMPT = 128
STEPS = 100
# Prints the seconds of a step for each number of sequences. Its weights are dummies, as ours.
VLLM = """
import json, sys, time
from vllm import LLM, SamplingParams
folder, prompt, steps, batches = json.loads(sys.argv[1])
if __name__ == "__main__":
    llm = LLM(folder, load_format="dummy", skip_tokenizer_init=True, max_num_seqs=max(batches),
              max_model_len=2 * (prompt + steps), enable_prefix_caching=False)
    found = {}
    def seconds(batch, tokens):
        asked = SamplingParams(temperature=0.75, max_tokens=tokens, ignore_eos=True)
        prompts = [{"prompt_token_ids": [1 + row, *range(1, prompt)]} for row in range(batch)]
        began = time.perf_counter()
        answers = llm.generate(prompts, asked, use_tqdm=False)
        assert all(len(answer.outputs[0].token_ids) == tokens for answer in answers)
        return time.perf_counter() - began
    for batch in batches:
        seconds(batch, 5)
        few = min(seconds(batch, 5) for _ in range(3))
        found[batch] = (seconds(batch, steps + 5) - few) / steps
    print("FOUND", json.dumps(found), flush=True)
"""


def main() -> None:
    """Build, decode at each batch size, print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--layers", type=int, default=32, help="fewer for a quick look")
    parser.add_argument("--vllm", type=Path, help="a Python that has vLLM")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu_serve: there is no GPU here")
    model, weight_bytes, token_bytes = build(arguments.layers, max(arguments.batches))
    bandwidth = measure_bandwidth()
    results = {}
    for batch in arguments.batches:
        seconds = step_seconds(model, batch)
        read = weight_bytes + batch * (PROMPT + STEPS / 2) * token_bytes
        results[str(batch)] = {
            "tokens_per_second": round(batch / seconds, 1),
            "bound_tokens_per_second": round(batch * bandwidth / read, 1),
            "of_bound": round(read / bandwidth / seconds, 3),
        }
        print(f"batch {batch:>3}: {1000 * seconds:.2f} ms a step", results[str(batch)], flush=True)
    if arguments.vllm:
        del model
        torch.cuda.empty_cache()
        for name, seconds in vllm_seconds(arguments).items():
            found = results[name]
            found["vllm_tokens_per_second"] = round(int(name) / seconds, 1)
            found["vs_vllm"] = round(found["tokens_per_second"] * seconds / int(name), 3)
            print(f"batch {name:>3}: vLLM {1000 * seconds:.2f} ms a step", flush=True)
    facts = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "bandwidth_gb_s": round(bandwidth / 1e9),
    }
    print(json.dumps({**facts, "batches": results}))


def build(layers: int, slots: int) -> tuple[GraphModel, int, int]:
    """The model with room for `slots`; bytes of the weights a step reads, and of a token's keys."""
    with torch.device("cuda"):
        loaded = AutoModelForCausalLM.from_config(shape(layers), dtype=torch.bfloat16)
    embedding = loaded.get_input_embeddings().weight
    weights = sum(p.numel() * p.element_size() for p in loaded.parameters())
    weights -= embedding.numel() * embedding.element_size()  # a step reads only rows of it
    model = GraphModel(loaded)
    shapes = model.probe()
    model.allocate(shapes, Capacity(slots, 2 * (PROMPT + STEPS)))
    return model, weights, sum(shape.token_bytes for shape in shapes)


def shape(layers: int) -> LlamaConfig:
    """LLaMA 7B's, with so many layers."""
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=2048,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def vllm_seconds(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of vLLM's decode steps, by the number of sequences."""
    with tempfile.TemporaryDirectory() as folder:
        shape(arguments.layers).save_pretrained(folder)
        program = Path(folder, "program.py")
        program.write_text(VLLM)
        asked = json.dumps([folder, PROMPT, STEPS, arguments.batches])
        command = [arguments.vllm, program, asked]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit("gpu_serve: vLLM failed, as told above")
    found: dict[str, float] = json.loads(done.stdout.partition("FOUND ")[2].splitlines()[0])
    return found


def measure_bandwidth() -> float:
    """Bytes per second that the GPU reads and writes while it copies 2 GiB."""
    source = torch.zeros(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(10):
        torch.cuda.synchronize()
        began = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * source.numel() / best


def step_seconds(model: GraphModel, batch: int) -> float:
    """Mean time of a decode step with sampling, after a prompt in each slot and a few steps."""
    for slot in range(batch):
        model.run(Batch([], [(PrefillChunk(slot, 0, PROMPT), range(PROMPT))], [PROMPT - 1]))
    settings = [Sampling(temperature=0.75)] * batch
    tokens = [1] * batch
    began = 0.0
    for step in range(-5, STEPS):
        if step == 0:
            torch.cuda.synchronize()
            began = time.perf_counter()
        position = PROMPT + max(step, 0)
        decoding = [(slot, position, token) for slot, token in enumerate(tokens)]
        draws = Draws(settings, [0.5] * batch, model.vocabulary, model.device)
        logits = model.run(Batch(decoding, [], list(range(batch))))
        tokens = choose(logits, draws).tolist()
    return (time.perf_counter() - began) / STEPS


if __name__ == "__main__":
    main()
