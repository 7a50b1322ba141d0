"""`python -m alpaca generate` against a real server: `transformers serve` with a real tiny model.

The model is trained here for seconds to answer any request with the same few tasks, so what comes
out is known, while tokens, template, sampling, HTTP and usage figures are all the server's own.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from scripted_teacher import entries
from tiny import set_eos
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from alpaca.cli import main
from alpaca.dataset.pool import Pool
from alpaca.dataset.recipe import request
from alpaca.dataset.reply import Task, block
from alpaca.prompt import chat_template
from alpaca.records import read_records
from alpaca.tokens import Codec

ROOT = Path(__file__).resolve().parent.parent
SEEDS = ROOT / "data" / "seed_tasks.jsonl"
TASKS = [Task("Name a fruit that is red.", "", "Cherry"), Task("Spell it backwards.", "war", "raw")]
REPLY = "\n".join(block(number, task) for number, task in enumerate(TASKS, start=4))


def teach(model: LlamaForCausalLM, codec: Codec) -> None:
    """Train the model to reply with TASKS to what this seed file makes of the first requests."""
    seeds = [Task(item.instruction, item.input, item.output) for item in read_records(SEEDS)]
    pool = Pool(seeds, seed=0)
    prompts = [codec.prompt(request(pool.examples(number), 2)) for number in range(3)]
    answer = [*codec.answers([REPLY])[0], codec.eos]
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    losses = [9.0] * len(prompts)
    for step in range(300):
        prompt = prompts[step % len(prompts)]
        ids = torch.tensor([prompt + answer])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses[step % len(prompts)] = loss.item()
        if max(losses) < 0.05:
            return
    raise AssertionError(losses)


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, bpe: PreTrainedTokenizerBase
) -> Iterator[tuple[str, Path]]:
    """URL and folder of the taught model behind `transformers serve`."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("served") / "teacher"
    config = LlamaConfig(
        vocab_size=len(bpe),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )
    set_eos(config, bpe)
    model = LlamaForCausalLM(config)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices this small gain nothing from more
    teach(model, Codec(bpe))
    torch.set_num_threads(threads)
    model.save_pretrained(folder)
    bpe.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(chat_template(adds_bos=False))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = folder.parent / "serve.log"
    with open(log, "w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    try:
        wait_for(port, process, log)
        yield f"http://127.0.0.1:{port}/v1", folder
    finally:
        process.terminate()
        process.wait(30)


def wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(log.read_text())


@pytest.mark.slow
def test_a_few_requests_to_a_real_server(served: tuple[str, Path], tmp_path: Path) -> None:
    url, folder = served
    output = tmp_path / "data.json"
    flags = [
        "generate",
        "--teacher",
        url,
        "--model",
        str(folder),
        "--num_instructions",
        "2",
        "--per_request",
        "2",
        "--max_tokens",
        "120",
        "--temperature",
        "0.05",
        "--concurrency",
        "2",
        "--seed_tasks",
        str(SEEDS),
        "--output",
        str(output),
    ]
    with pytest.raises(SystemExit) as ended:
        main(flags)
    assert not ended.value.code
    assert [Task(**record) for record in json.loads(output.read_text())] == TASKS
    replies = entries(output, "reply")
    assert replies
    assert not any(reply["estimated"] for reply in replies)  # the server's own count
