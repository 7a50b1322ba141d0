"""The real demo model, served greedily, against transformers' `generate`, token for token.

Rounding differs with the number of rows in a pass (the last bits of float32), so where two tokens
are all but equally likely either may come. Such a tie counts as equal only if it is `generate`'s
own runner-up, less than TIE below the best; from there on the answer is compared with what
`generate` makes of the same beginning. Ties are counted, and few.
"""

import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from http_server import ROOT
from transformers import PreTrainedModel

from alpaca.folder import load_tokenizer
from alpaca.model import load_model
from alpaca.records import read_records
from alpaca.serving import loading
from alpaca.serving.cache import Capacity
from alpaca.serving.engine import Engine
from alpaca.serving.forward import SlotModel
from alpaca.serving.request import Job, Request, Sampling
from alpaca.tokens import Codec

pytestmark = pytest.mark.slow

TIE = 1e-4  # logits are about 20 here; float32 sums of a pass differ by some 1e-5
NEW_TOKENS = 16
SLOTS = 16

SCRIPTS = [
    "",
    " ",
    "บอกฉันเกี่ยวกับรามเกียรติ์",
    "แนะนำอาหารไทยสามอย่างสำหรับมื้อเย็น",
    "ทำไมท้องฟ้าจึงเป็นสีฟ้า?",
    "เขียนบทกวีสั้น ๆ เกี่ยวกับทะเล",
    "แปลเป็นภาษาอังกฤษ: ขอบคุณมาก",
    "اكتب قصيدة قصيرة عن البحر",
    "ما هي عاصمة مصر؟",
    "لماذا السماء زرقاء؟",
    "ترجم إلى الإنجليزية: شكرا جزيلا",
    "اذكر ثلاث نصائح لنوم أفضل",
    "👩‍👩‍👧‍👦 🇹🇭 é ﬁ \u200d",
    "🎉🎉🎉",
    "What does 🙃 mean, and when would you use 🫠 instead?",
    "Answer in emoji only: how was your day? ☀️🌧️",
    "def f(x):\n    return {'a': [x ** 2]}",
    "for (int i = 0; i < n; ++i) { sum += a[i]; }  // what is wrong?",
    'Fix this JSON: {"a": 1, "b": [1, 2,, 3], }',
    "SELECT name FROM users WHERE age > 30 GROUP BY -- finish this",
    "#!/bin/sh\nset -eu\nrm -rf \"$1\"/*\n\nExplain.",
    "<div class=\"a\"><p>Hello</div>",
    "  leading spaces, a\ttab, and trailing newlines\n\n\n",
    "中文和日本語を混ぜた質問です。请回答。",
    "Ответь одним словом: столица Франции?",
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A prompt with a penalty, and what `generate` answers."""

    prompt: tuple[int, ...]
    penalty: float
    wanted: list[int]
    runners_up: list[tuple[int, float]]


@dataclass
class Served:
    """The model for `generate`, and an engine that serves a copy of it and answers token ids."""

    model: PreTrainedModel
    engine: Engine
    codec: Codec

    def submit(self, prompt: tuple[int, ...], tokens: int, sampling: Sampling) -> Job:
        return self.engine.submit(Request(prompt, max_new_tokens=tokens, sampling=sampling))

    def made(self, job: Job) -> list[int]:
        answer = job.completions[0].result.result(600)
        ids = [int(word) for word in answer.text.split()]
        return [*ids, self.codec.eos] if answer.reason == "eos" else ids


@pytest.fixture(scope="module")
def served(smollm: Path) -> Iterator[Served]:
    model, codec = load_model(smollm, torch.float32), Codec(load_tokenizer(smollm))
    slots = SlotModel(copy.deepcopy(model))
    slots.allocate(slots.probe(), Capacity(SLOTS, 2048))
    # Each token's text is its number, so that answers can be compared as numbers.
    table = [b"%d " % token for token in range(slots.vocabulary)]
    engine = Engine(slots, table, frozenset([codec.eos]))
    engine.start(loading.shared_prefixes(codec))
    yield Served(model, engine, codec)
    engine.stop()


@pytest.fixture(scope="module", params=[1.0, 1.3], ids=["plain", "repetition penalty"])
def cases(request: pytest.FixtureRequest, served: Served) -> list[Case]:
    tasks = [(text, "") for text in SCRIPTS]
    long = "many different words, " * 374
    tasks.append((long, ""))
    seeds = read_records(ROOT / "data" / "seed_tasks.jsonl")
    tasks += [(one.instruction, one.input) for one in seeds[:: len(seeds) // 24][:24]]
    prompts = [tuple(served.codec.prompt(*task)) for task in tasks]
    assert len(set(prompts)) == 50
    assert max(map(len, prompts)) >= 1500
    return [
        Case(one, request.param, *greedy(served, one, request.param, NEW_TOKENS)) for one in prompts
    ]


def greedy(
    served: Served, prompt: tuple[int, ...], penalty: float, tokens: int
) -> tuple[list[int], list[tuple[int, float]]]:
    """`generate`'s tokens; for each the runner-up, and by how much its logit is less."""
    ids = torch.tensor([prompt])
    made = served.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        repetition_penalty=penalty,
        max_new_tokens=tokens,
        eos_token_id=served.codec.eos,
        pad_token_id=served.codec.eos,
        output_scores=True,
        return_dict_in_generate=True,
    )
    runners_up = []
    for scores in made.scores:
        (best, second), (_, token) = (part[0].tolist() for part in scores.topk(2))
        runners_up.append((token, best - second))
    return made.sequences[0, len(prompt) :].tolist(), runners_up


def ties(served: Served, case: Case, made: list[int]) -> int:
    """How often `made` took the other token of a tie; fails where it differs otherwise."""
    count, at = 0, 0
    wanted, runners_up = case.wanted, case.runners_up
    while made[at:] != wanted:
        pairs = zip(made[at:], wanted, strict=False)
        same = next(i for i, (mine, theirs) in enumerate(pairs) if mine != theirs)
        token, gap = runners_up[same]
        assert made[at + same] == token, (case.prompt, made, at, wanted)
        assert gap < TIE, (case.prompt, made, at, wanted, gap)
        count, at = count + 1, at + same + 1
        left = 0 if token == served.codec.eos else NEW_TOKENS - at
        wanted, runners_up = [], []
        if left:
            wanted, runners_up = greedy(served, (*case.prompt, *made[:at]), case.penalty, left)
    return count


def test_greedy_equals_generate_alone(served: Served, cases: list[Case]) -> None:
    found = 0
    for case in cases:
        settings = Sampling(temperature=0, repetition_penalty=case.penalty)
        found += ties(served, case, served.made(served.submit(case.prompt, NEW_TOKENS, settings)))
    assert found <= len(cases) // 10


def test_greedy_equals_generate_among_fifteen_neighbours(served: Served, cases: list[Case]) -> None:
    """All prompts at once in random order, with noise of random length between them."""
    choose = random.Random(5)

    def noise(tokens: int) -> None:
        prompt = tuple(choose.choices(cases[-1].prompt, k=choose.randrange(1, 60)))
        served.submit(prompt, tokens, Sampling(temperature=2, seed=choose.randrange(999)))

    jobs = {}
    for case in choose.sample(cases, len(cases)):
        settings = Sampling(temperature=0, repetition_penalty=case.penalty)
        jobs[case.prompt] = served.submit(case.prompt, NEW_TOKENS, settings)
        noise(choose.randrange(1, 20))
    for _ in range(SLOTS):  # so that the last have neighbours too
        noise(2 * NEW_TOKENS)
    found = sum(ties(served, case, served.made(jobs[case.prompt])) for case in cases)
    assert found <= len(cases) // 10
