"""The web application: /v1, the page, metrics; who may ask, and what is refused unread."""

import asyncio
import base64
import hmac
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from alpaca import prompt
from alpaca.address import is_loopback
from alpaca.web import adapters, bodies, completions, metrics, openapi
from alpaca.web.errors import ApiError
from alpaca.web.remote import Remote
from alpaca.web.runs import Run
from alpaca.web.served import Served

PAGE = Path(__file__).resolve().parent / "page"
LARGEST_BODY = 8 << 20  # bytes: many times the text that fits into a slot
# The page's own files only; an answer of the model is never markup.
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@dataclass
class Site:
    """What the application serves; `models` is empty while the first one loads.

    key: without it, anyone who reaches the port may ask. origins: pages of other sites whose
    scripts may ask. inputs: name to JSON schema, from the runner. examples: pairs for the page.
    adapters: the folder whose adapters may be loaded over HTTP.
    """

    key: str | None = None
    origins: list[str] = field(default_factory=list)
    inputs: dict[str, Any] = field(default_factory=dict)
    examples: list[dict[str, str]] = field(default_factory=list)
    run: Run | None = None
    models: list[Served] = field(default_factory=list)
    compared: Remote | None = None  # for the page only: /v1 never spends another server's key
    adapters: Path | None = None

    @property
    def listed(self) -> list[Served]:
        """The models and their adapters, in the order of /v1/models."""
        return [one for model in self.models for one in model.listed()]

    def model(self, name: str | None) -> Served:
        """The model of that id, or the first one.

        Raises:
            ApiError: 503 while it loads or if its engine is not healthy, 404 for another id.
        """
        if not self.models:
            raise ApiError(503, "The model is loading; try again in a few seconds.")
        listed = self.listed
        known = {one.name: one for one in reversed(listed)}  # of equal names, the first
        found = listed[0] if name is None else known.get(name)
        if found is None:
            told = ", ".join(one.name for one in listed)
            raise ApiError(
                404,
                f"There is no model {name!r} here; served: {told}.",
                param="model",
                code="model_not_found",
            )
        if not found.engine.healthy:
            raise ApiError(503, f"{found.name} does not answer: its engine is stuck or has ended.")
        return found


def application(site: Site) -> Starlette:
    """The ASGI application."""
    doors = Doors(site)
    middleware = [Middleware(Guard, site=site)]
    if site.origins:
        cors = Middleware(
            CORSMiddleware, allow_origins=site.origins, allow_methods=["*"], allow_headers=["*"]
        )
        middleware.insert(0, cors)  # a preflight carries no key
    return Starlette(
        routes=doors.routes(),
        middleware=middleware,
        exception_handlers={
            ApiError: told,
            HTTPException: told,
            ClientDisconnect: gone,
            Exception: crashed,
        },
    )


class Guard:
    """Refuses requests without the key, and without one those that name another host.

    A page on another site can point its own name at 127.0.0.1 (DNS rebinding), and its scripts
    would then read a local server's answers; they cannot change the Host header.
    """

    def __init__(self, app: ASGIApp, site: Site) -> None:
        """Stand before `app`."""
        self._app, self._site = app, site

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 401 or 403."""
        if scope["type"] == "http" and scope["path"] != "/health":
            refused = self._refused(Request(scope))
            if refused is not None:
                await refused.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refused(self, request: Request) -> ApiError | None:
        if self._site.key is None:
            host = request.headers.get("host", "")
            name = host if host.endswith("]") else host.rpartition(":")[0] or host
            own = request.scope.get("server") or ("",)
            if is_loopback(own[0]) and not is_loopback(name.strip("[]")):
                return ApiError(403, f"This server has no key, and {host!r} is not this machine.")
            return None
        given = presented(request.headers.get("authorization", ""))
        if hmac.compare_digest(given, self._site.key.encode(errors="surrogateescape")):
            return None
        return ApiError(401, "The API key is missing or wrong.", code="invalid_api_key")


def presented(header: str) -> bytes:
    """The key in an Authorization header: a Bearer token, or the password of Basic."""
    kind, _, rest = header.partition(" ")
    if kind.lower() == "bearer":
        return rest.strip(" \t").encode("latin-1")  # as Starlette has decoded it
    if kind.lower() == "basic":
        try:
            return base64.b64decode(rest, validate=True).partition(b":")[2]
        except ValueError:
            return b""
    return b""


async def told(_: Request, error: Exception) -> Response:
    """An error as OpenAI's object."""
    if isinstance(error, ApiError):
        return error.response()
    assert isinstance(error, HTTPException)
    message = {404: "There is nothing at this address.", 405: "This address takes other methods."}
    answer = ApiError(error.status_code, message.get(error.status_code, error.detail)).response()
    answer.headers.update(error.headers or {})  # Allow
    return answer


async def crashed(_: Request, error: Exception) -> Response:
    """A fault of the server; its traceback is in the log."""
    return ApiError(500, f"The server failed: {type(error).__name__}.").response()


async def gone(_: Request, __: Exception) -> Response:
    """The client left while its body was read."""
    return Response(status_code=499)


async def body_of(request: Request) -> bytes:
    """The body, if it is JSON and not too large.

    A page on another site may send text/plain without asking first, but no application/json.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "Send JSON, with the header Content-Type: application/json.")
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > LARGEST_BODY:
            raise ApiError(413, f"The body has more than {LARGEST_BODY:,} bytes.")
        parts.append(part)
    return b"".join(parts)


class Doors:
    """The addresses."""

    def __init__(self, site: Site) -> None:
        """Doors of a site."""
        self._site = site
        self._reading = asyncio.Lock()
        self._loading = asyncio.Lock()

    def routes(self) -> list[Route]:
        """Every address, with its method."""
        return [
            Route("/", self.page),
            Route("/page/settings", self.settings),
            Route("/page/prompt", self.prompt, methods=["POST"]),
            Route("/page/compared", self.compared, methods=["POST"]),
            Route("/page/run", self.run),
            Route("/page/{name}", self.file),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.one_model),
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/load_lora_adapter", self.load_adapter, methods=["POST"]),
            Route("/v1/unload_lora_adapter", self.unload_adapter, methods=["POST"]),
            Route("/openapi.json", self.description),
            Route("/metrics", self.metrics),
            Route("/health", self.health),
        ]

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions."""
        body = bodies.read(bodies.CompletionBody, await body_of(request))
        return await completions.complete(request, self._site.model(body.model), body)

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        body = bodies.read(bodies.ChatBody, await body_of(request))
        return await completions.chat(request, self._site.model(body.model), body)

    async def models(self, _: Request) -> Response:
        """GET /v1/models."""
        self._site.model(None)
        listed = [described(one) for one in self._site.listed]
        return JSONResponse({"object": "list", "data": listed})

    async def one_model(self, request: Request) -> Response:
        """GET /v1/models/ID."""
        return JSONResponse(described(self._site.model(request.path_params["name"])))

    async def load_adapter(self, request: Request) -> Response:
        """POST /v1/load_lora_adapter: of the first model."""
        body = bodies.read(bodies.LoadAdapterBody, await body_of(request))
        self._site.model(None)
        others = [one.name for model in self._site.models[1:] for one in model.listed()]
        if body.lora_name in [self._site.models[0].name, *others]:
            raise ApiError(
                400, f"{body.lora_name} is a model's name; take another.", param="lora_name"
            )
        async with self._loading:  # the memory left is looked at before each
            return await adapters.load(self._site.models[0], self._site.adapters, body)

    async def unload_adapter(self, request: Request) -> Response:
        """POST /v1/unload_lora_adapter."""
        body = bodies.read(bodies.UnloadAdapterBody, await body_of(request))
        self._site.model(None)
        return adapters.unload(self._site.models[0], self._site.adapters, body)

    async def metrics(self, _: Request) -> Response:
        """GET /metrics."""
        return PlainTextResponse(
            metrics.text(self._site.models), media_type="text/plain; version=0.0.4"
        )

    async def health(self, _: Request) -> Response:
        """GET /health: 200 if the model answers; without the key, as it tells nothing else."""
        self._site.model(None)
        return JSONResponse({"status": "ok"})

    async def description(self, _: Request) -> Response:
        """GET /openapi.json."""
        return JSONResponse(openapi.document())

    async def page(self, _: Request) -> Response:
        """GET /."""
        return FileResponse(PAGE / "index.html", headers=HEADERS)

    async def file(self, request: Request) -> Response:
        """GET /page/NAME: the page's other files."""
        name = request.path_params["name"]
        if name not in {path.name for path in PAGE.iterdir()}:
            raise HTTPException(404)
        return FileResponse(PAGE / name, headers=HEADERS)

    async def settings(self, _: Request) -> Response:
        """GET /page/settings: what the page shows and allows."""
        models, other = self._site.listed, self._site.compared
        listed = [{"id": one.name, "title": one.name, "url": None} for one in models]
        if other is not None and models:
            listed.append({"id": other.name, "title": other.name, "url": other.url})
        return JSONResponse(
            {
                "models": listed,
                "ready": bool(models),
                "inputs": self._site.inputs,
                "slots": min((one.engine.capacity.slots for one in models), default=0),
                "context": min((one.context for one in models), default=0),
                "examples": self._site.examples,
                "watch": self._site.run is not None,
                "key": self._site.key is not None,
            },
            headers=HEADERS,
        )

    async def prompt(self, request: Request) -> Response:
        """POST /page/prompt: the text of an instruction's prompt, and its tokens."""
        body = bodies.read(bodies.PromptBody, await body_of(request))
        served = self._site.model(body.model)
        text = prompt.render(body.instruction, body.input)
        [ids] = await served.ids([text])
        tokens = [{"id": one, "text": served.token_text(one)} for one in ids]
        chat = not body.input and await served.chats_as(body.instruction, ids)
        return JSONResponse({"text": text, "tokens": tokens, "chat": chat})

    async def compared(self, request: Request) -> Response:
        """POST /page/compared: an answer of the model of another server, as a stream."""
        body = bodies.read(bodies.ComparedBody, await body_of(request))
        if self._site.compared is None:
            raise ApiError(404, "No other server is compared with: set ALPACA_COMPARE to its URL.")
        return await self._site.compared.answer(request, body)

    async def run(self, _: Request) -> Response:
        """GET /page/run: the state of the watched training run."""
        if self._site.run is None:
            raise ApiError(404, "No run is watched: set ALPACA_WATCH to its output folder.")
        async with self._reading:  # in a thread: a log may be long, or on a slow disk
            told = await asyncio.to_thread(refreshed, self._site.run)
        return JSONResponse(told)


def refreshed(run: Run) -> dict[str, Any]:
    """A run's summary, from what its files hold now."""
    run.refresh()
    return run.summary()


def described(served: Served) -> dict[str, Any]:
    """A model as OpenAI lists it, with vLLM's names for its context and an adapter's base."""
    base = served.engine.adapters.base
    parent = {"parent": base} if served.adapter != base else {}
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "alpaca-cog",
        "max_model_len": served.context,
        **parent,
    }
