"""What the OpenAPI says of routes whose bodies are read by hand: both forms of each, and every error."""

import copy
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from pusa.server.http.schemas import ErrorEnvelope

_ALWAYS = (401, 403, 500)
_DESCRIPTIONS = {
    400: "Something in the request is not possible; `param` names it.",
    401: "The API key is missing or wrong.",
    403: "The host or the page's origin is not allowed.",
    404: "There is no such thing, or it is another key's.",
    409: "Not yet, or not any more.",
    413: "The request is too large.",
    415: "The content type is neither JSON nor a form.",
    416: "The range is outside the file.",
    422: "The Idempotency-Key belongs to another request.",
    429: "Too many jobs wait. `Retry-After` and `retry-after-ms` say when to come back.",
    500: "A mistake of the server.",
    501: "Not supported.",
    503: "The queue cannot be reached at the moment.",
    507: "The disk is full.",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The ``responses`` of a route that may refuse so."""
    return {
        status: {"model": ErrorEnvelope, "description": _DESCRIPTIONS[status]}
        for status in sorted({*statuses, *_ALWAYS})
    }


def binary(description: str, *types: str) -> dict[str, Any]:
    return {
        "description": description,
        "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in types},
    }


def body(model: type[BaseModel], file_field: str | None = None) -> dict[str, Any]:
    """``openapi_extra`` of a route whose body is JSON or a form; `file_field` may hold files in the form."""
    form = copy.deepcopy(_inlined(model))
    if file_field is not None:
        properties = form["properties"]
        of_json = properties[file_field]
        properties[file_field] = {
            "description": of_json.get("description", ""),
            "anyOf": [
                {"type": "array", "items": {"type": "string", "format": "binary"}},
                {"type": "string", "format": "binary"},
            ],
        }
    content = {"application/json": {"schema": _inlined(model)}, "multipart/form-data": {"schema": form}}
    return {"requestBody": {"required": True, "content": content}}


def _inlined(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a model without references: routes' own schemas have no place for definitions."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def resolved(part: Any) -> Any:
        if isinstance(part, list):
            return [resolved(item) for item in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            target = definitions[part["$ref"].rsplit("/", 1)[1]]
            return resolved({**target, **{k: v for k, v in part.items() if k != "$ref"}})
        return {key: resolved(value) for key, value in part.items()}

    return resolved(schema)


def install(app: FastAPI) -> None:
    """Let `app` describe itself as it answers: FastAPI's own 422 is a 400 in the envelope here."""

    def described() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                routes=app.routes,
                tags=app.openapi_tags,
            )
            for operations in schema["paths"].values():
                for operation in operations.values():
                    answer = operation["responses"].get("422", {})
                    if "HTTPValidationError" in str(answer):
                        del operation["responses"]["422"]
            for unused in ("HTTPValidationError", "ValidationError"):
                schema["components"]["schemas"].pop(unused, None)
            schema["components"]["securitySchemes"] = {
                "key": {"type": "http", "scheme": "bearer", "description": "Needed where the operator has set keys."}
            }
            schema["security"] = [{}, {"key": []}]
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = described  # type: ignore[method-assign]
