"""What goes wrong in the engine ends what it concerns, and nothing else."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from engines import answer_of, engine_of, tiny
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import predict
from alpaca.serving.cache import Capacity
from alpaca.serving.engine import Engine, EngineStoppedError, Limits
from alpaca.serving.forward import Batch, SlotModel
from alpaca.serving.request import Request, Sampling
from alpaca.serving.stream import token_bytes
from alpaca.tokens import Codec


class Failing(SlotModel):
    """A model whose passes wait for `gate`, and fail with a poisonous token in them."""

    poison = 999

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.allocate(self.probe(), Capacity(8, 512))
        self.gate = threading.Event()
        self.gate.set()

    def run(self, batch: Batch) -> torch.Tensor:
        self.gate.wait()
        if any(self.poison in ids for _, ids in batch.pieces):
            raise RuntimeError("poison")
        return super().run(batch)


@pytest.fixture
def failing(bpe: PreTrainedTokenizerBase) -> Iterator[tuple[Failing, Engine, Request]]:
    """The model, its engine, and a request that does no harm."""
    codec, model = Codec(bpe), Failing(tiny("llama", bpe))
    engine = Engine(model, token_bytes(bpe), frozenset([codec.eos]), Limits(stuck_seconds=0.01))
    engine.start()
    greedy = Sampling(temperature=0)
    yield model, engine, Request(tuple(codec.prompt("fine")), max_new_tokens=60, sampling=greedy)
    model.gate.set()
    engine.stop()


def test_a_failing_request_fails_alone(failing: tuple[Failing, Engine, Request]) -> None:
    """Beside one that decodes, and beside others whose prompts are in the same pass."""
    model, engine, good = failing
    alone = engine.submit(good).completions[0].result.result(60)
    running = engine.submit(good)
    next(iter(running.completions[0]))
    model.gate.clear()
    new = [engine.submit(good) for _ in range(2)]
    bad = engine.submit(Request((5, 6, Failing.poison)))
    new.append(engine.submit(good))
    model.gate.set()
    with pytest.raises(RuntimeError, match="poison"):
        bad.completions[0].result.result(60)
    for job in (running, *new):
        assert job.completions[0].result.result(60) == alone
    assert engine.idle_slots == 8


def test_a_stuck_engine_is_ill_and_a_recovered_one_is_not(
    failing: tuple[Failing, Engine, Request],
) -> None:
    model, engine, good = failing
    runner = predict.Runner()
    runner.engine = engine
    assert runner.healthcheck()
    model.gate.clear()
    job = engine.submit(good)
    while runner.healthcheck():
        time.sleep(0.01)
    model.gate.set()
    job.completions[0].result.result(60)
    while not runner.healthcheck():
        time.sleep(0.01)
    engine.stop()
    assert not runner.healthcheck()


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
