"""The engine against transformers' own generation, alone and among neighbours."""

import asyncio
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
import torch
from engines import KINDS, answer_of, engine_of, tiny
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import predict
from alpaca.errors import UserError
from alpaca.serving.border import BusyError
from alpaca.serving.engine import Engine
from alpaca.serving.request import Answer, CanceledError, Request, Sampling
from alpaca.serving.stream import token_bytes
from alpaca.tokens import Codec

PROMPTS = [
    "Name three colors.",
    "",
    "บอกฉันเกี่ยวกับรามเกียรติ์",
    "اكتب قصيدة قصيرة عن البحر",
    "👩‍👩‍👧‍👦 🇹🇭 é ﬁ \u200d",
    "def f(x):\n    return {'a': [x ** 2]}",
    "many words " * 400,
]


@pytest.fixture(scope="module", params=[*KINDS, *(f"{kind}, replaying" for kind in KINDS)])
def pair(
    request: pytest.FixtureRequest, bpe: PreTrainedTokenizerBase
) -> Iterator[tuple[PreTrainedModel, Engine, Codec]]:
    """A model for `generate`, and an engine that serves a copy of it."""
    kind = request.param.removesuffix(", replaying")
    model, codec = tiny(kind, bpe), Codec(bpe)
    engine = engine_of(model, codec, replaying=kind != request.param)
    yield model, engine, codec
    engine.stop()


def reference(model: PreTrainedModel, codec: Codec, prompt: list[int], **settings: Any) -> str:
    made = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        pad_token_id=codec.eos,
        **settings,
    )
    ids = made[0, len(prompt) :].tolist()
    table = token_bytes(codec.tokenizer)
    return b"".join(table[index] for index in ids).decode(errors="ignore")


def text_of(engine: Engine, prompt: list[int], **settings: Any) -> str:
    return answer_of(engine, prompt, **settings).text.replace("�", "")


def neighbours(engine: Engine, codec: Codec, count: int, seed: int) -> list[Any]:
    """Random requests that keep other slots changing."""
    choose = random.Random(seed)
    return [
        engine.submit(
            Request(
                tuple(codec.prompt("noise " * choose.randrange(60))),
                max_new_tokens=choose.randrange(1, 60),
                sampling=Sampling(temperature=2, seed=choose.randrange(999)),
            )
        )
        for _ in range(count)
    ]


def test_greedy_equals_generate_alone_and_with_neighbours(
    pair: tuple[PreTrainedModel, Engine, Codec],
) -> None:
    model, engine, codec = pair
    for seed, text in enumerate(PROMPTS):
        prompt = codec.prompt(text)
        wanted = reference(model, codec, prompt, max_new_tokens=40)
        assert text_of(engine, prompt, max_new_tokens=40) == wanted
        others = neighbours(engine, codec, 15, seed)
        assert text_of(engine, prompt, max_new_tokens=40) == wanted
        for other in others:
            other.completions[0].result.result(60)


def test_repetition_penalty_equals_that_of_generate(
    pair: tuple[PreTrainedModel, Engine, Codec],
) -> None:
    model, engine, codec = pair
    for penalty in (1.3, 0.8, 5.0):
        prompt = codec.prompt("Name three colors.")
        wanted = reference(model, codec, prompt, max_new_tokens=40, repetition_penalty=penalty)
        settings = Sampling(temperature=0, repetition_penalty=penalty)
        assert text_of(engine, prompt, sampling=settings, max_new_tokens=40) == wanted


def test_same_seed_same_text_whatever_else_is_served(
    pair: tuple[PreTrainedModel, Engine, Codec],
) -> None:
    _, engine, codec = pair
    prompt = codec.prompt("Tell a story.")
    texts = set()
    for round_, load in enumerate((0, 3, 15, 9, 0)):
        others = neighbours(engine, codec, load, round_)
        settings = Sampling(temperature=0.9, top_p=0.95, top_k=100, seed=11)
        texts.add(text_of(engine, prompt, sampling=settings, max_new_tokens=30))
        for other in others:
            other.completions[0].result.result(60)
    assert len(texts) == 1
    other_seed = Sampling(temperature=0.9, top_p=0.95, top_k=100, seed=12)
    assert text_of(engine, prompt, sampling=other_seed, max_new_tokens=30) not in texts


def test_n_completions_share_a_prompt_and_the_first_is_that_of_n_1(
    served: tuple[Engine, Codec],
) -> None:
    engine, codec = served
    prompt = tuple(codec.prompt("Tell a story."))
    settings = Sampling(temperature=1.0, seed=3)
    [one] = engine.submit(Request(prompt, max_new_tokens=20, sampling=settings)).completions
    five = engine.submit(Request(prompt, n=5, max_new_tokens=20, sampling=settings)).completions
    texts = [completion.result.result(60).text for completion in five]
    assert texts[0] == one.result.result(60).text
    assert len(set(texts)) == 5


def test_an_answer_ends_when_it_has_had_its_time(bpe: PreTrainedTokenizerBase) -> None:
    codec = Codec(bpe)
    engine = engine_of(tiny("llama", bpe), codec, seconds=0)
    answer = answer_of(engine, codec.prompt("Tell a story."), max_new_tokens=30)
    engine.stop()
    assert (answer.reason, answer.tokens) == ("time", 1)
    assert answer.text


def test_every_way_to_end_is_named(served: tuple[Engine, Codec]) -> None:
    engine, codec = served
    prompt = codec.prompt("Tell a story.")
    free = answer_of(engine, prompt, max_new_tokens=30)
    assert (free.reason, free.tokens) == ("length", 30)
    assert answer_of(engine, prompt, total_tokens=len(prompt) + 7).tokens == 7
    assert answer_of(engine, prompt, total_tokens=len(prompt)) == Answer("", 0, "length")
    inside = free.text[5:8]
    stopped = answer_of(engine, prompt, max_new_tokens=30, stop=("", "never there", inside))
    assert stopped == Answer(free.text[: free.text.index(inside)], stopped.tokens, "stop")
    long = codec.prompt("word " * 900)
    assert len(long) < 2048
    assert answer_of(engine, long, total_tokens=9999).reason in ("context", "eos")

    def reasons(seed: int) -> set[str]:
        hot = Sampling(temperature=5, seed=seed)  # nearly any token may come
        job = engine.submit(Request(tuple(prompt), n=5, max_new_tokens=400, sampling=hot))
        return {completion.result.result(60).reason for completion in job.completions}

    assert any("eos" in reasons(seed) for seed in range(4))


def test_what_cannot_be_served_is_refused(served: tuple[Engine, Codec]) -> None:
    engine, _ = served
    with pytest.raises(UserError, match="may have 2048"):
        engine.submit(Request(tuple([5] * 2048)))
    with pytest.raises(UserError, match="5 slots"):
        engine.submit(Request((5,), n=6))
    for impossible in ((), (5, 1024), (-1,)):
        with pytest.raises(UserError, match="tokens from 0 to 1023"):
            engine.submit(Request(impossible))
    for stop in (("a",) * 17, ("a" * 1001,)):
        with pytest.raises(UserError, match="16 texts of up to 1000 characters each"):
            engine.submit(Request((5,), stop=stop))


def test_text_too_long_for_any_tokens_is_not_tokenized(served: tuple[Engine, Codec]) -> None:
    """And whatever has few enough tokens is never taken for such."""
    engine, codec = served
    longest = max(engine.table, key=len).decode()
    fits = longest * (2000 - len(codec.prompt("")))
    prompt = asyncio.run(predict.tokens_of(engine, codec, fits, ""))
    assert prompt == tuple(codec.prompt(fits))
    assert 1500 < len(prompt) < 2048
    unused: Any = None  # a codec that cannot tokenize
    huge = longest * (4 * 2048)
    for prompt, given in ((huge + "a", ""), ("", huge + "a"), ("a", huge)):
        with pytest.raises(UserError, match="cannot fit into 2048 tokens"):
            asyncio.run(predict.tokens_of(engine, unused, prompt, given))


def test_more_requests_than_slots_wait_and_too_many_are_refused(
    served: tuple[Engine, Codec],
) -> None:
    engine, codec = served
    endless = Request(tuple(codec.prompt("a")), n=5, max_new_tokens=1500, total_tokens=2000)
    blocking = engine.submit(endless)
    while engine.idle_slots:
        time.sleep(0.01)
    jobs = [engine.submit(Request(tuple(codec.prompt("b")), max_new_tokens=2)) for _ in range(8)]
    with pytest.raises(BusyError, match="8 requests are already waiting"):
        engine.submit(Request((5,)))
    blocking.cancel()
    for job in jobs:
        assert job.completions[0].result.result(60).tokens <= 2
    with pytest.raises(CanceledError):
        blocking.completions[0].result.result(60)


def test_cancelling_while_waiting_prefilling_and_decoding_frees_everything(
    served: tuple[Engine, Codec],
) -> None:
    engine, codec = served
    choose = random.Random(0)
    for _ in range(30):
        words = choose.choice(["w ", "long prompt " * 150])
        request = Request(tuple(codec.prompt(words)), n=choose.randint(1, 3), max_new_tokens=200)
        jobs = [engine.submit(request) for _ in range(3)]
        time.sleep(choose.random() * 0.02)
        for job in jobs:
            job.cancel()
        for completion in [one for job in jobs for one in job.completions]:
            with suppress(CanceledError):
                assert completion.result.result(60).reason == "eos"
    assert engine.idle_slots == 5
    assert engine.healthy


def test_answers_are_awaited_by_asyncio_too(served: tuple[Engine, Codec]) -> None:
    engine, codec = served

    async def one(seed: int) -> str:
        request = Request(tuple(codec.prompt("a")), max_new_tokens=20, sampling=Sampling(seed=seed))
        [answer] = await engine.submit(request).answers()
        return answer.text

    async def all_of_them() -> list[str]:
        return await asyncio.gather(*map(one, range(8)))

    assert len(set(asyncio.run(all_of_them()))) == 8


def test_streams_equal_results_from_many_threads(served: tuple[Engine, Codec]) -> None:
    engine, codec = served

    def one(seed: int) -> tuple[str, str]:
        request = Request(
            tuple(codec.prompt(f"{seed}")), max_new_tokens=20, sampling=Sampling(seed=seed)
        )
        while True:
            try:
                [completion] = engine.submit(request).completions
                return "".join(completion), completion.result.result(60).text
            except BusyError:
                time.sleep(0.01)

    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(one, range(60)))
    assert all(joined == whole for joined, whole in results)
    assert len({whole for _, whole in results}) > 50
