"""An engine behind a URL keeps the own one's promises; vLLM as a child is watched and ended."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from engines import answer_of
from http_server import answering, serving
from model_folders import copied, save, tensors
from scripted_completions import Completions, Told, scripted_completions
from transformers import PreTrainedTokenizerBase

from alpaca import golden, passport
from alpaca.errors import UserError
from alpaca.model import load_model
from alpaca.serving import elsewhere, loading
from alpaca.serving.border import BusyError, EngineStoppedError, Limits
from alpaca.serving.cache import Capacity
from alpaca.serving.engine import Engine
from alpaca.serving.remote import LostError, RemoteEngine, Server, seed_of
from alpaca.serving.request import CanceledError, Request, Sampling
from alpaca.serving.settings import has_other_engine
from alpaca.serving.stream import token_bytes
from alpaca.serving.weights import Weights
from alpaca.tokens import Codec
from alpaca.web.server import start as start_web

ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def bridge(
    bpe: PreTrainedTokenizerBase, *servers: Completions, slots: int = 8, **more: Any
) -> Iterator[RemoteEngine]:
    known = [Server(server.url, server.models[0]) for server in servers]
    table = token_bytes(bpe)
    engine = RemoteEngine(known, table, frozenset([bpe.eos_token_id]), Capacity(slots, 512), **more)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def wait_for(reached: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def answer(engine: RemoteEngine, ids: list[int], **more: Any) -> Any:
    return engine.submit(Request(tuple(ids), **more)).completions[0].result.result(60)


def test_a_server_is_asked_with_ids_and_told_all_that_decides_the_answer(
    bpe: PreTrainedTokenizerBase,
) -> None:
    prompt, said = bpe.encode("Name a color."), bpe.encode(" Blue.")
    sampling = Sampling(0.5, 0.9, 20, 1.2, 0.1, 0.2, seed=2**64 - 1)
    with (
        scripted_completions(lambda _: Told([*said, bpe.eos_token_id])) as server,
        bridge(bpe, server, key="secret") as engine,
    ):
        job = engine.submit(
            Request(tuple(prompt), n=2, max_new_tokens=9, stop=("\n", ""), sampling=sampling)
        )
        found = [one.result.result(60) for one in job.completions]
        assert [(one.text, one.tokens, one.reason) for one in found] == [
            (" Blue.", len(said) + 1, "eos")
        ] * 2
        asked = sorted(server.asked, key=lambda body: body["seed"])
        assert server.keys == ["Bearer secret"] * 2
    seeds = sorted(seed_of(2**64 - 1, number) for number in range(2))
    assert [body.pop("seed") for body in asked] == seeds
    assert len({*seeds}) == 2
    assert all(0 <= seed < 2**63 for seed in seeds)
    wanted = {
        "model": "llama-tiny", "prompt": prompt, "max_tokens": 9, "temperature": 0.5, "top_p": 0.9,
        "top_k": 20, "repetition_penalty": 1.2, "frequency_penalty": 0.1, "presence_penalty": 0.2,
        "stop_token_ids": [bpe.eos_token_id], "stream": True,
        "stream_options": {"include_usage": True}, "return_token_ids": True, "min_p": 0.0,
    }  # fmt: skip
    assert asked == [wanted, wanted]


@pytest.mark.parametrize("told_ids", [True, False], ids=["ids", "text"])
def test_answers_end_as_those_of_the_own_engine(
    told_ids: bool, bpe: PreTrainedTokenizerBase
) -> None:
    """Text is cut before the first stop string; a reason says which limit it was."""
    prompt = bpe.encode("Tell me of birds.")
    said = bpe.encode(" one two three four five six")
    texts = None if told_ids else [bpe.decode([one]) for one in said]
    whole = "".join(texts) if texts else bpe.decode(said)

    def asked(finish: str, stop_reason: str | None = None, **more: Any) -> tuple[str, str]:
        reason = stop_reason if told_ids else None
        with (
            scripted_completions(lambda _: Told(said, finish, reason, texts)) as server,
            bridge(bpe, server) as engine,
        ):
            found = answer(engine, prompt, **more)
        return found.text, found.reason

    assert asked("stop") == (whole, "eos")
    assert asked("stop", stop=("ree f",)) == (" one two th", "stop")
    assert asked("stop", stop=("nowhere",)) == (whole, "eos")
    count = len(said)
    assert asked("length", max_new_tokens=count) == (whole, "length")
    assert asked("length", total_tokens=len(prompt) + count) == (whole, "length")
    assert asked("length", total_tokens=len(prompt)) == ("", "length")
    if told_ids:
        assert asked("length", max_new_tokens=2)[1] == "length"


def test_a_request_that_cannot_be_answered_is_refused_here(bpe: PreTrainedTokenizerBase) -> None:
    with scripted_completions(lambda _: Told([])) as server, bridge(bpe, server) as engine:
        for request in (
            Request(()),
            Request((1,) * 512),
            Request((10**6,)),
            Request((1,), n=9),
            Request((1,), stop=("a",) * 17),
            Request((1,), adapter="unknown"),
        ):
            with pytest.raises(UserError):
                engine.submit(request)
        with pytest.raises(UserError, match="bytes"):
            engine.check_text(10**7)
        with pytest.raises(UserError, match="another one"):
            engine.load_adapter("a", ROOT, Codec(bpe))
        assert not server.asked


def test_cancelling_leaves_the_stream_and_frees_the_slot(bpe: PreTrainedTokenizerBase) -> None:
    with (
        scripted_completions(lambda _: Told([5] * 400, pause=0.02)) as server,
        bridge(bpe, server, slots=1) as engine,
    ):
        first, second = (engine.submit(Request((1, 2))) for _ in range(2))
        next(iter(first.completions[0]))
        assert (engine.waiting, engine.idle_slots) == (1, 0)
        first.cancel()
        with pytest.raises(CanceledError):
            first.completions[0].result.result(10)
        next(iter(second.completions[0]))
        wait_for(lambda: server.left == 1)
        third = engine.submit(Request((1, 2)))
        third.cancel()  # while it waits
        with pytest.raises(CanceledError):
            third.completions[0].result.result(10)
        second.cancel()
        wait_for(lambda: server.left == 2 and engine.idle_slots == 1)
        assert engine.measures.ended["canceled"] == 3
        assert len(server.asked) == 2


def test_a_request_that_is_cancelled_at_any_moment_frees_its_slots(
    bpe: PreTrainedTokenizerBase,
) -> None:
    with (
        scripted_completions(lambda _: Told([5] * 400, pause=0.01)) as server,
        bridge(bpe, server, slots=4, limits=Limits(waiting=500)) as engine,
    ):
        jobs = []
        for number in range(200):
            job = engine.submit(Request((1, 2), n=1 + number % 3))
            time.sleep((number % 5) / 1000)
            job.cancel()
            jobs.append(job)
        for job in jobs:
            for one in job.completions:
                with pytest.raises(CanceledError):
                    one.result.result(30)
        wait_for(lambda: (engine.idle_slots, engine.waiting) == (4, 0))
        server.script = lambda _: Told([5], "length")
        assert answer(engine, [1, 2], max_new_tokens=1).tokens == 1


def test_an_answer_that_takes_too_long_ends_and_nonsense_fails_alone(
    bpe: PreTrainedTokenizerBase,
) -> None:
    with (
        scripted_completions(lambda _: Told([5] * 400, pause=0.3)) as server,
        bridge(bpe, server, limits=Limits(seconds=1)) as engine,
    ):
        ended = answer(engine, [1, 2])
        assert ended.reason == "time"
        assert 1 <= ended.tokens <= 4
        for garbage in ("{", "[]", '{"choices": [{"token_ids": ["a"]}]}', "null"):
            server.script = lambda _, garbage=garbage: Told([5], garbage=garbage)
            failed = engine.submit(Request((1, 2))).completions[0].result.exception(30)
            assert isinstance(failed, Exception), garbage
        server.script = lambda _: Told([5], "length")
        assert answer(engine, [1, 2], max_new_tokens=1).tokens == 1
        wait_for(lambda: engine.idle_slots == 8)


def test_more_requests_than_slots_wait_and_a_full_queue_refuses(
    bpe: PreTrainedTokenizerBase,
) -> None:
    with (
        scripted_completions(lambda _: Told([5] * 4, "length", pause=0.05)) as server,
        bridge(bpe, server, slots=3, limits=Limits(waiting=4)) as engine,
    ):
        jobs, refused = [], 0
        for _ in range(20):
            try:
                jobs.append(engine.submit(Request((1, 2), max_new_tokens=4)))
            except BusyError:
                refused += 1
        assert refused >= 10
        assert {one.completions[0].result.result(60).tokens for one in jobs} == {4}
        assert server.most == 3
        wait_for(lambda: engine.idle_slots == 3)
        assert engine.waiting == 0


def test_requests_are_spread_and_one_server_that_dies_costs_only_what_it_was_making(
    bpe: PreTrainedTokenizerBase,
) -> None:
    state = {"broken": False}

    def dying(_: Any) -> Told:
        if state["broken"]:
            raise ConnectionError
        return Told([5] * 40, "length", pause=0.05, breaks=20)

    with ExitStack() as stack:
        good = stack.enter_context(
            scripted_completions(lambda _: Told([5] * 40, "length", pause=0.02))
        )
        bad = stack.enter_context(scripted_completions(dying))
        engine = stack.enter_context(bridge(bpe, good, bad))
        jobs = [engine.submit(Request((1, 2), max_new_tokens=40)) for _ in range(8)]
        wait_for(lambda: len(good.asked) == len(bad.asked) == 4)
        state["broken"] = True
        bad.healthy = False
        results = [job.completions[0].result.exception(60) for job in jobs]
        lost = [one for one in results if one is not None]
        assert len(lost) == 4
        assert all(isinstance(one, LostError) and "ask again" in str(one) for one in lost)
        for _ in range(3):  # one may ask the bad server, which says nothing, and then the good one
            assert answer(engine, [1, 2], max_new_tokens=40).tokens == 40
        assert engine.healthy
        good.healthy = False
        wait_for(lambda: not engine.healthy)
        waiting = engine.submit(Request((1, 2), max_new_tokens=40))
        time.sleep(0.1)
        assert not waiting.completions[0].result.done()  # until a server is up again
        good.healthy = True
        assert waiting.completions[0].result.result(60).tokens == 40


def test_what_a_server_says_is_told_without_the_key(bpe: PreTrainedTokenizerBase) -> None:
    refusal = Told(status=400, message="no secret here")
    with (
        scripted_completions(lambda _: refusal) as server,
        bridge(bpe, server, key="secret") as engine,
    ):
        with pytest.raises(UserError, match=r"refuses this request: no \[key\] here$"):
            answer(engine, [1, 2])
        server.script = lambda _: Told([5], finish="abort")
        with pytest.raises(LostError, match="abort"):
            answer(engine, [1, 2])


def test_stopping_tells_everyone(bpe: PreTrainedTokenizerBase) -> None:
    with (
        scripted_completions(lambda _: Told([5] * 400, pause=0.02)) as server,
        bridge(bpe, server, slots=1) as engine,
    ):
        jobs = [engine.submit(Request((1, 2))) for _ in range(2)]
        next(iter(jobs[0].completions[0]))
        engine.stop()
        for job in jobs:
            with pytest.raises(EngineStoppedError):
                job.completions[0].result.result(10)
        assert not engine.healthy
        with pytest.raises(EngineStoppedError):
            engine.submit(Request((1, 2)))


def test_asking_our_own_web_server_gives_the_engines_own_answers(
    served: tuple[Engine, Codec],
) -> None:
    """Greedy ones: seeds mean other numbers behind a URL."""
    own, codec = served
    web = start_web({"ALPACA_WEB_PORT": "0"}, {}, ROOT)
    assert web is not None
    try:
        web.serve("tiny", own, codec)
        url = f"http://127.0.0.1:{web.port}/v1"
        engine = RemoteEngine([Server(url, "tiny")], own.table, own.ends, Capacity(4, 512))
        engine.start()
        try:
            greedy = Sampling(temperature=0)
            for text in ("Name a color.", "What is 2 + 2?", "Tell a story about a bird."):
                for stop in ((), ("e",)):
                    ids, more = codec.prompt(text, ""), {"stop": stop, "max_new_tokens": 24}
                    theirs = answer(engine, ids, sampling=greedy, **more)
                    ours = answer_of(own, ids, greedy, **more)
                    assert (theirs.text, theirs.reason) == (ours.text, ours.reason)
        finally:
            engine.stop()
    finally:
        web.stop()


def settings(model: Path, **environment: str) -> tuple[Weights, dict[str, str]]:
    return Weights(model, "a test"), environment


def test_a_url_is_checked_when_it_is_read(tiny_model: Path) -> None:
    def load(**environment: str) -> None:
        weights, given = settings(tiny_model, **environment)
        engine, _ = loading.load(weights, given)
        engine.stop()

    with scripted_completions(lambda _: Told([]), models=["one", "two"]) as server:
        load(ALPACA_ENGINE_URL=f"{server.url}, {server.url}/")
        load(ALPACA_ENGINE_URL=server.url, ALPACA_ENGINE_MODEL="two")
        for environment, told in (
            ({"ALPACA_ENGINE_URL": server.url, "ALPACA_ENGINE_MODEL": "three"}, "one, two"),
            ({"ALPACA_ENGINE_URL": "nowhere"}, "not a URL"),
            ({"ALPACA_ENGINE": "sglang"}, "own or vllm"),
            ({"ALPACA_ENGINE": "vllm", "ALPACA_ENGINE_URL": server.url}, "both set"),
            ({"ALPACA_ENGINE": "vllm", "ALPACA_VLLM_PYTHON": "/nowhere"}, "is not there"),
            ({"ALPACA_ENGINE_URL": server.url, "ALPACA_SLOTS": "0"}, "ALPACA_SLOTS"),
        ):
            with pytest.raises(UserError, match=told):
                load(**environment)


@contextmanager
def likely(folder: Path, dtype: torch.dtype, ids: bool = True) -> Iterator[str]:
    """A server that tells the likeliest first tokens of an answer, by transformers."""
    model = load_model(folder, dtype)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self.reply({"data": [{"id": "model"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with torch.inference_mode():
                logits = model(torch.tensor([body["prompt"]])).logits[0, -1].float()
            values, found = logits.log_softmax(0).topk(body["logprobs"])
            named = [f"token_id:{one}" if ids else str(one) for one in found.tolist()]
            told = {"top_logprobs": [dict(zip(named, values.tolist(), strict=True))]}
            self.reply({"choices": [{"logprobs": told}]})

        def reply(self, content: Any) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

    with answering(Handler) as url:
        yield f"{url}/v1"


def test_a_server_of_other_weights_is_refused(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, other = copied(tiny_model, tmp_path / "model"), copied(tiny_model, tmp_path / "other")
    held = tensors(other)
    name = "model.layers.0.mlp.down_proj.weight"
    held[name] = held[name].flip(0)
    save(other, held)
    passport.write(folder, "test", golden=golden.record(folder), tensors={})
    for dtype in (torch.float32, torch.bfloat16):
        with likely(folder, dtype) as url:
            elsewhere.check_weights(url, "model", folder, None)
        assert capsys.readouterr().out == ""
        with likely(other, dtype) as url, pytest.raises(UserError, match="other weights than"):
            loading.load(*settings(folder, ALPACA_ENGINE_URL=url))
    with likely(other, torch.float32, ids=False) as url:
        elsewhere.check_weights(url, "model", folder, None)
    assert "not checked: it tells no ids of likely tokens" in capsys.readouterr().out


def stand_in(folder: Path) -> Path:
    """A program in the place of vLLM's Python."""
    program = folder / "python"
    script = ROOT / "tests/scripted_completions.py"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n')
    program.chmod(0o755)
    return program


def workers(log: Path) -> list[int]:
    told = [line.partition("vllm: worker ")[2] for line in log.read_text().splitlines()]
    return [int(text.split('"')[0]) for text in told if text]


def alive(numbers: list[int]) -> list[int]:
    found = []
    for number in numbers:
        with suppress(psutil.NoSuchProcess):
            if psutil.Process(number).status() != psutil.STATUS_ZOMBIE:
                found.append(number)
    return found


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_vllm_is_started_again_when_it_dies_and_ends_with_the_runner(
    how: signal.Signals, tiny_model: Path, tmp_path: Path
) -> None:
    given = {
        "ALPACA_ENGINE": "vllm",
        "ALPACA_VLLM_PYTHON": str(stand_in(tmp_path)),
        "ALPACA_VLLM_FLAGS": "--more 'two words'",
        "ALPACA_SLOTS": "5",
    }
    with serving(tiny_model, tmp_path, **given) as server:
        log = server.log.read_text()
        assert "--served-model-name llama-tiny" in log
        assert "--more two words" in log
        answered = server.post(prompt="Say it.", max_new_tokens=7).json()
        assert answered["metrics"]["completion_tokens"] == 7
        [first] = workers(server.log)
        child = psutil.Process(first).parent()
        assert child is not None
        os.kill(child.pid, signal.SIGKILL)
        wait_for(lambda: not alive([first]))  # or it would keep its memory
        answered = server.post(prompt="Say it.", max_new_tokens=7).json()
        assert answered["status"] == "succeeded", answered
        [_, second] = workers(server.log)
        runner = [one for one in psutil.Process(server.process.pid).children(recursive=True)
                  if "cog" in " ".join(one.cmdline())]  # fmt: skip
        if how == signal.SIGTERM:
            server.process.send_signal(how)
        else:
            for one in [psutil.Process(server.process.pid), *runner]:
                with suppress(psutil.NoSuchProcess):
                    one.send_signal(how)
        wait_for(lambda: not alive([second]), 5)


def test_vllm_that_does_not_start_is_said_with_its_last_line(
    tiny_model: Path, tmp_path: Path
) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho no such flag; exit 2\n")
    program.chmod(0o755)
    given = {"ALPACA_ENGINE": "vllm", "ALPACA_VLLM_PYTHON": str(program)}
    weights, environment = settings(tiny_model, **given)
    with pytest.raises(UserError, match=r"did not start\. Its last line: no such flag"):
        loading.load(weights, environment)


def test_the_seeds_of_completions_differ() -> None:
    found = {seed_of(seed, number) for seed in range(100) for number in range(5)}
    assert len(found) == 500
    assert json.dumps(max(found))
    assert has_other_engine({}) is False
