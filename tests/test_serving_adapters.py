"""Adapters beside one base in the engine: peft's answers for each, and the base's own bits."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import FAMILIES, make_adapter, make_base, peft_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from alpaca.serving import loading
from alpaca.serving.attention import PrefillChunk
from alpaca.serving.engine import Engine
from alpaca.serving.forward import Batch
from alpaca.serving.request import Job, Request, Sampling
from alpaca.serving.weights import Weights
from alpaca.tokens import Codec

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8},
    "rslora": {"r": 5, "use_rslora": True, "target_modules": ["q_proj", "up_proj"]},
    "dora": {"r": 4, "lora_alpha": 8, "use_dora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 7},
        "alpha_pattern": {"q_proj": 5, "1.mlp.up_proj": 30},
    },
}  # fmt: skip
NAMES = ("base", *SETTINGS)
TUNED = {"ALPACA_SLOTS": "8", "ALPACA_CONTEXT": "300", "ALPACA_DTYPE": "float32"}
PROMPTS = ["Name three colors.", "", "บอกฉัน", "many words " * 30, "def f(x):"]
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module", params=[*FAMILIES, "16 bits"])
def folders(
    request: pytest.FixtureRequest,
    bpe: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """A base and adapters of it; in 16 bits the engine packs its weights differently."""
    root = tmp_path_factory.mktemp("adapters")
    family, kind = request.param, torch.float32
    if family == "16 bits":
        family, kind = "qwen2", torch.bfloat16
    found = {"base": make_base(root / "base", bpe, family, kind)}
    for seed, (name, settings) in enumerate(SETTINGS.items()):
        found[name] = make_adapter(root / name, found["base"], seed=seed, **settings)
    return found


@contextmanager
def serving(folders: dict[str, Path], **environment: str) -> Iterator[tuple[Engine, Codec]]:
    """An engine with all adapters but the base."""
    adapters = {name: folder for name, folder in folders.items() if name != "base"}
    weights = Weights(folders["base"], "a test", adapters)
    engine, codec = loading.load(weights, TUNED | environment)
    yield engine, codec
    engine.stop()


@pytest.fixture(scope="module")
def served(folders: dict[str, Path]) -> Iterator[tuple[Engine, Codec]]:
    with serving(folders) as both:
        yield both


def reference(folders: dict[str, Path], name: str) -> Any:
    """The model as transformers, or peft, loads and computes it."""
    if name == "base":
        return AutoModelForCausalLM.from_pretrained(folders["base"], dtype=torch.float32)
    return peft_model(folders["base"], folders[name], torch.float32)


def submitted(engine: Engine, prompt: list[int], name: str, **settings: Any) -> Job:
    asked = {"max_new_tokens": 12, "sampling": GREEDY, "logprobs": 3, "ignore_ends": True}
    adapter = "" if name == "base" else name
    return engine.submit(Request(tuple(prompt), adapter=adapter, **{**asked, **settings}))


def test_each_adapter_answers_as_peft_does_in_one_batch_with_the_base(
    folders: dict[str, Path], served: tuple[Engine, Codec]
) -> None:
    engine, codec = served
    models = {name: reference(folders, name) for name in NAMES}
    prompts = [codec.prompt(text, given) for text in PROMPTS for given in ("", "x")]
    asked = [(prompt, name) for prompt in prompts for name in NAMES]
    jobs = [submitted(engine, *one) for one in asked]
    answers = set()
    for (prompt, name), job in zip(asked, jobs, strict=True):
        job.completions[0].result.result(60)
        scored = job.completions[0].scored
        ids = [one.token for one in scored]
        with torch.no_grad():
            logits = models[name](torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.double().log_softmax(-1)
        for place, one in enumerate(scored):
            best = logprobs[place].max()
            assert logprobs[place, one.token] > best - 1e-4, (name, place)
            assert abs(one.logprob - logprobs[place, one.token]) < 1e-4, (name, place)
            wanted = logprobs[place].topk(3).values
            assert torch.allclose(torch.tensor([p for _, p in one.top]).double(), wanted, atol=1e-4)
        answers.add((tuple(prompt), tuple(ids)))
    assert len(answers) > 0.7 * len(asked)  # the adapters do change what is answered


def pass_of(owners: list[str], engine: Engine) -> torch.Tensor:
    """Logits of one pass: six decoding rows and two prompt chunks, each of an owner."""
    model = engine.model
    found = [engine.adapters.find(name) for name in owners]
    for slot in range(8):
        ids = [7 + slot + at for at in range(12)]
        adapted = {found[slot]: range(12)} if found[slot] is not None else {}
        model.run(Batch([], [(PrefillChunk(slot, 0, 12), ids)], [0], adapted))
    adapted = {}
    for row, adapter in enumerate(found):
        if adapter is not None:
            rows = [row] if row < 6 else range(6 + 4 * (row - 6), 10 + 4 * (row - 6))
            adapted[adapter] = [*adapted.get(adapter, []), *rows]
    decoding = [(slot, 12, 3) for slot in range(6)]
    chunks = [(PrefillChunk(slot, 12, 16), [5, 6, 7, 8]) for slot in (6, 7)]
    return model.run(Batch(decoding, chunks, [*range(6), 9, 13], adapted)).clone()


def test_the_bases_rows_keep_their_bits_whatever_their_neighbours_ask(
    folders: dict[str, Path], served: tuple[Engine, Codec], bpe: PreTrainedTokenizerBase
) -> None:
    engine, _ = served
    bare, _ = loading.load(Weights(folders["base"], "a test"), TUNED)
    plain = pass_of([""] * 8, bare)
    bare.stop()
    assert torch.equal(pass_of([""] * 8, engine), plain)
    mixed = ["", "plain", "", "dora", "plain", "", "", "rslora"]
    found = pass_of(mixed, engine)
    for row, owner in enumerate(mixed):
        assert torch.equal(found[row], plain[row]) is (owner == ""), row
    assert torch.equal(pass_of([""] * 8, engine), plain)  # nothing of the hooks is left
    assert not any(module._forward_hooks for module in engine.model.model.modules())


def test_n_answers_share_an_adapter(served: tuple[Engine, Codec]) -> None:
    engine, codec = served
    prompt = codec.prompt("Name three colors.")
    one = submitted(engine, prompt, "dora").completions[0].result.result(60)
    many = submitted(engine, prompt, "dora", n=3)
    assert {part.result.result(60).text for part in many.completions} == {one.text}
    plain = submitted(engine, prompt, "base").completions[0].result.result(60)
    assert plain.text != one.text
