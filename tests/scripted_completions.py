"""A server of /v1/completions that streams what a script says, in vLLM's words.

In a test: `with scripted_completions(script) as server`. As a program it stands for vLLM's:
`python scripted_completions.py -m ... --port N ...` answers each prompt with its own ids, and has
a worker, a process that outlives it unless someone ends it.
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]


@dataclass
class Told:
    """An answer: its tokens, why it ends, and what goes wrong with it.

    texts: pieces of text, of a server that tells no ids. breaks: the connection ends after so many
    tokens. status: an error instead. pause: seconds before each token.
    """

    tokens: Sequence[int] = ()
    finish: str = "stop"
    stop_reason: str | int | None = None
    texts: Sequence[str] | None = None
    breaks: int | None = None
    status: int = 200
    message: str = ""
    pause: float = 0.0
    garbage: str = ""


class Completions(ThreadingHTTPServer):
    """Notes every body; `left` counts the answers whose reader went away."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, script: Callable[[Body], Told], models: Sequence[str], port: int) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.script, self.models = script, models
        self.asked: list[Body] = []
        self.keys: list[str | None] = []
        self.left = 0
        self.running = 0
        self.most = 0
        self.healthy = True
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Completions

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/health":
            self.reply(200 if self.server.healthy else 503, {})
        else:
            listed = [{"id": name, "max_model_len": 512} for name in self.server.models]
            self.reply(200, {"object": "list", "data": listed})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server = self.server
        with server.lock:
            server.asked.append(body)
            server.keys.append(self.headers["authorization"])
            server.running += 1
            server.most = max(server.most, server.running)
        try:
            told = server.script(body)
            if told.status != 200:
                self.reply(told.status, {"error": {"message": told.message}})
            else:
                self.stream(told)
        except OSError:
            server.left += 1
        finally:
            with server.lock:
                server.running -= 1

    def reply(self, status: int, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def stream(self, told: Told) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        if told.garbage:
            self.wfile.write(f"data: {told.garbage}\n\n".encode())
        pieces = told.tokens if told.texts is None else told.texts
        for number, piece in enumerate(pieces):
            if told.breaks == number:
                return
            time.sleep(told.pause)
            known = (
                {"text": piece} if told.texts is not None else {"text": "", "token_ids": [piece]}
            )
            self.event({"choices": [{"index": 0, "finish_reason": None, **known}]})
        if told.breaks is None:
            last = {"index": 0, "text": "", "finish_reason": told.finish}
            if told.texts is None:
                last |= {"token_ids": [], "stop_reason": told.stop_reason}
            self.event({"choices": [last]})
            self.event({"choices": [], "usage": {"completion_tokens": len(pieces)}})
            self.wfile.write(b"data: [DONE]\n\n")

    def event(self, content: Any) -> None:
        self.wfile.write(f"data: {json.dumps(content)}\n\n".encode())
        self.wfile.flush()


@contextmanager
def scripted_completions(
    script: Callable[[Body], Told], models: Sequence[str] = ("llama-tiny",), port: int = 0
) -> Iterator[Completions]:
    server = Completions(script, models, port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def main() -> None:
    words = sys.argv[1:]
    print("started with", *words, flush=True)
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print("worker", worker.pid, flush=True)
    name = words[words.index("--served-model-name") + 1]

    def echo(body: Body) -> Told:
        return Told(body["prompt"][: body["max_tokens"]], "length", pause=0.02)

    Completions(echo, [name], int(words[words.index("--port") + 1])).serve_forever()


if __name__ == "__main__":
    main()
