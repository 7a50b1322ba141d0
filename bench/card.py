"""Run every line of a trained folder's model card, as somebody who downloads it would.

Each program runs in the environment of bench/engines.py; servers are asked for a chat completion.
A line fails if it exits with an error, or if the answer is empty or repeats the prompt. Ollama's
own command is left out where it is not installed.

    python bench/card.py FOLDER

The last line is JSON: the program, and its answer or what went wrong.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from engines import ENGINES, ROOT, environment

ENVIRONMENTS = {"vLLM": "vLLM", "mlx-lm": "mlx-lm", "llama.cpp": "llama.cpp"}
SERVERS = {"vLLM": 8000, "llama.cpp, with alpaca-cog's export": 8080, "alpaca-cog": 5000}
ASK = {
    "messages": [{"role": "user", "content": "Name three colors."}],
    "max_tokens": 64,
    "temperature": 0,
}


def main() -> None:
    """Run the parts of the card's last section one by one."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1]).resolve()
    card = (folder / "README.md").read_text(encoding="utf-8").partition("## Run it")[2]
    report = {}
    with tempfile.TemporaryDirectory(prefix="bench-card-") as name:
        os.symlink(folder, Path(name, folder.name))
        for language, block in re.findall(r"```(\w+)\n(.*?)```", card, re.DOTALL):
            for part in re.split(r"^# ", block, flags=re.MULTILINE)[1:]:
                program, _, lines = part.partition("\n")
                try:
                    found = run(program, language, lines, Path(name), folder.name)
                except (OSError, RuntimeError) as error:
                    found = f"failed: {error}"
                report[program] = found
                print(f"{program}: {found!r}", file=sys.stderr)
    print(json.dumps(report))


def run(program: str, language: str, lines: str, here: Path, name: str) -> str:
    """What one program answers."""
    if program == "Ollama" and not shutil.which("ollama"):
        lines = lines.splitlines()[0] + f" && cat {name}-ollama/Modelfile"
    paths = [Path(sys.executable).parent]
    for engine in ENGINES:
        if engine.name == ENVIRONMENTS.get(program.partition(",")[0]):
            home = environment(engine).parent
            own = program.startswith("llama.cpp")  # its line also calls our own Python
            paths = [*paths, home.parent / "llama.cpp" / "bin"] if own else [home]
    settings = {
        **os.environ,
        "PATH": ":".join([*map(str, paths), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    command = ["python", "-c", lines] if language == "python" else ["bash", "-euc", lines]
    if program not in SERVERS:
        done = subprocess.run(command, cwd=here, env=settings, capture_output=True, text=True)
        return done.stdout if done.returncode == 0 else f"failed: {done.stderr[-300:]}"
    if program == "vLLM":  # vllm-cpu 0.32's command asks for the metadata of a package `vllm`
        serve = "python -m vllm.entrypoints.openai.api_server --model"
        command = ["bash", "-euc", lines.replace("vllm serve", serve)]
    if program == "alpaca-cog":  # the server, and then the line that asks it
        start, _, question = lines.partition("\n")
        command = ["bash", "-euc", start]
    server = subprocess.Popen(
        command,
        cwd=here,
        env=settings,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait(SERVERS[program], server)
        if program == "alpaca-cog":
            asked = subprocess.run(["bash", "-euc", question], capture_output=True, text=True)
            return str(json.loads(asked.stdout)["output"])
        url = f"http://127.0.0.1:{SERVERS[program]}/v1/chat/completions"
        body = json.dumps({"model": name, **ASK}).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as answer:
            text = json.load(answer)["choices"][0]["message"]["content"]
        return text if text and "### Response" not in text else f"failed: {text!r}"
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def wait(port: int, server: "subprocess.Popen[bytes]") -> None:
    """Until the server answers that it is ready."""
    path = "/health-check" if port == 5000 else "/health"
    for _ in range(600):
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with {server.returncode}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as answer:
                if port != 5000 or json.load(answer)["status"] == "READY":
                    return
        except OSError:
            pass
        time.sleep(0.5)
    raise TimeoutError(f"no answer on port {port} within 300 s")


if __name__ == "__main__":
    main()
