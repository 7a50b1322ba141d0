"""What goes wrong in the engine ends what it concerns, and nothing else."""

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engines import answer_of, engine_of, tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import predict
from alpaca.serving.border import EngineStoppedError, Limits
from alpaca.serving.cache import Capacity, SlotCache
from alpaca.serving.engine import Engine
from alpaca.serving.forward import Batch, SlotModel
from alpaca.serving.generation import Generation
from alpaca.serving.request import Answer, Job, Request, Sampling
from alpaca.serving.stream import token_bytes
from alpaca.tokens import Codec


class Failing(SlotModel):
    """A model whose passes wait for `gate`, and fail with a poisonous token in them.

    A `deadly` token ends the thread, one that is `nothing` makes keys and logits NaN.
    """

    poison, deadly, nothing = 999, 998, 997

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        model.get_input_embeddings().weight.data[self.nothing] = torch.nan
        self.allocate(self.probe(), Capacity(8, 512))
        self.gate = threading.Event()
        self.gate.set()
        self.left = -1  # passes until the gate closes by itself; below 0: it stays open

    def run(self, batch: Batch) -> torch.Tensor:
        self.gate.wait()
        self.left -= 1
        if self.left == 0:
            self.gate.clear()
        if any(self.poison in ids for _, ids in batch.chunks):
            raise RuntimeError("poison")
        if any(self.poison == token for _, _, token in batch.decoding):
            raise RuntimeError("poison")
        if any(self.deadly in ids for _, ids in batch.chunks):
            raise SystemExit
        return super().run(batch)


@pytest.fixture
def failing(bpe: PreTrainedTokenizerBase) -> Iterator[tuple[Failing, Engine, Request]]:
    """The model, its engine, and a request that does no harm."""
    codec, model = Codec(bpe), Failing(tiny("llama", bpe))
    engine = Engine(model, token_bytes(bpe), frozenset([codec.eos]), Limits(stuck_seconds=0.01))
    engine.start()
    drawn = Sampling(temperature=0.7, seed=4)
    yield model, engine, Request(tuple(codec.prompt("fine")), max_new_tokens=60, sampling=drawn)
    model.gate.set()
    engine.stop()


def test_a_failing_request_fails_alone(failing: tuple[Failing, Engine, Request]) -> None:
    """Beside one that decodes, and beside others whose prompts are in the same pass.

    A pass that is repeated without the failing one draws the same tokens.
    """
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


def test_an_engine_whose_passes_all_fail_is_ill_until_one_does_not(
    failing: tuple[Failing, Engine, Request],
) -> None:
    _, engine, good = failing
    bad = Request((5, Failing.poison))
    for failures in range(1, engine.limits.failures + 1):
        with pytest.raises(RuntimeError, match="poison"):
            engine.submit(bad).completions[0].result.result(60)
        assert engine.healthy is (failures < engine.limits.failures)
    engine.submit(good).completions[0].result.result(60)
    while not engine.healthy:  # a test must not be quicker than the step's last line
        time.sleep(0.01)


def test_logits_that_are_not_numbers_fail_one_request_and_leave_a_clean_slot(
    failing: tuple[Failing, Engine, Request],
) -> None:
    model, engine, good = failing
    short, long = (
        Request(tuple(range(5, 5 + length)), max_new_tokens=5, sampling=good.sampling)
        for length in (100, 200)
    )
    alone = [engine.submit(one).completions[0].result.result(60) for one in (short, long)]
    broken = engine.submit(Request((Failing.nothing, *range(300)), n=8))
    for completion in broken.completions:
        with pytest.raises(ArithmeticError, match="not numbers"):
            completion.result.result(60)
    # Together, so that the short one's slot is read to the long one's length.
    model.gate.clear()
    jobs = [engine.submit(one) for one in (short, long)]
    model.gate.set()
    assert [job.completions[0].result.result(60) for job in jobs] == alone
    assert engine.idle_slots == 8


def test_a_request_that_cannot_be_marked_fails_alone(
    failing: tuple[Failing, Engine, Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its first pass, as where there is no memory for its counts."""
    model, engine, good = failing
    alone = engine.submit(good).completions[0].result.result(60)
    begin = engine._begin

    def full(sequence: Generation) -> None:
        if sequence.prompt == bad.prompt:
            raise torch.OutOfMemoryError("no memory")
        begin(sequence)

    monkeypatch.setattr(engine, "_begin", full)
    bad = Request((5, 6, 7), n=3, max_new_tokens=60)
    running = engine.submit(good)
    next(iter(running.completions[0]))
    model.gate.clear()
    jobs = [engine.submit(one) for one in (good, bad, good)]
    model.gate.set()
    for completion in jobs.pop(1).completions:
        with pytest.raises(torch.OutOfMemoryError, match="no memory"):
            completion.result.result(60)
    for job in (running, *jobs):
        assert job.completions[0].result.result(60) == alone
    engine.submit(good).completions[0].result.result(60)
    assert engine.idle_slots == 8


def test_a_decoding_sequence_that_fails_fails_alone(
    failing: tuple[Failing, Engine, Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever decodes beside it, or has its prompt in the same pass, answers as if alone."""
    model, engine, good = failing
    alone = engine.submit(good).completions[0].result.result(60)
    accept = Generation.accept

    def poisoned(self: Generation, token: int, *more: Any) -> None:
        accept(self, token, *more)
        if self.prompt == bad.prompt and self.length > len(bad.prompt) + 3:
            self.token = Failing.poison

    monkeypatch.setattr(Generation, "accept", poisoned)
    bad = Request((5, 6, 7), max_new_tokens=60, ignore_ends=True)
    model.gate.clear()
    jobs = [engine.submit(one) for one in (good, bad, good, good)]
    model.gate.set()
    beside = [engine.submit(good) for _ in range(6)]  # their prompts come while it fails
    with pytest.raises(RuntimeError, match="poison"):
        jobs.pop(1).completions[0].result.result(60)
    for job in (*jobs, *beside):
        assert job.completions[0].result.result(60) == alone
    assert engine.idle_slots == 8


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_slot_keeps_what_a_failed_or_cancelled_request_left(
    failing: tuple[Failing, Engine, Request], draw: st.DataObject
) -> None:
    """NaN keys, failing passes, neighbours and cancels in any order: good requests answer alike."""
    model, engine, good = failing
    wanted = {
        length: engine.submit(of_length(good, length)).completions[0].result.result(60)
        for length in LENGTHS
    }
    lengths = st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=6)
    broken = st.lists(st.sampled_from(BROKEN_LENGTHS), min_size=1, max_size=6)
    for length in draw.draw(broken, "broken requests"):
        tokens = [*range(5, 5 + length)]
        fault = st.sampled_from([Failing.nothing, Failing.nothing, Failing.poison])
        tokens[draw.draw(st.integers(0, length - 1), "place")] = draw.draw(fault, "fault")
        bad = Request(tuple(tokens), n=draw.draw(st.integers(1, 4), "n"))
        passes = draw.draw(st.integers(0, 3), "passes before its cancel")
        for completion in submit_and_cancel(model, engine, bad, passes).completions:
            assert completion.result.exception(60)
        others = draw.draw(lengths, "beside")
        model.gate.clear()  # so that they are decoded together
        beside = [engine.submit(of_length(good, length)) for length in others]
        model.gate.set()
        for job in beside:
            assert job.completions[0].result.result(60) == wanted[len(job.request.prompt)]


LENGTHS = (100, 160, 200)  # near enough that slots are read together, to the longest
BROKEN_LENGTHS = (20, 200, 400)  # computed in one to four passes


def submit_and_cancel(model: Failing, engine: Engine, request: Request, passes: int) -> Job:
    """Submit a request to an idle engine, and cancel it after some passes, if it still runs."""
    model.left = passes
    if not passes:
        model.gate.clear()
    job = engine.submit(request)
    while model.gate.is_set() and not all(one.result.done() for one in job.completions):
        time.sleep(0.001)
    job.cancel()
    model.left = -1
    model.gate.set()
    return job


def of_length(good: Request, length: int) -> Request:
    return Request(tuple(range(5, 5 + length)), max_new_tokens=5, sampling=good.sampling)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_whatever_ends_the_thread_nobody_waits_for_it(
    failing: tuple[Failing, Engine, Request],
) -> None:
    model, engine, good = failing
    model.gate.clear()
    jobs = [engine.submit(one) for one in (good, Request((5, Failing.deadly)), good)]
    model.gate.set()
    for job in jobs:
        with pytest.raises(EngineStoppedError):
            job.completions[0].result.result(60)
    with pytest.raises(EngineStoppedError):
        engine.submit(good)
    assert not engine.healthy


def test_a_prompt_whose_beginning_cannot_be_restored_fails_alone(
    bpe: PreTrainedTokenizerBase,
) -> None:
    class Forgetful(SlotCache):
        broken = True

        def restore(self, slot: int, saved: list[torch.Tensor]) -> None:
            if self.broken:
                raise RuntimeError("forgotten")
            super().restore(slot, saved)

    codec, model = Codec(bpe), SlotModel(tiny("llama", bpe))
    cache = model.cache = Forgetful(model.probe(), Capacity(4, 512))
    engine = Engine(model, token_bytes(bpe), frozenset([codec.eos]))
    engine.start([codec.prompt("")[:20]])
    asked = Request(tuple(codec.prompt("Hello.")), n=4, max_new_tokens=3)
    with pytest.raises(RuntimeError, match="forgotten"):
        engine.submit(asked).completions[0].result.result(60)
    assert engine.idle_slots == 4
    cache.broken = False
    assert engine.submit(asked).completions[3].result.result(60).tokens <= 3
    engine.stop()


def test_who_waits_for_a_completion_cannot_cancel_it_under_the_engine() -> None:
    job = Job(Request((5,)))
    [completion] = job.completions
    assert not completion.result.cancel()
    completion.finish(Answer("a", 1, "length"))
    assert asyncio.run(job.answers()) == [Answer("a", 1, "length")]
    assert not job.canceled


def test_when_one_of_n_completions_fails_the_others_are_cancelled() -> None:
    job = Job(Request((5,), n=3))
    job.completions[1].finish(RuntimeError("one of three"))
    with pytest.raises(RuntimeError, match="one of three"):
        asyncio.run(job.answers())
    assert job.canceled


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
