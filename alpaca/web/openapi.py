"""The OpenAPI description of /v1, made from the bodies that the application checks."""

from functools import cache
from typing import Any

from pydantic.json_schema import models_json_schema

from alpaca import __version__
from alpaca.web.bodies import ChatBody, CompletionBody

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
    "404": "No model has this id.",
    "413": "The body is too large.",
    "415": "The body is not declared as application/json.",
    "429": "The queue is full; Retry-After says when to try again.",
    "503": "The model is loading, or its engine has ended.",
}


@cache
def document() -> dict[str, Any]:
    """The description."""
    kinds = [(CompletionBody, "validation"), (ChatBody, "validation")]
    _, schemas = models_json_schema(kinds, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    return {
        "openapi": "3.1.0",
        "info": {"title": "alpaca-cog", "version": __version__},
        "paths": {
            "/v1/models": {"get": _operation("List the models that are served.")},
            "/v1/completions": {"post": _operation("Continue a text.", "CompletionBody")},
            "/v1/chat/completions": {"post": _operation("Answer a conversation.", "ChatBody")},
        },
        "components": {
            "schemas": {**schemas["$defs"], "Error": ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def _operation(summary: str, body: str | None = None) -> dict[str, Any]:
    errors = ERRORS if body else {code: ERRORS[code] for code in ("401", "503")}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    responses: dict[str, Any] = {
        "200": {
            "description": "As OpenAI's; with `stream`, server-sent events.",
            "content": {"application/json": {}, "text/event-stream": {}}
            if body
            else {"application/json": {}},
        }
    }
    responses |= {code: {"description": told, "content": error} for code, told in errors.items()}
    operation: dict[str, Any] = {"summary": summary, "responses": responses}
    if body:
        schema = {"schema": {"$ref": f"#/components/schemas/{body}"}}
        operation["requestBody"] = {"required": True, "content": {"application/json": schema}}
    return operation
