"""The OpenAPI description of /v1, made from the bodies that the application checks."""

from functools import cache
from typing import Any

from pydantic.json_schema import models_json_schema

from alpaca import __version__
from alpaca.web.bodies import ChatBody, CompletionBody, LoadAdapterBody, UnloadAdapterBody

ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
ERRORS = {
    "400": "A key is unknown, of another type or out of range, or the prompt does not fit.",
    "401": "The API key is missing or wrong.",
    "403": "The operator has named no folder for adapters, or the path is not in it.",
    "404": "No model, or no adapter, has this id.",
    "413": "The body is too large.",
    "415": "The body is not declared as application/json.",
    "429": "The queue is full; Retry-After says when to try again.",
    "503": "The model is loading, or its engine has ended.",
}


@cache
def document() -> dict[str, Any]:
    """The description."""
    bodies = CompletionBody, ChatBody, LoadAdapterBody, UnloadAdapterBody
    kinds = [(body, "validation") for body in bodies]
    _, schemas = models_json_schema(kinds, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    return {
        "openapi": "3.1.0",
        "info": {"title": "alpaca-cog", "version": __version__},
        "paths": {
            "/v1/models": {"get": _operation("List the models that are served.")},
            "/v1/completions": {"post": _operation("Continue a text.", "CompletionBody")},
            "/v1/chat/completions": {"post": _operation("Answer a conversation.", "ChatBody")},
            "/v1/load_lora_adapter": {"post": _change("Load an adapter.", "LoadAdapterBody")},
            "/v1/unload_lora_adapter": {"post": _change("Unload one.", "UnloadAdapterBody")},
        },
        "components": {
            "schemas": {**schemas["$defs"], "Error": ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def _operation(summary: str, body: str | None = None) -> dict[str, Any]:
    codes = set(ERRORS) - {"403"} if body else {"401", "503"}
    kinds = ["application/json", *(["text/event-stream"] if body else [])]
    content: dict[str, Any] = {kind: {} for kind in kinds}
    return _described(
        summary, body, codes, "As OpenAI's; with `stream`, server-sent events.", content
    )


def _change(summary: str, body: str) -> dict[str, Any]:
    return _described(summary, body, set(ERRORS) - {"429"}, "Done.", {"text/plain": {}})


def _described(
    summary: str, body: str | None, codes: set[str], done: str, content: dict[str, Any]
) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    responses: dict[str, Any] = {"200": {"description": done, "content": content}}
    responses |= {
        code: {"description": told, "content": error}
        for code, told in ERRORS.items()
        if code in codes
    }
    operation: dict[str, Any] = {"summary": summary, "responses": responses}
    if body:
        schema = {"schema": {"$ref": f"#/components/schemas/{body}"}}
        operation["requestBody"] = {"required": True, "content": {"application/json": schema}}
    return operation
