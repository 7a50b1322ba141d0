"""The local server of `compare`: its page, the pair to judge now, votes, undo, the result.

It is the truth: a vote names its pair, and one for another pair than the current is refused (409).
Before the result is asked for, no byte that it sends depends on which answer is whose, but the
answers themselves. Requests are answered in the main thread, one after the other.
"""

import asyncio
import json
import signal
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from alpaca.errors import UserError
from alpaca.evaluation.ballot import CHOICES, Ballot

PAGE = Path(__file__).resolve().parent / "page"
HOST = "127.0.0.1"
LARGEST_BODY = 64 << 10  # bytes: a note is a few lines
LINGER = 15  # seconds in which the last vote can be undone, or the result be shown
LAST = 1.0  # seconds from the last answer to the end
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
Handler = Callable[[dict[str, Any]], None]


class RefusedError(Exception):
    """A request that is not done: a status and a sentence for the page."""

    def __init__(self, status: int, why: str) -> None:
        """`why` is shown to the judge."""
        super().__init__(why)
        self.status, self.why = status, why


class Booth:
    """One judge's session, until all pairs are judged or Ctrl-C.

    opened: makes the ballot of a judge's name. result: what the page shows when it is asked for.
    """

    def __init__(
        self,
        opened: Callable[[str], Ballot],
        result: Callable[[], dict[str, Any]],
        judge: str | None = None,
        linger: float = LINGER,
    ) -> None:
        """UserError if the judge's name cannot be one; without a judge, the page asks."""
        self._open, self._result, self._linger = opened, result, linger
        self.ballot = opened(judge) if judge is not None else None
        self._revealed = False
        self._timer: asyncio.TimerHandle | None = None
        self._server: uvicorn.Server | None = None

    def serve(self, listener: socket.socket) -> bool:
        """Answer until the end; returns whether it came by itself, not by Ctrl-C or SIGTERM."""
        app = self.application()
        config = uvicorn.Config(
            app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=2
        )
        self._server = uvicorn.Server(config)
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            asyncio.run(self._server.serve(sockets=[listener]))
        except KeyboardInterrupt:
            return False
        finally:
            signal.signal(signal.SIGTERM, before)
            listener.close()
        return True

    def application(self) -> Starlette:
        """The ASGI application."""
        posts: dict[str, Handler] = {
            "/judge": self.judge,
            "/vote": self.vote,
            "/undo": self.undo,
            "/result": self.reveal,
            "/finish": self.finish,
        }
        return Starlette(
            routes=[
                Route("/", file),
                Route("/page/{name}", file),
                Route("/state", self.asked),
                *(Route(path, self._posted(do), methods=["POST"]) for path, do in posts.items()),
            ],
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])],
            exception_handlers={ClientDisconnect: gone},
        )

    async def asked(self, _: Request) -> Response:
        """GET /state: what the page shows now."""
        return self._answer(200)

    def judge(self, body: dict[str, Any]) -> None:
        """POST /judge: the name of who judges, once."""
        if self.ballot is not None:
            raise RefusedError(409, "Somebody else has started: this is their ballot.")
        try:
            self.ballot = self._open(text(body, "name"))
        except UserError as error:
            raise RefusedError(400, error.happened) from None

    def vote(self, body: dict[str, Any]) -> None:
        """POST /vote: which side is better, and a note."""
        choice, note = body.get("choice"), text(body, "note")
        if choice not in CHOICES:
            raise RefusedError(400, "A vote is left, right or tie.")
        ballot = self._current(body)
        if ballot.current is None:
            raise RefusedError(409, "All pairs are judged.")
        ballot.vote(choice, note.strip())

    def undo(self, body: dict[str, Any]) -> None:
        """POST /undo: delete the last vote."""
        self._current(body).undo()

    def reveal(self, _: dict[str, Any]) -> None:
        """POST /result: tell whose answers they were; no vote can be changed from then on."""
        if self.ballot is None or self.ballot.current is not None:
            raise RefusedError(409, "The result is told when all pairs are judged.")
        self._revealed = True

    def finish(self, body: dict[str, Any]) -> None:
        """POST /finish: end the program now, if all pairs are judged."""
        if self._current(body).current is not None:
            raise RefusedError(409, "There are pairs to judge.")
        self._end_in(LAST)

    def _current(self, body: dict[str, Any]) -> Ballot:
        """The ballot, if the page that posts shows its state."""
        if self.ballot is None or body.get("pair") != self.ballot.ticket or self._revealed:
            raise RefusedError(
                409, "Nothing was changed: another tab went on to what is shown now."
            )
        return self.ballot

    def _posted(self, do: Handler) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        async def handle(request: Request) -> Response:
            try:
                do(await body_of(request))
            except RefusedError as refused:
                return self._answer(refused.status, refused.why)
            except OSError as error:
                return self._answer(500, f"Not saved: {error.strerror or error}.")
            return self._answer(200)

        return handle

    def _answer(self, status: int, why: str = "") -> Response:
        """The state, which every answer holds, so that the page never asks twice."""
        state = self.state()
        if self._revealed:
            state["result"] = self._result()
        if state["done"]:
            self._end_in(LAST if self._revealed else self._linger)
        elif self._timer:
            self._timer.cancel()
        return JSONResponse({"error": why, **state}, status_code=status, headers=HEADERS)

    def state(self) -> dict[str, Any]:
        """What a page may know."""
        ballot = self.ballot
        if ballot is None:
            return {"judge": None, "done": False}
        told = {
            "judge": ballot.judge,
            "voted": ballot.done,
            "total": ballot.total,
            "identical": ballot.identical,
            "pair": ballot.ticket,
            "note": ballot.draft,
            "done": ballot.current is None,
            "seconds": self._linger,
        }
        if ballot.current is not None:
            left, right = ballot.sides
            pair = ballot.current
            told |= {"instruction": pair.instruction, "input": pair.input}
            told |= {"left": left, "right": right}
        return told

    def _end_in(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        if self._timer is not None and not self._timer.cancelled():
            seconds = min(seconds, max(0.0, self._timer.when() - loop.time()))  # never later
            self._timer.cancel()
        self._timer = loop.call_later(seconds, self._end)

    def _end(self) -> None:
        assert self._server is not None
        self._server.should_exit = True


async def file(request: Request) -> Response:
    """GET / and /page/NAME: the page's files."""
    name = request.path_params.get("name", "index.html")
    if name not in {path.name for path in PAGE.iterdir()}:
        raise HTTPException(404)
    return FileResponse(PAGE / name, headers=HEADERS)


async def gone(_: Request, __: Exception) -> Response:
    """The browser left while its body was read."""
    return Response(status_code=499)


async def body_of(request: Request) -> dict[str, Any]:
    """The JSON object that a page of ours has sent; `RefusedError` for all else.

    A page of another site can post text/plain without asking first, but no application/json.
    """
    own = f"http://{request.headers.get('host', '')}"
    if request.headers.get("origin", own) != own:
        raise RefusedError(403, "Another site's page cannot vote.")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RefusedError(415, "Send JSON, with the header Content-Type: application/json.")
    content = b""
    async for part in request.stream():
        content += part
        if len(content) > LARGEST_BODY:
            raise RefusedError(413, "The note is too long.")
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise RefusedError(400, "The body is no JSON object.")
    return body


def text(body: dict[str, Any], key: str) -> str:
    """A text of the body; half surrogate pairs, which are not text, become question marks."""
    value = body.get(key, "")
    if not isinstance(value, str):
        raise RefusedError(400, f"{key} is no text.")
    return value.encode("utf-8", "replace").decode()


def listening(port: int) -> socket.socket:
    """A listening socket on this machine only; UserError if the port is taken."""
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((HOST, port))
        made.listen(128)
    except OSError as error:
        made.close()
        raise UserError(
            f"Port {port} cannot be used: {error.strerror}.", "Leave out --port for a free one."
        ) from None
    except OverflowError:
        made.close()
        raise UserError(f"{port} is no port.", "A port is 0 (a free one) to 65535.") from None
    return made
