"""Runs the web application beside Cog's server: a thread with its own event loop.

Environment variables: ALPACA_WEB_PORT starts it. ALPACA_WEB_HOST is the address (127.0.0.1).
ALPACA_API_KEY must be given by whoever asks; another address than loopback needs it, or
ALPACA_WEB_OPEN=1. ALPACA_WEB_ORIGINS: sites whose scripts may ask, separated by commas.
ALPACA_WATCH: the output folder of a training run to show. ALPACA_COMPARE: a second model, a folder
or the URL of a server, with ALPACA_COMPARE_KEY and ALPACA_COMPARE_MODEL where it needs them.
ALPACA_ADAPTER_FOLDER: a folder whose adapters may be loaded and unloaded over HTTP.
"""

import asyncio
import json
import socket
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import uvicorn

from alpaca.address import is_loopback, is_url
from alpaca.errors import UserError
from alpaca.serving import loading, weights
from alpaca.serving.border import Engine
from alpaca.tokens import Codec
from alpaca.web import adapters, remote
from alpaca.web.app import Site, application
from alpaca.web.runs import Run
from alpaca.web.served import Served

PORT = "ALPACA_WEB_PORT"
EXAMPLES = 12
LONGEST_EXAMPLE = 300  # characters


class Web:
    """The running web server; it starts without a model, which `serve` adds."""

    def __init__(self, site: Site, host: str, port: int) -> None:
        """Listen, and answer from a thread.

        Raises:
            OSError: the address cannot be listened on.
        """
        self.site = site
        self._socket = listening(host, port)
        self.host, self.port = self._socket.getsockname()[:2]
        config = uvicorn.Config(
            application(site),
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=2,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name="web", daemon=True)
        self._thread.start()

    def serve(self, name: str, engine: Engine, codec: Codec) -> None:
        """Offer one more model, under a name that no other has."""
        taken = {one.name for one in self.site.listed}
        while name in taken:
            name += "-2"
        self.site.models.append(Served(name, engine, codec))

    def compare(self, other: str, environment: Mapping[str, str]) -> None:
        """Offer a second model, from a thread: one to load, or one of another server.

        What goes wrong is printed.
        """

        def load() -> None:
            try:
                if is_url(other):
                    self.site.compared = remote.find(other, environment)
                    return
                found = weights.of(Path(other).resolve(), "ALPACA_COMPARE", {}, Path.cwd())
                engine, codec = loading.load(found)
                self.serve(found.folder.name, engine, codec)
            except Exception as error:  # the first model is served without it
                print(f"web: ALPACA_COMPARE: {error}", file=sys.stderr, flush=True)

        threading.Thread(target=load, name="compare", daemon=True).start()

    def stop(self) -> None:
        """End the thread; open streams end with it."""
        self._server.should_exit = True
        self._thread.join(timeout=5)

    @property
    def url(self) -> str:
        """Where the page is."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/"

    def _run(self) -> None:
        try:
            asyncio.run(self._server.serve(sockets=[self._socket]))
        except BaseException as error:  # Cog's server goes on without it
            print(f"web: the server on port {self.port} has ended: {error!r}", file=sys.stderr)


def start(environment: Mapping[str, str], inputs: dict[str, Any], root: Path) -> Web | None:
    """Start the server that the environment asks for; None if it asks for none.

    A port that is taken, or a setting that is wrong, is printed and costs only this server: Cog's
    goes on. `inputs` is the JSON schema of the runner's inputs; examples come from `root`/data.
    """
    if not environment.get(PORT):
        return None
    try:
        host, port = address(environment)
        site = Site(
            key=environment.get("ALPACA_API_KEY", "").strip() or None,
            origins=[o.strip() for o in environment.get("ALPACA_WEB_ORIGINS", "").split(",") if o],
            inputs=inputs,
            examples=examples(root / "data" / "seed_tasks.jsonl"),
            run=Run(Path(watched)) if (watched := environment.get("ALPACA_WATCH")) else None,
            adapters=folder_of_adapters(environment),
        )
        web = Web(site, host, port)
    except (UserError, OSError) as error:
        print(f"web: not started: {error}", file=sys.stderr, flush=True)
        return None
    print(f"web: {web.url} (the page) and {web.url}v1 (OpenAI's API)", flush=True)
    return web


def folder_of_adapters(environment: Mapping[str, str]) -> Path | None:
    """The folder that the operator allows; UserError if it is none."""
    named = environment.get(adapters.VARIABLE)
    if not named:
        return None
    if not Path(named).is_dir():
        raise UserError(f"{adapters.VARIABLE}: {named} is no folder.", "Name one that is there.")
    return Path(named).resolve()


def address(environment: Mapping[str, str]) -> tuple[str, int]:
    """Host and port; UserError if the port is no port, or the host is open without a key."""
    text = environment[PORT]
    if not text.isdecimal() or not 0 <= int(text) <= 65535:
        raise UserError(f"{PORT} is {text!r}.", "Set it to a port, for example 8000.")
    host = environment.get("ALPACA_WEB_HOST") or "127.0.0.1"
    key = environment.get("ALPACA_API_KEY", "").strip()
    allowed = bool(key) or environment.get("ALPACA_WEB_OPEN") == "1"
    if not allowed and not is_loopback(host):
        raise UserError(
            f"ALPACA_WEB_HOST is {host}, where others can reach it, and there is no key.",
            "Set ALPACA_API_KEY to a secret; or ALPACA_WEB_OPEN=1 if anyone may ask.",
        )
    return host, int(text)


def listening(host: str, port: int) -> socket.socket:
    """A listening socket, so that a port that is taken is known before anything starts."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        made.listen(1024)
    except BaseException:
        made.close()
        raise
    return made


def examples(path: Path) -> list[dict[str, str]]:
    """Short seed tasks, one of each kind first."""
    if not path.is_file():
        return []
    tasks = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    short = [t for t in tasks if len(t["instruction"] + t["input"]) <= LONGEST_EXAMPLE]
    first = {task["kind"]: task for task in reversed(short)}
    return [
        {"instruction": task["instruction"], "input": task["input"]} for task in first.values()
    ][:EXAMPLES]
