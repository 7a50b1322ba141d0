"""An OpenAI-compatible endpoint on loopback whose replies a test writes, for `answer` and `judge`.

Every body and key that it was sent is noted, in order of arrival.
"""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]


@dataclass
class Said:
    """One reply; `top` are the first token's likeliest ones. With a status, an error."""

    text: str | None = ""
    finish: str = "stop"
    top: list[tuple[str, float]] | None = None
    usage: tuple[int, int] | None = (50, 1)
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class ScriptedEndpoint(ThreadingHTTPServer):
    """`reply` may be changed at any time; `on_reply` is called before each whole reply is sent."""

    daemon_threads = True

    def __init__(self, reply: Callable[[Body], Said], owner: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.owner = reply, owner
        self.lock = threading.Lock()
        self.asked: list[Body] = []
        self.answered = 0
        self.on_reply: Callable[[int], None] = lambda count: None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def prompts(self) -> list[str]:
        """What was asked, once for each request."""
        return [prompt_of(body) for body in self.asked]

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that was killed


def prompt_of(body: Body) -> str:
    return str(body["messages"][0]["content"] if "messages" in body else body["prompt"])


@contextmanager
def scripted_endpoint(
    reply: Callable[[Body], Said], owner: str = "somebody"
) -> Iterator[ScriptedEndpoint]:
    server = ScriptedEndpoint(reply, owner)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ScriptedEndpoint

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        listed = [{"id": "scripted", "object": "model", "owned_by": self.server.owner}]
        self.send(200, {"object": "list", "data": listed}, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append(body)
        said = self.server.reply(body)
        if said.status != 200:  # an error that quotes the key, as some servers do
            told = f"{said.text or 'no'}, {self.headers['Authorization']} may not"
            self.send(said.status, {"error": {"message": told}}, said.headers)
            return
        with self.server.lock:
            self.server.answered += 1
            count = self.server.answered
        self.server.on_reply(count)
        self.send(200, completion(said, "messages" in body), said.headers)

    def send(self, status: int, value: Any, headers: dict[str, str]) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, text in headers.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(content)


def completion(said: Said, chat: bool) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": 0, "finish_reason": said.finish}
    if chat:
        choice["message"] = {"role": "assistant", "content": said.text}
    else:
        choice["text"] = said.text
    if said.top is not None:
        listed = [{"token": token, "logprob": logprob} for token, logprob in said.top]
        choice["logprobs"] = {"content": [{**listed[0], "top_logprobs": listed}]}
    whole: dict[str, Any] = {"id": "one", "object": "completion", "created": 0, "model": "scripted"}
    if said.usage is not None:
        sent, received = said.usage
        whole["usage"] = {
            "prompt_tokens": sent,
            "completion_tokens": received,
            "total_tokens": sent + received,
        }
    return {**whole, "choices": [choice]}
