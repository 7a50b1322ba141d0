"""llama.cpp's server, on the GGUF file of our export and on that of its own converter."""

import os
import subprocess
import sys
import time
from pathlib import Path

import common


def main() -> None:
    """Print one line of JSON."""
    folder, task = common.task()
    home = Path(sys.executable).parent.parent
    (converter,) = home.glob("llama_cpp_python-*/vendor/llama.cpp/convert_hf_to_gguf.py")
    alpaca = [os.environ["ALPACA_PYTHON"], "-m", "alpaca", "export", folder, "--to", "gguf"]
    commands = {
        "our export": [*alpaca, "--type", "F32", "-o", "our export.gguf"],
        "its converter": [sys.executable, str(converter), folder, "--outtype", "f32",
                          "--outfile", "its converter.gguf"],
    }  # fmt: skip
    found: dict[str, object] = {}
    for way, command in commands.items():
        done = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": os.environ["ALPACA_ROOT"]},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            last = done.stderr.strip().splitlines()
            found[way] = {"error": " ".join(last[-2:])[:200]}
        else:
            found[way] = asked(home / "llama.cpp/bin/llama-server", f"{way}.gguf", task)
    common.report(ways=found)


def asked(server: Path, model: str, task: dict[str, list[str]]) -> dict[str, object]:
    """Ids, templates and answers of one file."""
    port = common.free_port()
    words = ["-m", model, "--host", "127.0.0.1", "--port", str(port), "-c", "2048", "-t", "2"]
    words += ["-ctk", "f32", "-ctv", "f32", "-fa", "off"]  # its cache is fp16 otherwise
    process = subprocess.Popen(
        [str(server), *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(300):
            try:
                common.ask(port, "/health")
                break
            except OSError:
                if process.poll() is not None:
                    return {"error": f"llama-server ended with {process.returncode}"}
                time.sleep(0.1)
        texts = [
            common.ask(port, "/tokenize", {"content": text, "add_special": True})["tokens"]
            for text in task["texts"]
        ]
        answers, templates = [], []
        for prompt in task["prompts"]:
            chat = common.ask(
                port, "/apply-template", {"messages": [{"role": "user", "content": prompt}]}
            )
            asked = {"content": chat["prompt"], "add_special": True, "parse_special": True}
            ids = common.ask(port, "/tokenize", asked)["tokens"]
            body = {"prompt": ids, "n_predict": task["new"], "temperature": 0}
            got = common.ask(
                port, "/completion", {**body, "return_tokens": True, "cache_prompt": False}
            )
            ended = got["stop_type"] == "eos"
            templates.append(ids)
            answers.append(got["tokens"][:-1] if ended else got["tokens"])
    finally:
        process.terminate()
        process.wait()
    return {"texts": texts, "templates": templates, "answers": answers}


if __name__ == "__main__":
    main()
