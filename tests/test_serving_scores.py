"""Log probabilities and the penalties of OpenAI's API, against transformers' own logits."""

from collections.abc import Iterator

import pytest
import torch
from engines import engine_of, tiny
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alpaca.serving.engine import Engine
from alpaca.serving.request import Job, Request, Sampling
from alpaca.tokens import Codec

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def pair(bpe: PreTrainedTokenizerBase) -> Iterator[tuple[PreTrainedModel, Engine, Codec]]:
    model, codec = tiny("llama", bpe), Codec(bpe)
    engine = engine_of(model, codec, slots=4)
    yield model, engine, codec
    engine.stop()


def finished(engine: Engine, *requests: Request) -> list[Job]:
    jobs = [engine.submit(request) for request in requests]
    for job in jobs:
        for completion in job.completions:
            completion.result.result(60)
    return jobs


def logprobs(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float().log_softmax(-1)


@pytest.mark.parametrize("text", ["Name three colors.", "many words " * 200])
def test_prompt_and_answer_have_the_log_probabilities_of_transformers(
    pair: tuple[PreTrainedModel, Engine, Codec], text: str
) -> None:
    """A long prompt is computed in pieces; a shared prefix is not taken from memory."""
    model, engine, codec = pair
    prompt = tuple(codec.prompt(text))
    scored = Request(prompt, n=2, max_new_tokens=12, sampling=GREEDY, logprobs=3,
                     prompt_logprobs=True, ignore_ends=True)  # fmt: skip
    plain = Request(prompt, max_new_tokens=12, sampling=GREEDY, ignore_ends=True)
    job, other = finished(engine, scored, plain)
    assert other.prompt_scored == []
    assert other.completions[0].scored == []
    texts = {one.result.result().text for one in [*job.completions, *other.completions]}
    assert len(texts) == 1
    answer = [one.token for one in job.completions[0].scored]
    assert len(answer) == 12
    assert [one.token for one in job.prompt_scored] == list(prompt[1:])
    ids = [*prompt, *answer]
    expected = logprobs(model, ids)
    for at, one in enumerate([*job.prompt_scored, *job.completions[1].scored]):
        row = expected[at]
        assert one.token == ids[at + 1]
        assert one.logprob == pytest.approx(float(row[one.token]), abs=2e-4)
        best = row.topk(3)
        assert [value for _, value in one.top] == pytest.approx(best.values.tolist(), abs=2e-4)
        assert len(one.top) == 3
    # a greedy token is exactly the likeliest: what lm-eval compares
    assert all(one.logprob == one.top[0][1] for one in job.completions[0].scored)


def test_frequency_and_presence_penalties_lower_what_the_answer_holds(
    pair: tuple[PreTrainedModel, Engine, Codec],
) -> None:
    model, engine, codec = pair
    prompt = codec.prompt("Name three colors.")
    frequency, presence = 1.5, 0.7
    sampling = Sampling(temperature=0, frequency_penalty=frequency, presence_penalty=presence)
    [job] = finished(
        engine,
        Request(tuple(prompt), max_new_tokens=40, sampling=sampling, logprobs=0, ignore_ends=True),
    )
    made: list[int] = []
    for _ in range(40):
        row = logprobs(model, [*prompt, *made])[-1].clone()
        for token in set(made):
            row[token] -= frequency * made.count(token) + presence
        made.append(int(row.argmax()))
    assert [one.token for one in job.completions[0].scored] == made
    [plain] = finished(
        engine,
        Request(tuple(prompt), max_new_tokens=40, sampling=GREEDY, logprobs=0, ignore_ends=True),
    )
    assert [one.token for one in plain.completions[0].scored] != made


def test_what_is_counted(pair: tuple[PreTrainedModel, Engine, Codec]) -> None:
    _, engine, codec = pair
    measures = engine.measures
    before = measures.requests, measures.generated_tokens, sum(measures.first_token.counts)
    between = sum(measures.between_tokens.counts)
    prompt = tuple(codec.prompt("Name three colors."))
    finished(engine, Request(prompt, n=3, max_new_tokens=5, sampling=GREEDY, ignore_ends=True))
    assert measures.requests == before[0] + 1
    assert measures.generated_tokens == before[1] + 15
    assert sum(measures.first_token.counts) == before[2] + 3
    assert sum(measures.between_tokens.counts) == between + 12
