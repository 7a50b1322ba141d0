"""`answer`: the engine's own answers in the suite's order, resumed after any interruption."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from adapters import make_adapter, peft_merged
from engines import answer_of, engine_of, tiny
from http_server import answering
from scripted_endpoint import Body, Said, prompt_of, scripted_endpoint
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from alpaca.cli import main
from alpaca.errors import UserError
from alpaca.evaluation import suites
from alpaca.serving.engine import Engine
from alpaca.tokens import Codec
from alpaca.web import app, server

ROOT = Path(__file__).resolve().parent.parent
VERBS = ("Name", "Sort", "Explain", "Draw", "List")
TASKS = [
    {
        "instruction": f"{VERBS[n % 5]} {n} colors.",
        "input": f"the input of {n}" if n % 3 == 0 else "",
        "output": f"reference {n} " * (n % 4 + 1) if n % 2 else "",
        "kind": VERBS[n % 5],
    }
    for n in range(14)
]


@pytest.fixture(scope="module")
def folder(bpe: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with decisive logits: no near-ties for rounding to turn."""
    made = tmp_path_factory.mktemp("models") / "tiny"
    tiny("llama", bpe).save_pretrained(made)
    bpe.save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def served(bpe: PreTrainedTokenizerBase, folder: Path) -> Iterator[tuple[Engine, Codec]]:
    """An engine with the folder's model, as a server has it."""
    codec = Codec(bpe)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    engine = engine_of(model, codec, slots=5)
    yield engine, codec
    engine.stop()


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALPACA_DTYPE", "float32")
    monkeypatch.setenv("ALPACA_SLOTS", "6")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    return written(tmp_path / "suite.json", TASKS)


def written(path: Path, items: list[Any]) -> Path:
    path.write_text(json.dumps(items))
    return path


def flags(model: Path | str, suite: Path, output: Path, *more: str) -> list[str]:
    most = [] if "--max_new_tokens" in more else ["--max_new_tokens", "12"]
    return ["answer", "--model", str(model), "--suite", str(suite), "-o", str(output), *most, *more]


def answer(*arguments: Any) -> int:
    with pytest.raises(SystemExit) as ended:
        main(flags(*arguments))
    return int(ended.value.code or 0)


def outputs(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text())
    return found


def journal(output: Path) -> list[dict[str, Any]]:
    """The answers in an output's journal, in order of arrival."""
    lines = output.with_name(f"{output.stem}.journal.jsonl").read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines[1:]]


# ---- a folder


def test_an_adapters_folder_answers_as_its_merged_model(
    folder: Path, suite: Path, bpe: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "tuned", folder, use_dora=True)
    merged = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    merged.load_state_dict(peft_merged(folder, adapter, torch.float32), strict=False)
    merged.save_pretrained(tmp_path / "merged")
    bpe.save_pretrained(tmp_path / "merged")
    told = []
    for model in (adapter, tmp_path / "merged", folder):
        assert answer(model, suite, tmp_path / f"{model.name}.json") == 0
        told.append([one["output"] for one in outputs(tmp_path / f"{model.name}.json")])
    assert told[0] == told[1] != told[2]
    assert outputs(tmp_path / "tuned.json")[0]["generator"] == "tuned"
    # an adapter that was trained again does not continue the older one's journal
    make_adapter(adapter, folder, seed=9, use_dora=True)
    assert answer(adapter, suite, tmp_path / "tuned.json") == 2


@pytest.mark.parametrize("slots", ["1", "64"])
def test_greedy_answers_are_the_engines_one_by_one_whatever_the_batch(
    folder: Path,
    suite: Path,
    served: tuple[Engine, Codec],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    slots: str,
) -> None:
    engine, codec = served
    monkeypatch.setenv("ALPACA_SLOTS", slots)
    assert answer(folder, suite, tmp_path / "out.json") == 0
    found = outputs(tmp_path / "out.json")
    assert [one["instruction"] for one in found] == [task["instruction"] for task in TASKS]
    for task, one in zip(TASKS, found, strict=True):
        ids = codec.prompt(str(task["instruction"]), str(task["input"]))
        alone = answer_of(engine, ids, max_new_tokens=12)
        reason = {"eos": "stop", "length": "length"}[alone.reason]
        told = (one["output"], one["tokens"], one["finish_reason"])
        assert told == (alone.text, alone.tokens, reason), task
    assert len({one["output"] for one in found}) > 5


def test_the_file_is_alpacaevals_model_outputs_with_more_keys(
    folder: Path, suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answer(folder, suite, tmp_path / "out.json", "--limit", "3") == 0
    assert "3 answers of tiny" in capsys.readouterr().out
    found = outputs(tmp_path / "out.json")
    assert len(found) == 3
    for one, task in zip(found, TASKS, strict=False):
        for key in ("instruction", "output", "generator", "dataset"):
            assert isinstance(one[key], str)
        assert (one["generator"], one["dataset"]) == ("tiny", "suite")
        assert (one["input"], one["kind"]) == (task["input"], task["kind"])
        assert one["settings"] == {
            "temperature": 0.0, "top_p": 1.0, "max_new_tokens": 12, "seed": 0,
        }  # fmt: skip
    # the same command with more tasks answers only those
    assert answer(folder, suite, tmp_path / "out.json", "--generator", "tiny") == 0
    assert outputs(tmp_path / "out.json")[:3] == found
    assert (
        Counter(entry["key"] for entry in journal(tmp_path / "out.json")).most_common(1)[0][1] == 1
    )
    assert len(journal(tmp_path / "out.json")) == len(TASKS)


def test_a_seed_repeats_and_another_one_differs(folder: Path, suite: Path, tmp_path: Path) -> None:
    texts = []
    for number, seed in enumerate((1, 1, 2)):
        output = tmp_path / f"{number}.json"
        assert answer(folder, suite, output, "--temperature", "1.5", "--seed", str(seed)) == 0
        texts.append([one["output"] for one in outputs(output)])
    assert texts[0] == texts[1]
    assert sum(a != b for a, b in zip(texts[0], texts[2], strict=True)) > 10


def test_equal_instructions_stay_apart(folder: Path, tmp_path: Path) -> None:
    items = [{"instruction": "Say one.", "output": text} for text in ("a", "b b", "a")]
    same = written(tmp_path / "same.json", items)
    assert answer(folder, same, tmp_path / "out.json", "--temperature", "1.5") == 0
    found = outputs(tmp_path / "out.json")
    assert len(found) == 3
    assert len({one["output"] for one in found}) == 3  # each drew with its own seed
    first, second, third = (one["reference_loss"] for one in found)
    assert first == pytest.approx(third)
    assert first != pytest.approx(second)


def test_the_references_loss_is_that_of_their_tokens_and_end(
    folder: Path, suite: Path, tmp_path: Path, served: tuple[Engine, Codec]
) -> None:
    _, codec = served
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert answer(folder, suite, tmp_path / "out.json") == 0
    for task, one in zip(TASKS, outputs(tmp_path / "out.json"), strict=True):
        prompt = codec.prompt(str(task["instruction"]), str(task["input"]))
        target = [*codec.answers([str(task["output"])])[0], codec.eos]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + target])).logits[0]
        logprobs = logits[len(prompt) - 1 : -1].double().log_softmax(-1)
        loss = -logprobs[range(len(target)), target].sum()
        assert one["reference_loss"] == pytest.approx(float(loss), rel=1e-4)
        assert one["reference_tokens"] == len(target)


def test_a_reference_that_was_changed_is_scored_again(folder: Path, tmp_path: Path) -> None:
    items = [{"instruction": f"Task {n}", "output": "an answer"} for n in range(3)]
    suite, output = written(tmp_path / "s.json", items), tmp_path / "out.json"
    assert answer(folder, suite, output) == 0
    before = outputs(output)
    items[1]["output"] = "another, longer answer"
    written(suite, items)
    assert answer(folder, suite, output) == 0
    after = outputs(output)
    assert after[1]["reference_loss"] > before[1]["reference_loss"] + 1
    assert [after[0], after[2]] == [before[0], before[2]]
    assert len(journal(output)) == 4


def test_more_slots_than_the_queue_holds_and_a_prompt_that_is_too_long(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two requests a task, and the engine refuses more than 256 waiting ones."""
    monkeypatch.setenv("ALPACA_SLOTS", "200")
    items = [{"instruction": f"Task {n}", "output": "x"} for n in range(300)]
    items[7]["instruction"] = "too long " * 1500
    items[8]["output"] = "much too long " * 1500
    suite, output = written(tmp_path / "s.json", items), tmp_path / "out.json"
    assert answer(folder, suite, output, "--max_new_tokens", "2") == 0
    found = outputs(output)
    assert len(found) == 300
    assert [one["instruction"] for one in found] == [item["instruction"] for item in items]
    assert (found[7]["output"], "reference_loss" in found[7]) == ("", False)
    assert re.match(r"refused: The prompt has \d+ tokens", found[7]["finish_reason"])
    assert found[8]["finish_reason"] == "length"
    assert "reference_loss" not in found[8]
    assert all(found[n]["reference_tokens"] == 2 for n in range(300) if n not in (7, 8))
    assert "1 without an answer (the first refused: The prompt has" in capsys.readouterr().out


def test_stopped_at_any_moment_the_same_command_resumes(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed, then Ctrl-C, then to the end: nothing is asked twice, the file is the same."""
    monkeypatch.setenv("ALPACA_SLOTS", "2")  # or all would end in one moment
    items = [{"instruction": f"Tell about {n}.", "output": "good"} for n in range(60)]
    suite, output = written(tmp_path / "s.json", items), tmp_path / "out.json"
    more = ("--max_new_tokens", "40", "--temperature", "1")
    assert answer(folder, suite, tmp_path / "plain.json", *more) == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "alpaca", *flags(folder, suite, output, *more)],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    when_journal_has(3, output, process.kill)
    assert process.wait() == -signal.SIGKILL
    killed = len(journal(output))
    # as in a terminal: what a shell starts in the background ignores Ctrl-C, and so would this
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupt = partial(os.kill, os.getpid(), signal.SIGINT)
    thread = Thread(target=when_journal_has, args=(killed + 3, output, interrupt))
    thread.start()
    assert answer(folder, suite, output, *more) == 130
    thread.join()
    signal.signal(signal.SIGINT, before)
    assert "run the same command again to resume" in capsys.readouterr().err
    kept = journal(output)
    assert 3 <= killed < len(kept) < len(items)
    assert not output.exists()
    assert answer(folder, suite, output, *more) == 0
    assert journal(output)[: len(kept)] == kept
    assert len({entry["key"] for entry in journal(output)}) == len(journal(output)) == 60
    pairs = zip(outputs(output), outputs(tmp_path / "plain.json"), strict=True)
    for one, plain in pairs:  # sums of float32 depend in their last digits on the batch
        assert one.pop("reference_loss") == pytest.approx(plain.pop("reference_loss"), rel=1e-5)
        assert one == plain


def when_journal_has(count: int, output: Path, then: Callable[[], object]) -> None:
    path = output.with_name(f"{output.stem}.journal.jsonl")
    deadline = time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < count + 1:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    then()


def test_other_settings_another_model_and_a_damaged_journal_are_refused(
    folder: Path,
    tiny_model: Path,
    suite: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out.json"
    assert answer(folder, suite, output) == 0
    before = output.read_bytes()
    for model, *more in (
        (folder, "--temperature", "0.5"),
        (folder, "--max_new_tokens", "13"),
        (folder, "--seed", "1"),
        (folder, "--generator", "other"),
        (tiny_model, "--generator", "tiny"),
    ):
        capsys.readouterr()
        assert answer(model, suite, output, *more) == 2
        assert "was started with other settings" in capsys.readouterr().err
    path = output.with_name("out.journal.jsonl")
    lines = path.read_bytes().split(b"\n")
    lines[3] = lines[3].replace(b'"tokens": ', b'"tokens": 1')
    path.write_bytes(b"\n".join(lines))
    assert answer(folder, suite, output) == 2
    assert "is damaged: line 4 was changed" in capsys.readouterr().err
    assert output.read_bytes() == before


# ---- suites


def test_each_form_of_suite_is_read(tmp_path: Path) -> None:
    alpaca_eval = [
        {"instruction": "Who?", "output": "Me.", "generator": "gpt4", "dataset": "helpful_base"}
    ]
    self_instruct = {
        "id": "user_oriented_task_0", "motivation_app": "Grammarly", "instruction": "Shorten it.",
        "instances": [{"input": "If you have any questions", "output": "Questions?"}],
    }  # fmt: skip
    ifeval = {
        "key": 1000, "prompt": "No commas, 30 words.",
        "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
        "kwargs": [{"num_words": None, "relation": None},
                   {"num_words": 30, "relation": "at least"}],
    }  # fmt: skip
    ours = {
        "id": "eval_1", "kind": "question", "instruction": "Capital?", "input": "of Kenya",
        "output": "Nairobi", "answers": ["Nairobi"],
    }  # fmt: skip
    [one] = suites.read(written(tmp_path / "alpaca_eval.json", alpaca_eval))
    assert (one.instruction, one.reference, one.dataset) == ("Who?", "Me.", "helpful_base")
    lines = tmp_path / "user_oriented_instructions.jsonl"
    lines.write_text(json.dumps(self_instruct) + "\n")
    [one] = suites.read(lines)
    assert (one.instruction, one.input) == ("Shorten it.", "If you have any questions")
    assert (one.reference, one.dataset, one.kind) == ("Questions?", "selfinstruct", "Grammarly")
    [one] = suites.read(written(tmp_path / "ifeval.json", [ifeval]))
    assert (one.instruction, one.reference, one.dataset) == (ifeval["prompt"], None, "ifeval")
    assert one.checks == (
        ("punctuation:no_comma", {}),
        ("length_constraints:number_words", {"num_words": 30, "relation": "at least"}),
    )
    [one] = suites.read(written(tmp_path / "ours.v1.json", [ours]))
    assert (one.input, one.kind, one.dataset) == ("of Kenya", "question", "ours")
    assert one.answers == ("Nairobi",)
    alpaca = [{"instruction": "Hi", "input": "", "output": ""}] * 2
    first, second = suites.read(written(tmp_path / "alpaca_data.json", alpaca))
    assert first.key != second.key
    assert first.reference == ""
    assert len(suites.read(suites.OURS, 5)) == 5


WRONG: list[tuple[Any, str]] = [
    (3, "it is no object"),
    ({"prompt": "no checks"}, "'instruction' is missing"),
    ({"instruction": " "}, "instruction is empty"),
    ({"instruction": 3}, "instruction is no text"),
    ({"instruction": "a\ud800"}, "instruction is no text"),
    ({"instruction": "a", "output": ["a"]}, "output is no text"),
    ({"instruction": "a", "answers": "a"}, "answers is no list of texts"),
    ({"instruction": "a", "instances": []}, "instances does not hold one instance"),
    ({"instruction": "a", "instances": [3]}, "instances does not hold one instance"),
    ({"instruction": "a", "instances": {"input": ""}}, "instances does not hold one instance"),
    ({"prompt": "a", "instruction_id_list": ["x"], "kwargs": []}, "different lengths"),
    ({"prompt": "a", "instruction_id_list": ["x"], "kwargs": [1]}, "kwargs is no list of objects"),
]


@pytest.mark.parametrize(("item", "why"), WRONG)
def test_a_wrong_entry_is_named(tmp_path: Path, item: Any, why: str) -> None:
    path = written(tmp_path / "s.json", [{"instruction": "good"}, item])
    with pytest.raises(UserError, match=re.escape(why)) as raised:
        suites.read(path)
    assert "entry 1" in str(raised.value)


def test_an_entry_with_a_key_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text('[{"instruction": "a", "instruction": "b"}]')
    with pytest.raises(UserError, match="instruction occurs more than once"):
        suites.read(path)


# ---- mistakes


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--temperature", "-1"], "--temperature is -1.0"),
        (["--temperature", "nan"], "--temperature is nan"),
        (["--top_p", "0"], "--top_p 0.0"),
        (["--limit", "0"], "must be at least 1"),
        (["--max_new_tokens", "many"], "--max_new_tokens"),
        (["--model", "no/folder"], "--model no/folder is neither a folder nor a URL"),
        (["--model", "tests"], "not a model folder"),
        (["--model", "http://[oops/v1"], "is not a URL"),
        (["--model", "http://localhost:port/v1"], "is not a URL"),
        (["--model", "http://127.0.0.1:9/v1"], "cannot be reached"),
        (["--suite", "no.json"], "There is no data file no.json"),
        (["--suite", "README.md/no.json"], "There is no data file"),
        (["--suite", "tests"], "tests is a folder"),
        (["-o", "tests"], "cannot be written: tests is a folder"),
        (["-o", "."], "is a folder"),
        (["-o", "README.md/out.json"], "is no folder"),
        (["-o", "x" * 300], "--output"),
        (["--generator", "\udcff"], "not UTF-8"),
    ],
)
def test_a_mistake_is_told_and_exits_with_2(
    folder: Path,
    suite: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    changed: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(ROOT)
    assert answer(folder, suite, tmp_path / "out.json", *changed) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_the_suite_is_not_overwritten_and_an_empty_one_is_refused(
    folder: Path, suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answer(folder, suite, suite) == 2
    assert "is an input, and would be lost" in capsys.readouterr().err
    assert outputs(suite) == TASKS
    assert answer(folder, written(tmp_path / "e.json", []), tmp_path / "out.json") == 2
    assert "holds no tasks" in capsys.readouterr().err


# ---- an endpoint


@pytest.fixture(scope="module")
def web(served: tuple[Engine, Codec]) -> Iterator[server.Web]:
    running = server.Web(app.Site(), "127.0.0.1", 0)
    running.serve("tiny", *served)
    yield running
    running.stop()


@pytest.mark.parametrize("more", [[], ["--temperature", "1.2", "--top_p", "0.9", "--seed", "5"]])
def test_our_server_answers_as_the_folder_does(
    folder: Path, suite: Path, web: server.Web, tmp_path: Path, more: list[str]
) -> None:
    """Also under a top_p, and with concurrency: each task draws with its own seed."""
    assert answer(folder, suite, tmp_path / "folder.json", *more) == 0
    assert answer(f"{web.url}v1", suite, tmp_path / "url.json", *more, "--concurrency", "5") == 0
    offline, online = outputs(tmp_path / "folder.json"), outputs(tmp_path / "url.json")
    told = ("instruction", "input", "output", "tokens", "finish_reason", "generator")
    for one, other in zip(offline, online, strict=True):
        assert [one[key] for key in told] == [other[key] for key in told]


def test_a_foreign_endpoint_gets_one_message_and_may_fail_for_a_while(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-the-test")
    items = [{"instruction": f"Task {n}", "input": "more" if n == 0 else ""} for n in range(7)]
    failing = {"Task 1": [429], "Task 2": [500], "Task 4": [400]}

    def reply(body: Body) -> Said:
        prompt = prompt_of(body)
        if failing.get(prompt):
            return Said("cannot", status=failing[prompt].pop(), headers={"retry-after-ms": "1"})
        texts = {"Task 3": "", "Task 5": " \n", "Task 6": "half \ud800"}
        return Said(
            texts.get(prompt, f"to {prompt}"), finish="length" if prompt == "Task 1" else "stop"
        )

    suite, output = written(tmp_path / "s.json", items), tmp_path / "out.json"
    with scripted_endpoint(reply) as endpoint:
        assert answer(endpoint.url, suite, output, "--concurrency", "1") == 0
        count = len(endpoint.asked)
        assert answer(endpoint.url, suite, output) == 0
        assert len(endpoint.asked) == count  # nothing is asked again, what was refused neither
    assert {len(body["messages"]) for body in endpoint.asked} == {1}
    assert endpoint.asked[0]["messages"] == [{"role": "user", "content": "Task 0\n\nmore"}]
    body = endpoint.asked[1]
    assert (body["temperature"], body["max_tokens"], body["seed"]) == (0, 12, 1)
    assert Counter(endpoint.prompts()).most_common(2) == [("Task 1", 2), ("Task 2", 2)]
    found = outputs(output)
    expected = ["to Task 0\n\nmore", "to Task 1", "to Task 2", "", "", " \n", "half \ufffd"]
    assert [one["output"] for one in found] == expected
    reasons = [one["finish_reason"] for one in found]
    assert reasons[:4] == ["stop", "length", "stop", "stop"]
    assert reasons[4].startswith("refused: HTTP 400")
    assert {one["generator"] for one in found} == {"scripted"}
    said = "".join(capsys.readouterr()) + output.read_text()
    said += output.with_name("out.journal.jsonl").read_text()
    assert "sk-secret" not in said
    assert "[key] may not" in said


@pytest.mark.parametrize("text", ["", "\n\n", None])
def test_an_empty_completion_of_our_server_is_an_empty_answer(
    tmp_path: Path, text: str | None
) -> None:
    """A model that is not trained yet may end at once; that is no failure to be retried."""
    suite = written(tmp_path / "s.json", [{"instruction": "Hi"}])
    with scripted_endpoint(lambda body: Said(text), owner="alpaca-cog") as endpoint:
        assert answer(endpoint.url, suite, tmp_path / "out.json") == 0
    assert "prompt" in endpoint.asked[0]
    assert len(endpoint.asked) == 1
    [one] = outputs(tmp_path / "out.json")
    assert (one["output"], one["finish_reason"]) == (text or "", "stop")


def test_an_endpoint_that_refuses_everything_ends_the_run_and_nothing_is_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = written(tmp_path / "s.json", [{"instruction": f"Task {n}"} for n in range(200)])
    output = tmp_path / "out.json"
    with scripted_endpoint(lambda body: Said("no max_tokens", status=400)) as endpoint:
        assert answer(endpoint.url, suite, output, "--concurrency", "4") == 2
        assert 20 <= len(endpoint.asked) < 30
        err = capsys.readouterr().err
        assert "The model refused all" in err
        assert "no max_tokens" in err
        assert journal(output) == []
        endpoint.reply = lambda body: Said("fine")
        assert answer(endpoint.url, suite, output) == 0
    assert {one["output"] for one in outputs(output)} == {"fine"}


def test_replies_in_flight_are_kept_when_the_endpoint_gives_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A 401 in the middle ends the run after the paid replies have come."""

    def reply(body: Body) -> Said:
        if prompt_of(body) == "Task 2":
            return Said(status=401)
        time.sleep(0.3)
        return Said("paid")

    suite = written(tmp_path / "s.json", [{"instruction": f"Task {n}"} for n in range(9)])
    with scripted_endpoint(reply) as endpoint:
        assert answer(endpoint.url, suite, tmp_path / "out.json", "--concurrency", "4") == 2
    assert "Set OPENAI_API_KEY" in capsys.readouterr().err
    assert len(journal(tmp_path / "out.json")) == endpoint.answered == 3


@pytest.mark.parametrize(
    "page", [b"<html>a page</html>", b"[]", b'{"data": null}', b'{"data": [3]}', b"null", b"{}"]
)
def test_a_url_that_is_no_endpoint_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], page: bytes
) -> None:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header(
                "content-type", "text/html" if page[:1] == b"<" else "application/json"
            )
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *_: object) -> None:
            pass

    suite = written(tmp_path / "s.json", [{"instruction": "Hi"}])
    with answering(Page) as url:
        assert answer(url, suite, tmp_path / "out.json") == 2
    assert re.search("lists no models|does not have any model", capsys.readouterr().err)


def test_a_model_that_is_not_there_and_a_key_that_cannot_be_sent_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = written(tmp_path / "s.json", [{"instruction": "Hi"}])
    with scripted_endpoint(lambda body: Said("fine")) as endpoint:
        assert answer(endpoint.url, suite, tmp_path / "out.json", "--model_id", "gpt-5") == 2
        assert "Set --model_id to one of: scripted." in capsys.readouterr().err
        monkeypatch.setenv("OPENAI_API_KEY", "“quoted”")
        assert answer(endpoint.url, suite, tmp_path / "out.json") == 2
        assert "OPENAI_API_KEY holds characters" in capsys.readouterr().err


def test_only_packages_of_the_extra_are_needed(tmp_path: Path) -> None:
    suite = written(tmp_path / "s.json", [{"instruction": "Hi"}])
    script = (
        "import sys; sys.modules.update(dict.fromkeys({missing!r}));"
        "from alpaca.cli import main; main(sys.argv[1:])"
    )
    with scripted_endpoint(lambda body: Said("fine")) as endpoint:
        command = flags(endpoint.url, suite, tmp_path / "out.json")
        for missing, code in ((["rapidfuzz", "spacy", "ftfy"], 0), (["openai"], 2)):
            done = subprocess.run(
                [sys.executable, "-c", script.format(missing=missing), *command],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
            )
            assert done.returncode == code, done.stderr
    assert "The package openai is missing." in done.stderr
    assert "pip install -e '.[evaluation]'" in done.stderr
