"""`transformers serve`: its chat completions, greedy in fp32."""

import json
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import common
import transformers

folder, task = common.task()
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
words = ["serve", folder, "--host", "127.0.0.1", "--port", str(port)]
words += ["--dtype", "float32", "--device", "cpu"]
program = Path(sys.executable).parent / "transformers"
with open("log", "w") as log:
    server = subprocess.Popen([program, *words], stdout=log, stderr=log)


def ask(path: str, body: object = None) -> dict[str, object]:
    """The server's JSON."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}",
        None if body is None else json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)  # type: ignore[no-any-return]


try:
    for _ in range(600):
        try:
            ask("/health")
            break
        except OSError:
            if server.poll() is not None:
                sys.exit(Path("log").read_text()[-300:])
            time.sleep(0.1)
    answers = []
    for prompt in task["prompts"]:
        body = {
            "model": folder,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": task["new"],
            "temperature": 0,
            "stream": False,
        }
        found = ask("/v1/chat/completions", body)
        answers.append(found["choices"][0]["message"]["content"])  # type: ignore[index]
finally:
    server.terminate()
    server.wait()
common.report(version=f"transformers serve {transformers.__version__}", answer_texts=answers)
