"""HTTP requests of a rehearsal to the server that it started on this machine.

Standard library only: the image has no HTTP client, and curl may be missing.
"""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

SECONDS = 60.0  # time-out of an answer: a tiny model on a busy machine


def post(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """Send JSON and return the JSON of the response ({} if it has none)."""
    with urllib.request.urlopen(_request(url, body), timeout=SECONDS) as answer:
        text = answer.read().decode()
    found: dict[str, Any] = json.loads(text) if text.strip() else {}
    return found


def stream(url: str, body: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Send JSON and yield server-sent events as they arrive: (name, data)."""
    request = _request(url, body)
    request.add_header("Accept", "text/event-stream")
    name = ""
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        for raw in answer:
            line = raw.decode().rstrip("\n")
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                yield name, json.loads(line.removeprefix("data: "))


def health(url: str) -> str:
    """The status that the health check reports; ABSENT while nothing listens."""
    try:
        with urllib.request.urlopen(f"{url}/health-check", timeout=5) as answer:
            return str(json.loads(answer.read())["status"])
    except (urllib.error.URLError, OSError, ValueError):
        return "ABSENT"


def wait_until_ready(url: str, seconds: float) -> str:
    """The server's status when it has started or failed, or after `seconds`."""
    deadline = time.monotonic() + seconds
    while (status := health(url)) in ("ABSENT", "STARTING") and time.monotonic() < deadline:
        time.sleep(0.2)
    return status


def _request(url: str, body: dict[str, Any] | None) -> urllib.request.Request:
    request = urllib.request.Request(url, data=json.dumps(body or {}).encode(), method="POST")
    request.add_header("Content-Type", "application/json")
    return request
