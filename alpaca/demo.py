"""`python -m alpaca demo`: all stages, from download to answers, on any machine.

Fetches a small but real base model, converts it, fine-tunes it on this project's seed tasks,
serves the result with Cog's server, sends it three prompts over HTTP with curl, and scores it
beside its base. Each stage runs the command that a user would type, and is skipped where its result
exists. All results are in demo/ and weights/smollm2-135m/: the folders of the user's own model are
not touched.
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alpaca import atomic, passport
from alpaca.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
BASE = Path("weights/smollm2-135m")
FOLDER = Path("demo")
OUT = FOLDER / "alpaca_out"
DATA = Path("data/seed_tasks.jsonl")
# One epoch over 85% of the seed tasks: the held-out loss falls, and 2 cores need only minutes.
RECIPE = {
    "--model_name_or_path": BASE,
    "--data_path": DATA,
    "--output_dir": OUT,
    "--eval_fraction": 0.15,
    "--num_train_epochs": 1,
    "--per_device_train_batch_size": 4,
    "--gradient_accumulation_steps": 2,
    "--learning_rate": 1e-4,
    "--bf16": True,
    "--save_strategy": "no",  # a checkpoint is 1.6 GB, and the whole run takes minutes
}
PROMPTS = (
    "tell me something about รามาเกียรติ์",
    "Why is the sky blue?",
    "Give me three tips for sleeping better.",
)
ANSWERS = {"--limit": 48, "--max_new_tokens": 64}  # of each model, to the evaluation tasks
LIMITS = {"total_tokens": 160, "temperature": 0.5, "repetition_penalty": 1.1}
START_SECONDS = 120


def parser() -> argparse.ArgumentParser:
    """Flags of the verb."""
    made = argparse.ArgumentParser(
        description="Fetch, convert, train, serve, ask, score: the whole pipeline on any machine."
    )
    made.add_argument(
        "--lora_rank", type=int, default=0, help="train an adapter of this rank, 16 for example"
    )
    made.add_argument("--keep", action="store_true", help="leave the server running at the end")
    made.add_argument("--port", type=int, default=5000, help="port to serve on (%(default)s)")
    made.add_argument(
        "--web-port", type=int, default=8000, help="of the page, with --keep (%(default)s)"
    )
    return made


def run(arguments: argparse.Namespace) -> None:
    """Run all stages; the results are kept, so a second run is short.

    Raises:
        UserError: a stage failed; its own message has been printed before.
    """
    if shutil.which("curl") is None:
        raise UserError(
            "The demo asks its questions with curl, which is not installed.",
            "On Debian and Ubuntu: apt-get install curl",
        )
    web_port = arguments.web_port if arguments.keep else None
    demo = Demo(arguments.port, web_port, arguments.lora_rank)
    demo.stage("fetch", "A base model", demo.fetch)
    demo.stage("convert", "To a Hugging Face folder", demo.convert)
    demo.stage("train", "Fine-tuning on our seed tasks", demo.train)
    demo.stage("serve", "Serving the trained model with Cog, and asking it", demo.serve)
    demo.stage("score", "Is it better? Base and trained model on the same tasks", demo.score)
    demo.finish()


class Demo:
    """The stages, and the results that are written to `demo/alpaca_out/demo.json`."""

    def __init__(self, port: int, web_port: int | None, rank: int = 0) -> None:
        """With a `web_port` the server is left running, and its page is there.

        `rank`: of the adapter that is trained instead of all weights; 0: none.
        """
        self.recipe, self.out = RECIPE, OUT
        if rank:
            self.out = OUT.with_name(f"adapter-{rank}")
            own_rate = {name: v for name, v in RECIPE.items() if name != "--learning_rate"}
            self.recipe = {**own_rate, "--output_dir": self.out, "--lora_rank": rank}
        self.port = port
        self.web_port = web_port
        self.keep = web_port is not None
        self.seconds: dict[str, float] = {}
        self.answers: list[dict[str, str]] = []

    def stage(self, name: str, headline: str, body: Callable[[], None]) -> None:
        """Run one stage under its headline, and time it."""
        print(f"\n=== {len(self.seconds) + 1}. {headline}\n", flush=True)
        started = time.monotonic()
        body()
        self.seconds[name] = round(time.monotonic() - started, 1)

    def fetch(self) -> None:
        """Download the default model into demo/."""
        command("fetch", "--input_dir", str(FOLDER))

    def convert(self) -> None:
        """Write weights/smollm2-135m/ unless it is complete; weights/tokenizer/ is not touched."""
        if passport.read(ROOT / BASE) is not None:
            print(f"{BASE} already exists")
            return
        words = ["--input_dir", str(FOLDER), "--model_size", BASE.name, "--no-tokenizer"]
        command("convert", *words)

    def train(self) -> None:
        """Fine-tune; train.py itself skips a run that is already complete."""
        flags = [str(word) for pair in self.recipe.items() for word in pair]
        execute([sys.executable, "train.py", *flags])

    def serve(self) -> None:
        """Start the server, send the prompts, and stop the server unless `keep` is set."""
        with self.server():
            for prompt in PROMPTS:
                self.ask(prompt)

    def score(self) -> None:
        """Answer the evaluation tasks with both models, and print a table."""
        limits = [str(word) for pair in ANSWERS.items() for word in pair]
        given = []
        for folder in (BASE, self.out):
            # a model that was trained again is answered with again
            mark = passport.fingerprint(ROOT / folder)[:8]
            given.append(str(FOLDER / "answers" / f"{folder.name}-{mark}.json"))
            command("answer", "--model", str(folder), *limits, "-o", given[-1])
        command("score", *given, "--html", str(FOLDER / "score.html"))

    @contextmanager
    def server(self) -> Iterator[None]:
        """Run the server; its output goes to .cache/demo-server.log."""
        log = ROOT / ".cache/demo-server.log"
        log.parent.mkdir(exist_ok=True)
        words = [sys.executable, "-m", "alpaca", "serve", "--weights", str(self.out)]
        ports = ["--port", str(self.port)]
        if self.web_port is not None:
            ports += ["--web-port", str(self.web_port)]
        words += ports
        print(f"$ ./script/serve --weights {self.out} {' '.join(ports)}", flush=True)
        with open(log, "w") as output:
            # In a new session, so that Ctrl-C reaches only us, and we stop the server properly.
            process = subprocess.Popen(
                words, cwd=ROOT, stdout=output, stderr=output, start_new_session=True
            )
        kept = False
        try:
            self.wait(process, log)
            yield
            kept = self.keep
        finally:
            if not kept:
                stop(process)
        if kept:
            print(f"\nThe server keeps running; stop it with: kill {process.pid}")

    def wait(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        """Wait until the health check reports READY."""
        url = f"http://127.0.0.1:{self.port}/health-check"
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise UserError(f"The server did not start:\n{log.read_text()[-2000:]}")
            answer = subprocess.run(["curl", "-s", url], capture_output=True, text=True)
            status = json.loads(answer.stdout)["status"] if answer.stdout else "STARTING"
            if status == "READY":
                return
            if status not in ("STARTING", "BUSY"):
                raise UserError(f"The server says {status}:\n{log.read_text()[-2000:]}")
            time.sleep(0.5)
        raise UserError(f"The server was not ready within {START_SECONDS} s.", f"See {log}.")

    def ask(self, prompt: str) -> None:
        """Send one prediction with curl; print the command line and the answer."""
        body = json.dumps({"input": {"prompt": prompt, **LIMITS}}, ensure_ascii=False)
        words = ["curl", "-s", f"http://127.0.0.1:{self.port}/predictions"]
        words += ["-H", "Content-Type: application/json", "-d", body]
        print(f"\n$ {self.curl_line(body)}", flush=True)
        reply = subprocess.run(words, capture_output=True, text=True)
        answer: dict[str, Any] = json.loads(reply.stdout) if reply.stdout else {}
        if answer.get("status") != "succeeded":
            raise UserError(f"The server answered: {reply.stdout or reply.stderr}")
        print(answer["output"][0].strip(), flush=True)
        self.answers.append({"prompt": prompt, "answer": answer["output"][0]})

    def curl_line(self, body: str) -> str:
        """The request as a line to paste into a shell."""
        quoted = body.replace("'", "'\\''")
        return (
            f"curl -s http://127.0.0.1:{self.port}/predictions "
            f"-H 'Content-Type: application/json' -d '{quoted}'"
        )

    def finish(self) -> None:
        """Write demo.json and print a summary."""
        trained = passport.read(ROOT / self.out)
        assert trained is not None
        # The loss of the exported folder, which is served, not of the trainer's own weights.
        before, after = (trained["result"][f"eval_loss_{when}"] for when in ("before", "exported"))
        facts = {
            "seconds": self.seconds,
            "loss_before": before,
            "loss_after": after,
            "answers": self.answers,
        }
        text = json.dumps(facts, indent=1, ensure_ascii=False)
        atomic.write_text(ROOT / self.out / "demo.json", text + "\n")
        spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items())
        print(f"\n=== Done: held-out loss {before:.3f} before, {after:.3f} after ({spent})")
        print(f"The model is in {self.out}/, the figures are in {self.out}/demo.json.")
        if self.keep:
            body = json.dumps({"input": {"prompt": "Name a colour.", **LIMITS}})
            print(f"Ask it: {self.curl_line(body)}")
            print(f"or in a browser: http://127.0.0.1:{self.web_port}/")
        else:
            print(f"Serve it: ./script/serve --weights {self.out}")


def command(*words: str) -> None:
    """Run one verb of `python -m alpaca`."""
    execute([sys.executable, "-m", "alpaca", *words])


def execute(words: list[str]) -> None:
    """Print a command and run it; raises UserError when it fails."""
    print("$", "python", *words[1:], flush=True)
    process = subprocess.Popen(words, cwd=ROOT)
    # Ctrl-C also reaches the command, which then saves its work: wait until it has.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        code = process.wait()
    finally:
        signal.signal(signal.SIGINT, handler)
    if code in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    if code:
        raise UserError(
            "The demo stopped; the reason is above.", "Fix it, then run the demo again."
        )


def stop(process: "subprocess.Popen[bytes]") -> None:
    """Stop a server with SIGTERM, or with SIGKILL if it is still running after 20 seconds."""
    process.terminate()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
