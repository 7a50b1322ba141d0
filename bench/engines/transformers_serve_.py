"""`transformers serve`: its chat completions, greedy in fp32."""

import subprocess
import sys
import time
from pathlib import Path

import common
import transformers

folder, task = common.task()
port = common.free_port()
words = ["serve", folder, "--host", "127.0.0.1", "--port", str(port)]
words += ["--dtype", "float32", "--device", "cpu"]
program = Path(sys.executable).parent / "transformers"
with open("log", "w") as log:
    server = subprocess.Popen([program, *words], stdout=log, stderr=log)

try:
    for _ in range(600):
        try:
            common.ask(port, "/health")
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
        found = common.ask(port, "/v1/chat/completions", body)
        answers.append(found["choices"][0]["message"]["content"])
finally:
    server.terminate()
    server.wait()
common.report(version=f"transformers serve {transformers.__version__}", answer_texts=answers)
