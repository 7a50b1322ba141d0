#!/usr/bin/env bash
# cog 0.23.1: a run() that yields three strings, one a second, asked for as server-sent events. A good
# guess: a plain generator and an async generator stream alike, each string when it is yielded. Seen:
# the plain one does, but what the async one yields comes all at once, when it has ended.
# Prints: seconds until each output, plain 0 1 2, async 3 3 3. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check cog==0.23.1 coglet==0.23.1
mkdir "$work/.cog"
cat > "$work/plain.py" <<'PY'
import time
from collections.abc import Iterator

import cog


class Runner(cog.BaseRunner):
    @cog.streaming
    def run(self) -> Iterator[str]:
        for word in ("one", "two", "three"):
            yield word
            time.sleep(1)
PY
cat > "$work/async.py" <<'PY'
import asyncio
from collections.abc import AsyncIterator

import cog


class Runner(cog.BaseRunner):
    @cog.streaming
    async def run(self) -> AsyncIterator[str]:
        for word in ("one", "two", "three"):
            yield word
            await asyncio.sleep(1)
PY
# What `cog build` writes into an image, shortened; it is the same for both.
cat > "$work/.cog/openapi_schema.json" <<'JSON'
{
  "openapi": "3.0.2",
  "info": {"title": "Cog", "version": "0.23.1"},
  "paths": {"/predictions": {"post": {"x-cog-streaming": true}}},
  "components": {"schemas": {
    "Input": {"title": "Input", "type": "object", "properties": {}},
    "Output": {
      "title": "Output", "type": "array", "items": {"type": "string"}, "x-cog-array-type": "iterator"
    }
  }}
}
JSON
cat > "$work/seen.py" <<'PY'
import os
import socket
import subprocess
import sys
import time
from http.client import HTTPConnection


def seconds(kind):
    """When each output of `kind`.py came, in seconds after the request."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given = {"COG_PREDICT_TYPE_STUB": f"{kind}.py:Runner", "PORT": str(port)}
    server = subprocess.Popen(
        [sys.executable, "-m", "cog.server.http", "--host", "127.0.0.1"],
        env={**os.environ, **given}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    try:
        wait(server, port)
        client = HTTPConnection("127.0.0.1", port, timeout=30)
        headers = {"content-type": "application/json", "accept": "text/event-stream"}
        start = time.monotonic()
        client.request("POST", "/predictions", '{"input": {}}', headers)
        lines = iter(client.getresponse().readline, b"")
        return [time.monotonic() - start for line in lines if line == b"event: output\n"]
    finally:
        server.terminate()
        server.wait(30)


def wait(server, port):
    for _ in range(600):
        time.sleep(0.1)
        assert server.poll() is None, "the server ended"
        try:
            client = HTTPConnection("127.0.0.1", port, timeout=30)
            client.request("GET", "/health-check")
            if b'"READY"' in client.getresponse().read():
                return
        except OSError:
            pass
    raise AssertionError("the server did not start")


plain, late = seconds("plain"), seconds("async")
for kind, times in (("plain", plain), ("async", late)):
    print(f"cog 0.23.1: {kind} generator's outputs after", *(f"{t:.2f}" for t in times), "seconds")
assert len(plain) == len(late) == 3
assert plain[0] < 1 and plain[2] - plain[0] > 1.5, "a plain generator no longer streams"
assert late[0] > 2.5, "an async generator streams"
PY
cd "$work"
PATH="$work/venv/bin:$PATH" python seen.py # Cog starts its worker as `python`
