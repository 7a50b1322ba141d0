"""README.md and docs/serving.md: every block that is shown is run, against a real server."""

import json
import os
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler
from pathlib import Path
from queue import Queue
from typing import Any

import httpx
import pytest
from http_server import ROOT, Server, answering, free_port, receiver, serving

from alpaca.serving import schema

PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
WEB = (ROOT / "docs" / "web.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = re.compile(r"^```(sh|python)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
BLOCKS = [
    block
    for page in (README, PAGE, WEB)
    for block in FENCED.findall(page)
    if "-m alpaca answer" not in block[1]  # test_evaluation_docs.py runs that one
]


def undated(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Equal content makes an equal tar file, which the server unpacks into the same folder."""
    entry.mtime = 0
    return entry


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose weights Cog hands over as the URL of a tar file."""
    folder = tmp_path_factory.mktemp("docs")
    with tarfile.open(folder / "weights.tar", "w") as archive:
        archive.add(tiny_model, "model", filter=undated)

    class Files(SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, *_: object) -> None:
            pass

    with (
        answering(Files) as url,
        serving(
            None, folder, COG_WEIGHTS=f"{url}/weights.tar", ALPACA_WEB_PORT=str(free_port())
        ) as running,
    ):
        yield running


@pytest.fixture
def replicate_api(server: Server) -> Iterator[str]:
    """What Replicate does with a call of its client, as far as the client sees."""

    class Api(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            answer = server.client.post("/predictions", json={"input": asked["input"]}).json()
            stamp = "2026-11-23T00:00:00Z"
            prediction = {
                "id": answer["id"],
                "status": answer["status"],
                "output": answer["output"],
                "model": "you/alpaca",
                "version": "0",
                "input": asked["input"],
                "urls": {},
                "source": "api",
                "created_at": stamp,
                "completed_at": stamp,
            }
            body = json.dumps(prediction).encode()
            self.send_response(201)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with answering(Api) as url:
        yield url


@pytest.mark.parametrize(
    ("kind", "block"), BLOCKS, ids=[f"{k}-{i}" for i, (k, _) in enumerate(BLOCKS)]
)
def test_each_block_runs(server: Server, replicate_api: str, kind: str, block: str) -> None:
    block = block.replace("http://127.0.0.1:5000", server.url)
    web = re.search(r"(http://127\.0\.0\.1:\d+)/ \(the page\)", server.log.read_text())
    assert web is not None
    block = block.replace("http://127.0.0.1:8000", web[1])
    [model] = httpx.get(f"{web[1]}/v1/models").json()["data"]
    block = block.replace('"alpaca_out"', json.dumps(model["id"]))
    if kind == "sh" and "respond-async" in block:
        started_and_cancelled(server, block)
        return
    done = run(kind, block, REPLICATE_API_TOKEN="x", REPLICATE_BASE_URL=replicate_api)
    if kind == "python":
        assert done.strip()
    elif "event-stream" in block:
        assert done.count("event: output") > 3
        assert '"status":"succeeded"' in done
    else:
        answer = json.loads(done)
        assert answer["status"] == "succeeded", answer
        assert len(answer["output"]) == (3 if '"n": 3' in block else 1)


def run(kind: str, block: str, **environment: str) -> str:
    command = ["bash", "-euo", "pipefail", "-c"] if kind == "sh" else [sys.executable, "-c"]
    done = subprocess.run(
        [*command, block],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def started_and_cancelled(server: Server, block: str) -> None:
    """The prediction that the block names and cancels is told of as cancelled."""
    told: Queue[dict[str, Any]] = Queue()
    with receiver(told.put) as url:
        hook = f'"webhook": "{url}", "webhook_events_filter": ["completed"]'
        done = run("sh", block.replace('{"input": ', f'{{{hook}, "input": '))
        assert '"status":"starting"' in done
        # The page says that Cog may drop a cancel which comes so soon, and to repeat it.
        while server.client.post("/predictions/mine/cancel").status_code == 200:
            time.sleep(0.1)
        assert told.get(timeout=30)["status"] == "canceled"


def test_blocks_are_there() -> None:
    doors = ("curl -s ", "curl -sN", "httpx.post", "replicate.run")
    assert "chat.completions.create" in " ".join(block for _, block in FENCED.findall(WEB))
    more_here = ("chat.completions.create",)
    for page, more in ((README, more_here), (PAGE, ("httpx.stream", "respond-async"))):
        text = " ".join(block for _, block in FENCED.findall(page))
        for door in (*doors, *more):
            assert door in text


def test_the_tables_name_every_input_and_nothing_else() -> None:
    section = PAGE.partition("## Inputs")[2].partition("\n## ")[0]
    shown = {
        name: (default.strip(), reach.strip())
        for name, default, reach in re.findall(r"^\| `(\w+)` *\|([^|]*)\|([^|]*)\|", section, re.M)
    }
    inputs = schema.find(ROOT, "predict.py:Runner", "run").input_schema()["properties"]
    assert set(shown) == set(inputs)
    for name, field in inputs.items():
        default, reach = shown[name]
        low, high = field.get("minimum", ""), field.get("maximum", "")
        assert reach == (f"{low}-{high}" if low != "" else "")
        if field.get("default") not in (None, "", []):
            assert default == json.dumps(field["default"])
