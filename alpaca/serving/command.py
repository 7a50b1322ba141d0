"""`python -m alpaca serve`: Cog's own server on this machine, without the cog program.

Like `cog build` and the image, it writes the schema file and sets the environment; then it replaces
itself with the server, `python -m cog.server.http`.
"""

import argparse
import os
import sys
from pathlib import Path

import psutil

from alpaca.address import is_loopback
from alpaca.errors import UserError
from alpaca.folder import check_folder
from alpaca.serving import schema, settings, weights

ROOT = Path(__file__).resolve().parents[2]
RUN = "predict.py:Runner"
TRAIN = "train.py:train"
OPEN = (
    "serve: listening on {host}: whoever reaches port {port} can ask, cancel, name webhooks that "
    "the server calls, and stop it (POST /shutdown); there is no key. With --train they can also "
    "train and fetch URLs. Put a proxy that checks who asks in front of it."
)
IMAGE = {"TOKIO_WORKER_THREADS": "1", "GOMP_SPINCOUNT": "10000"}  # reasons: cog.yaml


def parser() -> argparse.ArgumentParser:
    """Flags of the verb."""
    made = argparse.ArgumentParser(
        description="Serve a model over Cog's HTTP API (POST /predictions).",
        epilog="Stop it with Ctrl-C. The schema is at /openapi.json, health at /health-check.",
    )
    made.add_argument(
        "--weights",
        metavar="FOLDER",
        help="model folder or tar file (default: ALPACA_WEIGHTS, else alpaca_out/)",
    )
    made.add_argument(
        "--base", metavar="FOLDER", help="model of an adapter in --weights (default: ALPACA_BASE)"
    )
    made.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="also serve a LoRA adapter of the model; repeatable (default: ALPACA_ADAPTERS)",
    )
    made.add_argument(
        "--adapter-folder",
        metavar="FOLDER",
        help="adapters in it may be loaded over /v1 (default: ALPACA_ADAPTER_FOLDER)",
    )
    made.add_argument(
        "--engine",
        metavar="ENGINE",
        help="own, vllm or servers' URLs (default: ALPACA_ENGINE, ALPACA_ENGINE_URL, else own)",
    )
    made.add_argument(
        "--train", action="store_true", help="serve the training API instead (POST /trainings)"
    )
    made.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    made.add_argument(
        "--port",
        type=int,
        default=int(os.environ.get("PORT", "5000")),
        help="port to listen on (default: PORT, else 5000)",
    )
    made.add_argument(
        "--web-port",
        type=int,
        default=os.environ.get("ALPACA_WEB_PORT") or "0",  # argparse converts and checks a string
        metavar="PORT",
        help="also serve OpenAI's /v1 and a page there (default: ALPACA_WEB_PORT; 0: not)",
    )
    made.add_argument(
        "--web-host",
        default=os.environ.get("ALPACA_WEB_HOST", "127.0.0.1"),
        metavar="HOST",
        help="its address; another than loopback needs ALPACA_API_KEY (%(default)s)",
    )
    return made


def run(arguments: argparse.Namespace) -> None:
    """Run the quick checks, then replace this process with the server; does not return."""
    environment = named({**IMAGE, **os.environ}, arguments.weights)
    environment |= adapted(arguments.base, arguments.adapter, arguments.adapter_folder)
    environment |= engine(arguments.engine)
    settings.has_other_engine(environment)  # refuses what is wrong
    if not environment.get("COG_WEIGHTS") and not arguments.train:
        check_folder(weights.locate(None, environment, ROOT).folder)
    check_port(arguments.port)
    if arguments.web_port and not arguments.train:
        check_port(arguments.web_port, "--web-port")
    entry = schema.find(ROOT, RUN, "run")
    schema.write(ROOT, entry, schema.find(ROOT, TRAIN, "train"))
    environment |= {
        "COG_PREDICT_TYPE_STUB": RUN,
        "COG_TRAIN_TYPE_STUB": TRAIN,
        "COG_MAX_CONCURRENCY": environment.get("COG_MAX_CONCURRENCY", str(entry.concurrency)),
        "PORT": str(arguments.port),
        "ALPACA_HOST": arguments.host,
        # The server starts its worker as `python`, which must be this interpreter.
        "ALPACA_WEB_PORT": str(arguments.web_port or ""),
        "ALPACA_WEB_HOST": arguments.web_host,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}",
    }
    if not is_loopback(arguments.host):
        print(OPEN.format(host=arguments.host, port=arguments.port), flush=True)
    os.chdir(ROOT)
    server = [sys.executable, "-m", "cog.server.http", "--host", arguments.host]
    mode = ["--x-mode", "train"] if arguments.train else []
    os.execve(sys.executable, [*server, *mode], environment)


def named(environment: dict[str, str], folder: str | None) -> dict[str, str]:
    """The server's environment; `--weights`, if given, replaces any other setting of weights."""
    if not folder:
        return environment
    others = {name: value for name, value in environment.items() if name != "COG_WEIGHTS"}
    return {**others, weights.VARIABLE: str(Path(folder).resolve())}


def engine(asked: str | None) -> dict[str, str]:
    """The variables that `--engine` sets."""
    if asked is None:
        return {}
    at = asked if "://" in asked else ""
    return {settings.ENGINE: "" if at else asked, settings.URL: at}


def adapted(base: str | None, adapters: list[str], allowed: str | None) -> dict[str, str]:
    """The variables that the flags for adapters set, with absolute paths."""
    folders = {weights.BASE: base, "ALPACA_ADAPTER_FOLDER": allowed}
    found = {name: str(Path(path).resolve()) for name, path in folders.items() if path}
    for given in adapters:
        name, _, path = given.partition("=")
        if not path or "," in given:
            raise UserError(f"--adapter is {given!r}.", "Write NAME=FOLDER, without commas.")
        listed = [found[weights.ADAPTERS]] if weights.ADAPTERS in found else []
        found[weights.ADAPTERS] = ",".join([*listed, f"{name}={Path(path).resolve()}"])
    return found


def check_port(port: int, flag: str = "--port") -> None:
    """Raise UserError if a process on this machine listens on `port`, which `flag` sets."""
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
            raise UserError(
                f"Port {port} is in use.",
                "Stop the process that listens there, or use another port: "
                f"./script/serve {flag} {port + 1}",
            )
