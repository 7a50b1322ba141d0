"""`fetch OWNER/NAME` against a server that answers as the Hub does."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_of_the_owner"


class Hub(BaseHTTPRequestHandler):
    """`a/model` of one folder, also as `a/gated`, which only TOKEN may read."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.asked.append(self.path)
        path = self.path.partition("?")[0].removeprefix("/api/models/").removeprefix("/")
        owner, name, *rest = path.split("/")
        if f"{owner}/{name}" not in ("a/model", "a/gated"):
            return self.refuse(404, "RepoNotFound")
        if name == "gated" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(403, "GatedRepo")
        files = sorted(path.name for path in self.folder.iterdir())
        if rest[:1] == ["resolve"]:
            return self.send((self.folder / rest[-1]).read_bytes())
        if rest[:1] == ["tree"]:
            return self.send(json.dumps([self.entry(file) for file in files]).encode())
        about = {"id": f"{owner}/{name}", "sha": COMMIT}
        about["siblings"] = [{"rfilename": file} for file in files]  # type: ignore[assignment]
        return self.send(json.dumps(about).encode())

    def entry(self, file: str) -> dict[str, object]:
        content = (self.folder / file).read_bytes()
        digest = hashlib.sha1(content).hexdigest()
        return {"type": "file", "path": file, "size": len(content), "oid": digest}

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub(tiny_model: Path) -> Iterator[str]:
    Hub.folder, Hub.asked = tiny_model, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def fetch(hub: str, name: str, into: Path, token: str = "") -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(into / "home")}
    environment.pop("HF_HUB_OFFLINE", None)
    return subprocess.run(
        [sys.executable, "-m", "alpaca", "fetch", name, f"--input_dir={into / 'in'}"],
        cwd=ROOT,
        env={**environment, "HF_TOKEN": token, "HF_HUB_DISABLE_TELEMETRY": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_model_of_the_hub_is_fetched_whole_and_once(
    hub: str, tiny_model: Path, tmp_path: Path
) -> None:
    done = fetch(hub, "a/model", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "in/model is ready: python -m alpaca convert --input_dir" in done.stdout
    got = {path.name: path.read_bytes() for path in (tmp_path / "in/model").iterdir()}
    assert got == {path.name: path.read_bytes() for path in tiny_model.iterdir()}
    before = len(Hub.asked)
    assert fetch(hub, "a/model", tmp_path).returncode == 0
    assert len(Hub.asked) == before


def test_a_gated_model_needs_a_token_and_a_wrong_name_is_told(hub: str, tmp_path: Path) -> None:
    refused = fetch(hub, "a/gated", tmp_path)
    assert refused.returncode == 2
    assert "a/gated is gated" in refused.stderr
    assert "HF_TOKEN" in refused.stderr
    assert not (tmp_path / "in/gated").exists()
    done = fetch(hub, "a/gated", tmp_path, TOKEN)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    nothing = fetch(hub, "a/nothing", tmp_path)
    assert (nothing.returncode, "The Hub shows no model a/nothing." in nothing.stderr) == (2, True)
    assert fetch(hub, "nothing", tmp_path).returncode == 2


def test_without_the_hub_there_is_a_clear_error(tmp_path: Path) -> None:
    done = fetch("http://127.0.0.1:9", "a/model", tmp_path)
    assert done.returncode == 2
    assert "a/model could not be downloaded" in done.stderr
