"""Cog's training API: `train()` behind the real server in train mode."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import psutil
import pytest
from http_server import Server, answering

from alpaca import passport
from alpaca.folder import check_folder
from alpaca.serving import schema
from alpaca.training import checkpoint

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training") / "out"


@pytest.fixture(scope="module")
def server(out: Path) -> Iterator[Server]:
    given = out.parent / "given"
    given.mkdir()
    shutil.copy(ROOT / "data/seed_tasks.jsonl", given)
    (given / "link.jsonl").symlink_to("/etc/hostname")
    folders = {"ALPACA_OUT": str(out), "ALPACA_DATA_DIR": str(given), "WANDB_MODE": "offline"}
    started = Server(None, out.parent / "server.log", "--train", **folders)
    try:
        started.wait_until_ready()
        yield started
    finally:
        started.stop()


def inputs(tiny_model: Path, **changed: object) -> dict[str, object]:
    data = base64.b64encode((ROOT / "data/seed_tasks.jsonl").read_bytes()).decode()
    return {
        "data": f"data:application/jsonl;base64,{data}",
        "base": str(tiny_model),
        "batch_size": 4,
        "accumulation": 1,
        "learning_rate": 0.01,
        **changed,
    }


def ranks(out: Path) -> list[psutil.Process]:
    """Processes that train into `out`."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(out) in word for word in process.info["cmdline"] or []):
            found.append(process)
    return found


def test_a_canceled_training_ends_all_ranks_and_can_go_on(
    server: Server, tiny_model: Path, out: Path
) -> None:
    request = {"input": inputs(tiny_model, epochs=100)}
    asked = server.client.put("/trainings/one", json=request, headers={"Prefer": "respond-async"})
    assert asked.status_code == 202
    deadline = time.monotonic() + 120
    log = out / "log.jsonl"
    while not (log.exists() and log.read_text().count("loss") > 2):
        assert time.monotonic() < deadline, server.log.read_text()
        time.sleep(0.1)
    assert len(ranks(out)) >= 2
    assert server.client.post("/trainings/one/cancel").status_code == 200
    deadline = time.monotonic() + 6  # five, and one for the server to hear of it
    while ranks(out):  # the server names it in its environment only
        assert time.monotonic() < deadline
        time.sleep(0.1)
    done = json.loads(log.read_text().splitlines()[-1])["step"]
    assert [int(path.name.split("-")[1]) for path in checkpoint.found(out)] == [done]


def test_a_training_returns_the_model_as_a_tar_file(
    server: Server, tiny_model: Path, out: Path, tmp_path: Path
) -> None:
    answer = server.client.post("/trainings", json={"input": inputs(tiny_model, epochs=0.1)}).json()
    assert answer["status"] == "succeeded", answer
    assert "steps              3 on 2 rank(s)" in answer["logs"]
    content = base64.b64decode(answer["output"].partition(",")[2])
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        tar.extractall(tmp_path, filter="data")
    check_folder(tmp_path)
    assert passport.read(tmp_path) == passport.read(out)


def test_an_adapter_is_returned_alone_and_secrets_reach_the_job_only(
    server: Server, tiny_model: Path, out: Path, tmp_path: Path
) -> None:
    key = "0" * 36 + "cafe"
    given = inputs(tiny_model, epochs=0.02, lora_rank=4, wandb_api_key=key)
    del given["learning_rate"]
    answer = server.client.post("/trainings", json={"input": given}).json()
    assert answer["status"] == "succeeded", answer
    assert "--learning_rate 0.0002, the default with --lora_rank" in answer["logs"]
    content = base64.b64decode(answer["output"].partition(",")[2])
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        tar.extractall(tmp_path, filter="data")
    assert len(content) < 2_000_000
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "config.json").exists()
    assert next((out / "wandb").glob("offline-run-*"))  # the server's WANDB_MODE says offline
    told = json.dumps(answer) + server.log.read_text()
    assert key not in told
    assert "cafe" not in "".join(path.read_text() for path in out.glob("*.json*"))


@pytest.mark.parametrize(
    ("changed", "status"),
    [({"epochs": "many"}, 422), ({"batch_size": 0}, 422), ({"data": None}, 422)],
)
def test_bad_inputs_are_refused(
    server: Server, tiny_model: Path, changed: dict[str, object], status: int
) -> None:
    answer = server.client.post("/trainings", json={"input": inputs(tiny_model, **changed)})
    assert answer.status_code == status


@pytest.mark.parametrize(
    "named", ["/etc/hostname", "{}/../server.log", "{}/link.jsonl", "train.py"]
)
def test_a_client_cannot_have_files_of_the_server_read(
    named: str, server: Server, tiny_model: Path, out: Path
) -> None:
    path = named.format(out.parent / "given")
    answer = server.client.post("/trainings", json={"input": inputs(tiny_model, data=path)}).json()
    assert answer["status"] == "failed"
    assert "is a path of the server, which a client may not name" in answer["error"]


def test_files_of_the_folder_that_the_host_names_may_be_named(
    server: Server, tiny_model: Path, out: Path
) -> None:
    changed = {"data": str(out.parent / "given/seed_tasks.jsonl"), "epochs": 0.01}
    answer = server.client.post("/trainings", json={"input": inputs(tiny_model, **changed)}).json()
    assert answer["status"] == "succeeded", answer


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_cog_does_not_fetch_from_the_server_itself(
    host: str, server: Server, tiny_model: Path
) -> None:
    url = f"http://{host}:{server.port}/openapi.json"
    answer = server.client.post("/trainings", json={"input": inputs(tiny_model, data=url)}).json()
    assert answer["status"] == "failed"
    assert "is an address of the server itself" in answer["error"]


def test_local_addresses_can_be_allowed(tmp_path: Path) -> None:
    """And other connections of the process are none of the guard's business."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"[]")

    program = """
import sys, urllib.request
from pathlib import Path
import cog
from alpaca.training import uploads
folder = uploads.protect()
assert urllib.request.urlopen(sys.argv[1]).read() == b"[]"
found = cog.Path.validate(sys.argv[1]).convert()
assert uploads.check(found, folder, {}).read_bytes() == b"[]"
"""
    with answering(Handler) as url:
        for allowed in ("0", "1"):
            done = subprocess.run(
                [sys.executable, "-c", program, url],
                env={**os.environ, "ALPACA_LOCAL_URLS": allowed},
                capture_output=True,
                text=True,
                check=False,
            )
            assert (done.returncode == 0) == (allowed == "1"), done.stderr


def test_the_table_of_inputs_names_every_input_with_its_default_and_range() -> None:
    page = (ROOT / "docs/training.md").read_text().partition("## Over HTTP")[2]
    shown = re.findall(r"^\| `(\w+)` *\|([^|]*)\|([^|]*)\|", page, re.MULTILINE)
    assert len(shown) == 12
    fields = schema.find(ROOT, "train.py:train", "train").input_schema()["properties"]
    assert {name: (default.strip(" `"), reach.strip()) for name, default, reach in shown} == {
        name: (str(field.get("default", "")), reach(field)) for name, field in fields.items()
    }


def reach(field: dict[str, Any]) -> str:
    low, high = field.get("minimum"), field.get("maximum")
    return "" if low is None else f"{low}-{high or ''}"


def test_a_training_that_fails_says_why(server: Server, tiny_model: Path) -> None:
    answer = server.client.post(
        "/trainings", json={"input": inputs(tiny_model, base="no/such/folder")}
    ).json()
    assert answer["status"] == "failed"
    assert "There is no model folder no/such/folder" in answer["error"]
