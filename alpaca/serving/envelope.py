"""The part of Cog's OpenAPI document that is the same for every model.

Source: pkg/schema/openapi_spec.go in the cog repository. This covers paths, request and response
envelopes, and error shapes. `schema` adds a model's own inputs and output.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """The names that differ between Cog's predictions and trainings."""

    noun: str
    path: str
    parameter: str
    summary: str
    run_id: str
    request: str
    response: str
    input: str
    output: str


RUN = Kind(
    noun="prediction",
    path="/predictions",
    parameter="prediction_id",
    summary="Predict",
    run_id="predict_predictions_post",
    request="PredictionRequest",
    response="PredictionResponse",
    input="Input",
    output="Output",
)
TRAIN = Kind(
    noun="training",
    path="/trainings",
    parameter="training_id",
    summary="Train",
    run_id="train_trainings_post",
    request="TrainingRequest",
    response="TrainingResponse",
    input="TrainingInput",
    output="TrainingOutput",
)

STRING = {"type": "string"}
TIME = {"type": "string", "format": "date-time"}
# the fields of a response besides input and output
RESPONSE = {
    "id": STRING,
    "version": STRING,
    "created_at": TIME,
    "started_at": TIME,
    "completed_at": TIME,
    "status": STRING,
    "error": STRING,
    "logs": STRING,
    "metrics": {"type": "object"},
}
STATUSES = ["starting", "processing", "succeeded", "canceled", "failed"]


def paths(kind: Kind, *, streams: bool = False) -> dict[str, Any]:
    """The routes of a prediction or training, and the two that every server has."""
    run: dict[str, Any] = {
        "summary": kind.summary,
        "description": f"Run a single {kind.noun} on the model",
        "operationId": kind.run_id,
        "requestBody": {"content": _json(_ref(kind.request))},
        "responses": {"200": _answer(_ref(kind.response)), "422": _invalid()},
    }
    if streams:
        run["x-cog-streaming"] = True
    parameter = {"title": kind.parameter.replace("_", " ").title(), "type": "string"}
    cancel = {
        "summary": "Cancel",
        "operationId": f"cancel_{kind.path[1:]}__{kind.parameter}__cancel_post",
        "parameters": [
            {"name": kind.parameter, "in": "path", "required": True, "schema": parameter}
        ],
        "responses": {"200": _answer({}), "422": _invalid()},
    }
    return {
        "/": {"get": _get("Root", "root__get")},
        "/health-check": {"get": _get("Healthcheck", "healthcheck_health_check_get")},
        kind.path: {"post": run},
        f"{kind.path}/{{{kind.parameter}}}/cancel": {"post": cancel},
    }


def components(kind: Kind, inputs: dict[str, Any], output: dict[str, Any]) -> dict[str, Any]:
    """The named schemas: a model's own inputs and output in Cog's envelopes."""
    both = {"input": _ref(kind.input), "output": _ref(kind.output)}
    response = {key: {"title": _title(key), **value} for key, value in RESPONSE.items()}
    return {
        kind.input: {**inputs, "title": kind.input},
        kind.output: output,
        kind.request: _object(
            kind.request,
            {"id": {"title": "Id", "type": "string"}, "input": _ref(kind.input)},
        ),
        kind.response: _object(kind.response, {**both, **response}),
        "Status": {
            "title": "Status",
            "description": "An enumeration.",
            "enum": STATUSES,
            "type": "string",
        },
        "HTTPValidationError": _object(
            "HTTPValidationError",
            {"detail": {"title": "Detail", "type": "array", "items": _ref("ValidationError")}},
        ),
        "ValidationError": _validation_error(),
    }


def _validation_error() -> dict[str, Any]:
    part = {"anyOf": [{"type": "string"}, {"type": "integer"}]}
    properties = {
        "loc": {"title": "Location", "type": "array", "items": part},
        "msg": {"title": "Message", "type": "string"},
        "type": {"title": "Error Type", "type": "string"},
    }
    return {**_object("ValidationError", properties), "required": ["loc", "msg", "type"]}


def _get(summary: str, operation: str) -> dict[str, Any]:
    return {"summary": summary, "operationId": operation, "responses": {"200": _answer({})}}


def _answer(schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": "Successful Response", "content": _json(schema)}


def _invalid() -> dict[str, Any]:
    return {"description": "Validation Error", "content": _json(_ref("HTTPValidationError"))}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(title: str, properties: dict[str, Any]) -> dict[str, Any]:
    return {"title": title, "type": "object", "properties": properties}


def _title(name: str) -> str:
    return name.replace("_", " ").title()
