"""llama.cpp and vLLM answer with an adapter folder, unmerged, as peft and our merge answer.

Their environments are those of bench/engines.py; without them the tests are skipped. What matters
is that the files are read as they are meant, so answers are greedy and computed in fp32.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

import pytest
import torch
from adapters import make_adapter, peft_model, with_settings
from transformers import AutoModelForCausalLM

from alpaca.cli import main
from alpaca.folder import load_tokenizer
from alpaca.golden import PROMPTS
from alpaca.tokens import Codec

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ROOT / "bench" / "engines"
NEW = 16
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def adapter(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An rsLoRA of SmolLM2 whose answers differ from the base's and stay text."""
    return make_adapter(tmp_path_factory.mktemp("engines") / "lora", smollm, use_rslora=True)


@pytest.fixture(scope="module")
def prompts(smollm: Path) -> list[list[int]]:
    codec = Codec(load_tokenizer(smollm))
    return [codec.prompt(instruction, given) for instruction, given in PROMPTS]


@torch.no_grad()
def greedy(model: torch.nn.Module, prompts: list[list[int]]) -> list[list[int]]:
    """The next tokens by the largest logit, without an end."""
    answers = []
    for prompt in prompts:
        found: list[int] = []
        given, past = prompt, None
        while len(found) < NEW:
            made = model(torch.tensor([given]), past_key_values=past, use_cache=True)
            given, past = [int(made.logits[0, -1].argmax())], made.past_key_values
            found += given
        answers.append(found)
    return answers


@pytest.fixture(scope="module")
def right(smollm: Path, adapter: Path, prompts: list[list[int]]) -> list[list[int]]:
    """peft's answers, which are not the base's."""
    ours = greedy(peft_model(smollm, adapter, torch.float32), prompts)
    base = AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.float32)
    assert all(one != other for one, other in zip(ours, greedy(base, prompts), strict=True))
    return ours


def until_end(tokens: list[int], end: int) -> list[int]:
    return list(takewhile(lambda token: token != end, tokens))


def run_ours(*words: object) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, words)))
    assert ended.value.code == 0


def environment(name: str) -> Path:
    """The Python of an engine's environment."""
    python = ROOT / ".venvs" / name / "bin" / "python"
    if not (python.parent.parent / "installed").exists():
        pytest.skip(f"bench/engines.py has not made .venvs/{name}")
    return python


def test_our_merge_in_fp32_answers_as_peft(
    smollm: Path, adapter: Path, prompts: list[list[int]], right: list[list[int]], tmp_path: Path
) -> None:
    run_ours("merge", adapter, "-o", tmp_path / "out", "--dtype", "fp32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert greedy(merged, prompts) == right


@contextmanager
def llama_server(home: Path, *words: object) -> Iterator[int]:
    """llama.cpp's server; gives its port."""
    sys.path.insert(0, str(PROGRAMS))
    import common

    port = common.free_port()
    command = [home / "llama.cpp/bin/llama-server", "--host", "127.0.0.1", "--port", port, *words]
    command += ["-c", 1024, "-t", 2, "-ctk", "f32", "-ctv", "f32", "-fa", "off"]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(list(map(str, command)), stdout=quiet, stderr=quiet) as process:
        try:
            for _ in range(600):
                try:
                    common.ask(port, "/health")
                    break
                except OSError:
                    assert process.poll() is None, "llama-server ended"
                    time.sleep(0.1)
            yield port
        finally:
            process.terminate()


@pytest.mark.parametrize("rslora", [False, True], ids=["LoRA", "rsLoRA"])
def test_llama_cpp_converts_an_adapter_folder_and_answers_as_peft(
    smollm: Path,
    adapter: Path,
    prompts: list[list[int]],
    right: list[list[int]],
    tmp_path: Path,
    rslora: bool,
) -> None:
    """Its converter ignores use_rslora: the factor between both scales, sqrt(rank), is given."""
    if not rslora:  # the same scale: 8 / sqrt(4) is 16 / 4
        adapter = with_settings(adapter, tmp_path / "plain", use_rslora=False, lora_alpha=16)
    python = environment("llama.cpp")
    home = python.parent.parent
    (converter,) = home.glob("llama_cpp_python-*/vendor/llama.cpp/convert_lora_to_gguf.py")
    run_ours("export", smollm, "--to", "gguf", "--type", "F32", "-o", tmp_path / "base.gguf")
    lora = tmp_path / "lora.gguf"
    words = [python, converter, adapter, "--base", smollm, "--outtype", "f32", "--outfile", lora]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    end = load_tokenizer(smollm).eos_token_id
    given = ["--lora-scaled", f"{lora}:2"] if rslora else ["--lora", lora]
    with llama_server(home, "-m", tmp_path / "base.gguf", *given) as port:
        import common

        for prompt, answer in zip(prompts, right, strict=True):
            body = {"prompt": prompt, "n_predict": NEW, "temperature": 0}
            got = common.ask(
                port, "/completion", {**body, "return_tokens": True, "cache_prompt": False}
            )
            # Told to ignore the end, it would never choose it; peft's answers here go on after it.
            assert until_end(got["tokens"], end) == until_end(answer, end)


VLLM = """
import json, os, sys
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.lora.request import LoRARequest
if __name__ == "__main__":
    base, adapter, prompts, new = sys.argv[1:]
    llm = LLM(model=base, dtype="float32", max_model_len=512, enforce_eager=True, enable_lora=True,
              max_lora_rank=8, max_loras=1)
    greedy = SamplingParams(temperature=0, max_tokens=int(new), ignore_eos=True)
    made = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in json.loads(prompts)], greedy,
                        use_tqdm=False, lora_request=LoRARequest("lora", 1, adapter))
    print(json.dumps([list(one.outputs[0].token_ids) for one in made]))
"""


def test_vllm_loads_an_adapter_folder_and_answers_as_peft(
    smollm: Path, adapter: Path, prompts: list[list[int]], right: list[list[int]], tmp_path: Path
) -> None:
    python = environment("vLLM")
    (tmp_path / "program.py").write_text(VLLM)
    words = [str(python), "program.py", str(smollm), str(adapter), json.dumps(prompts), str(NEW)]
    done = subprocess.run(
        words,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == right
