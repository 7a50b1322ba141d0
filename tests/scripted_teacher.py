"""A teacher on loopback that speaks both endpoints, and misbehaves on command.

What it answers to a prompt depends on the prompt alone, so a run asks for the same tasks however
often it is interrupted; every reply that was sent whole is noted in `paid`.
"""

import hashlib
import json
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from alpaca.cli import main
from alpaca.dataset.reply import Task, block

MODES = {
    "well": 0, "429 with Retry-After": 9, "429": 4, "500": 4, "hang": 13, "cut connection": 4,
    "malformed JSON": 4, "no choices": 4, "truncated reply": 1, "wrong numbering": 1,
    "duplicate ids": 1, "slow stream": 3, "thinking": 1, "thinking, not opened": 1,
    "thinking in JSON": 1, "list content": 2, "error in a 200": 4, "reasoning alone": 6,
}  # fmt: skip  # mode: every how many requests it shows
# What a model drafts while it thinks: tasks by their form, and none.
DRAFTS = """Let me see.
1. Instruction: Draft an idea about parrots that is thrown away.
1. Input:
<noinput>
1. Output:
Not good enough.
###
Or {"instruction": "Throw away this idea about parrots", "output": "draft"}?
"""
PASSING = {"429 with Retry-After", "429", "500", "hang", "cut connection", "malformed JSON"}


class ScriptedTeacher(ThreadingHTTPServer):
    """`mode` may be changed at any time; `on_paid` is called after each whole reply."""

    daemon_threads = True

    def __init__(self, mode: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.mode = mode
        self.lock = threading.Lock()
        self.released = threading.Event()  # lets hanging requests go
        self.asked: list[str] = []  # every prompt, in order of arrival
        self.paid: list[str] = []  # the text of every reply sent whole
        self.keys: set[str] = set()
        self.bodies: list[dict[str, Any]] = []
        self.error_code: int | str = 502
        self.on_paid: Callable[[int], None] = lambda count: None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that was killed


@contextmanager
def scripted_teacher(mode: str = "well") -> Iterator[ScriptedTeacher]:
    server = ScriptedTeacher(mode)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


def flags(teacher: ScriptedTeacher, output: Path, *more: str, wanted: int = 500) -> list[str]:
    return [
        "generate",
        "--teacher",
        teacher.url,
        "--model",
        "scripted",
        "--output",
        str(output),
        "--num_instructions",
        str(wanted),
        "--timeout",
        "60",
        *more,
    ]


def generate(*arguments: Any, **options: Any) -> int:
    with pytest.raises(SystemExit) as ended:
        main(flags(*arguments, **options))
    return int(ended.value.code or 0)


def entries(output: Path, kind: str) -> list[dict[str, Any]]:
    journal = output.with_name(f"{output.stem}.journal.jsonl").read_text()
    found = [json.loads(line) for line in journal.splitlines()]
    return [entry for entry in found if entry["entry"] == kind]


def side(output: Path, what: str) -> list[dict[str, Any]]:
    text = output.with_name(f"{output.stem}.{what}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def files(folder: Path) -> dict[str, bytes]:
    """Everything a run leaves but its journal, whose order of lines is the network's."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if "journal" not in p.name}


def tasks_for(prompt: str, count: int = 20) -> list[Task]:
    """Tasks drawn from the prompt's hash: most new, some the recipe drops, some said before."""
    rng = random.Random(hashlib.sha256(prompt.encode()).digest())
    made = []
    for _ in range(count):
        words = ["".join(rng.choices("bdfgklmnprst", k=3)) + rng.choice("aeiou") for _ in range(9)]
        instruction = " ".join(["Explain", *words]) + "."
        kind = rng.random()
        if kind < 0.1:
            instruction = "Draw " + instruction
        elif kind < 0.2:
            instruction = "Name the three longest rivers of Europe."
        made.append(Task(instruction, words[0] if kind > 0.6 else "", " ".join(words[:4])))
    return made


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ScriptedTeacher

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        chat = self.path.endswith("/chat/completions")
        prompt = body["messages"][0]["content"] if chat else body["prompt"]
        with self.server.lock:
            self.server.asked.append(prompt)
            self.server.bodies.append(body)
            self.server.keys.add(self.headers["Authorization"])
            number = len(self.server.asked)
        mode = self.server.mode
        misbehaves = MODES.get(mode) and number % MODES[mode] == 0
        if misbehaves and mode == "429 with Retry-After":
            self.fail(429, {"Retry-After": "1"})
        elif (misbehaves and mode in ("429", "500")) or mode in ("401", "400", "404"):
            self.fail(int(mode), {})
        elif misbehaves and mode == "error in a 200":
            error = {"message": "Provider returned error", "code": self.server.error_code}
            self.send(200, json.dumps({"error": error}).encode(), {})
        elif misbehaves and mode == "hang":
            self.server.released.wait(20)
            self.close_connection = True
        else:
            self.answer(prompt, chat, mode if misbehaves else "well")

    def fail(self, status: int, headers: dict[str, str]) -> None:
        """An error that quotes the key, as some servers do."""
        said = {"error": {"message": f"no, {self.headers['Authorization']} may not"}}
        self.send(status, json.dumps(said).encode(), headers)

    def answer(self, prompt: str, chat: bool, mode: str) -> None:
        text, finish = self.text(prompt, mode)
        if not chat:
            text = text.removeprefix("4. Instruction:")
        content: Any = text
        if mode == "list content":
            thought = {"type": "thinking", "thinking": [{"type": "text", "text": DRAFTS}]}
            halves = [text[: len(text) // 2], text[len(text) // 2 :]]
            content = [thought, *({"type": "text", "text": half} for half in halves)]
        if mode == "reasoning alone":
            content = None
        said = {"message": {"role": "assistant", "content": content}} if chat else {"text": text}
        choices = [{"index": 0, "finish_reason": finish} | said]
        whole = {
            "id": "same" if mode == "duplicate ids" else hashlib.sha1(prompt.encode()).hexdigest(),
            "object": "chat.completion" if chat else "text_completion",
            "created": 0,
            "model": "scripted",
            "choices": [] if mode == "no choices" else choices,
            "usage": {"prompt_tokens": 700, "completion_tokens": 300, "total_tokens": 1000},
        }
        encoded = json.dumps(whole).encode()
        if mode == "malformed JSON":
            encoded = encoded[:-20]
        self.send(200, encoded, {}, mode)
        if mode not in {*PASSING, "no choices", "reasoning alone"}:
            with self.server.lock:
                self.server.paid.append(text)
                count = len(self.server.paid)
            self.server.on_paid(count)

    def text(self, prompt: str, mode: str) -> tuple[str, str]:
        tasks = tasks_for(prompt)
        if mode == "wrong numbering":
            return "\n".join(
                block(1 + number // 3, task) for number, task in enumerate(tasks)
            ), "stop"
        if mode == "duplicate ids":
            return "\n".join(block(4, task) for task in tasks), "stop"
        text = "\n".join(block(number, task) for number, task in enumerate(tasks, start=4))
        if mode == "thinking":
            return f"<think>\n{DRAFTS}\n</think>\n{text}", "stop"
        if mode == "thinking, not opened":
            return f"{DRAFTS}</think>\n\n{text}", "stop"
        if mode == "thinking in JSON":
            listed = [task._asdict() for task in tasks]
            return f"<think>{DRAFTS}</think>{json.dumps(listed)}", "stop"
        if mode == "reasoning alone":
            return text, "length"
        if mode == "truncated reply":
            return text[: text.rfind("Output:") + 12], "length"
        return text, "stop"

    def send(self, status: int, content: bytes, headers: dict[str, str], mode: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if mode == "cut connection":
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        pieces = 20 if mode == "slow stream" else 1
        size = len(content) // pieces + 1
        for start in range(0, len(content), size):
            self.wfile.write(content[start : start + size])
            self.wfile.flush()
            if pieces > 1:
                self.server.released.wait(0.01)
