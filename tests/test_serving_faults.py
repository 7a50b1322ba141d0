"""What goes wrong in the engine ends what it concerns, and nothing else."""

from collections.abc import Iterator

import pytest
import torch
from engines import answer_of, engine_of, tiny
from transformers import PreTrainedTokenizerBase

from alpaca.serving.cache import Capacity
from alpaca.serving.engine import Engine, EngineStoppedError
from alpaca.serving.forward import Batch, SlotModel
from alpaca.serving.request import Request, Sampling
from alpaca.serving.stream import token_bytes
from alpaca.tokens import Codec


@pytest.fixture(scope="module")
def served(bpe: PreTrainedTokenizerBase) -> Iterator[tuple[Engine, Codec]]:
    codec = Codec(bpe)
    engine = engine_of(tiny("llama", bpe), codec, slots=5, waiting=8)
    yield engine, codec
    engine.stop()


class Failing(SlotModel):
    """A model whose pass fails while a poisonous token is in it."""

    poison = 999

    def run(self, batch: Batch) -> torch.Tensor:
        if any(self.poison in ids for _, ids in batch.pieces):
            raise RuntimeError("poison")
        return super().run(batch)


def test_a_failing_request_fails_alone(bpe: PreTrainedTokenizerBase) -> None:
    codec = Codec(bpe)
    model = Failing(tiny("llama", bpe))
    model.allocate(model.probe(), Capacity(8, 512))
    engine = Engine(model, token_bytes(bpe), frozenset([codec.eos]))
    engine.start()
    good = Request(tuple(codec.prompt("fine")), max_new_tokens=60, sampling=Sampling(temperature=0))
    alone = engine.submit(good).completions[0].result.result(60)
    running = engine.submit(good)
    next(iter(running.completions[0]))
    bad = engine.submit(Request((5, 6, Failing.poison)))
    with pytest.raises(RuntimeError, match="poison"):
        bad.completions[0].result.result(60)
    assert running.completions[0].result.result(60) == alone
    assert engine.idle_slots == 8
    assert engine.healthy
    engine.stop()


def test_a_stopped_engine_tells_everyone(bpe: PreTrainedTokenizerBase) -> None:
    codec = Codec(bpe)
    engine = engine_of(tiny("llama", bpe), codec, slots=1)
    request = Request(
        tuple(codec.prompt("a")), max_new_tokens=1500, sampling=Sampling(temperature=0)
    )
    jobs = [engine.submit(request) for _ in range(3)]
    engine.stop()
    for job in jobs:
        with pytest.raises(EngineStoppedError):
            job.completions[0].result.result(60)
    assert not engine.healthy
    with pytest.raises(EngineStoppedError):
        engine.submit(request)


def test_a_request_that_cannot_begin_fails_alone(served: tuple[Engine, Codec]) -> None:
    engine, _ = served
    impossible = engine.submit(Request((5,), max_new_tokens=2, sampling=Sampling(seed=-1)))
    with pytest.raises(ValueError, match="non-negative"):
        impossible.completions[0].result.result(60)
    assert answer_of(engine, [5], max_new_tokens=2).tokens <= 2
    assert engine.idle_slots == 5
