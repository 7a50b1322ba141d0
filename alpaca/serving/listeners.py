"""Asks Cog's server whether anyone still reads a stream.

Cog 0.23 tells its worker once when the client of a stream has gone. If that message arrives before
the prediction has begun in the worker, it is lost (coglet, worker_bridge.rs: a cancel of an idle
slot), and the stream runs to its end for nobody. The server checks again whether a stream has
readers whenever a reader leaves it. So a stream that has begun is read by us for a moment: without
other readers, the server then cancels it again.
"""

import http.client
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from urllib.parse import quote

VARIABLE = "_coglet_prediction_id"  # the context variable by which Cog routes a prediction's log
ANYWHERE = ("", "0.0.0.0", "::")  # a server that listens on all addresses is asked on loopback
HEADERS = {"Accept": "text/event-stream", "Content-Type": "application/json"}
SECONDS = 10.0  # the longest a check may take

_pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="listeners")


def prediction_id() -> str | None:
    """The id of the prediction that the calling coroutine runs for; None outside of Cog."""
    found = (value for variable, value in copy_context().items() if variable.name == VARIABLE)
    return next(found, None)


def check(prediction: str | None, environment: Mapping[str, str] = os.environ) -> None:
    """Let the server cancel the stream `prediction` if nobody reads it; returns at once."""
    if prediction is not None:
        host = environment.get("ALPACA_HOST", "")
        port = environment.get("PORT", "5000")
        _pool.submit(_read_briefly, "127.0.0.1" if host in ANYWHERE else host, port, prediction)


def _read_briefly(host: str, port: str, prediction: str) -> None:
    """Become a reader of a running stream, and leave it.

    The request lacks a prompt: should the stream have ended, the server refuses to begin another.
    """
    connection = http.client.HTTPConnection(host, int(port), timeout=SECONDS)
    try:
        path = f"/predictions/{quote(prediction, safe='')}"
        connection.request("PUT", path, body='{"input": {}}', headers=HEADERS)
        connection.getresponse()
    except (OSError, http.client.HTTPException):
        pass  # the server is shutting down, or too busy; the time limit remains
    finally:
        connection.close()
