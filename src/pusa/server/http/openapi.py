"""Describe request bodies, downloads and errors in the OpenAPI schema, where FastAPI cannot infer them."""

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
    502: "The operator's language model failed.",
    503: "The queue cannot be reached at the moment.",
    507: "The disk is full.",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Build the ``responses`` of a route that may answer with these error statuses."""
    return {
        status: {"model": ErrorEnvelope, "description": _DESCRIPTIONS[status]}
        for status in sorted({*statuses, *_ALWAYS})
    }


def binary(description: str, *types: str) -> dict[str, Any]:
    """Build the response of a route that returns a file of one of these media types."""
    return {
        "description": description,
        "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in types},
    }


class _Body(dict[str, Any]):
    """The ``openapi_extra`` of a route with a body; empty at first: to build the schemas takes a third of the start."""

    def __init__(self, model: type[BaseModel], file_field: str | None, required: bool, has_form: bool) -> None:
        super().__init__()
        self._model, self._file_field, self._required, self._has_form = model, file_field, required, has_form

    def fill(self) -> None:
        json_schema = _inline_schema(self._model)
        form = copy.deepcopy(json_schema)
        if self._file_field is not None:
            properties = form["properties"]
            json_field = properties[self._file_field]
            properties[self._file_field] = {
                "description": json_field.get("description", ""),
                "anyOf": [
                    {"type": "array", "items": {"type": "string", "format": "binary"}},
                    {"type": "string", "format": "binary"},
                ],
            }
        content = {"application/json": {"schema": json_schema}}
        if self._has_form:
            content["multipart/form-data"] = {"schema": form}
        self["requestBody"] = {"required": self._required, "content": content}


def body(
    model: type[BaseModel], file_field: str | None = None, *, required: bool = True, has_form: bool = True
) -> dict[str, Any]:
    """Build the ``openapi_extra`` of a route that takes JSON or a form, with files in the form's `file_field`."""
    return _Body(model, file_field, required, has_form)


def _inline_schema(model: type[BaseModel]) -> dict[str, Any]:
    """Build the JSON schema of a model with its definitions inlined: ``openapi_extra`` has no place for them."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def resolve(part: Any) -> Any:
        if isinstance(part, list):
            return [resolve(item) for item in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            target = definitions[part["$ref"].rsplit("/", 1)[1]]
            return resolve({**target, **{k: v for k, v in part.items() if k != "$ref"}})
        return {key: resolve(value) for key, value in part.items()}

    return resolve(schema)


def install(app: FastAPI, cookie: str) -> None:
    """Replace FastAPI's own schema of `app`: validation errors are 400 here, and keys are optional.

    Args:
        cookie: name of the cookie that may stand for a key.
    """

    def openapi_schema() -> dict[str, Any]:
        if app.openapi_schema is None:
            for route in app.routes:
                if isinstance(extra := getattr(route, "openapi_extra", None), _Body):
                    extra.fill()
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
                "key": {"type": "http", "scheme": "bearer", "description": "Needed where the operator has set keys."},
                "session": {
                    "type": "apiKey",
                    "in": "cookie",
                    "name": cookie,
                    "description": "Set by POST /v1/session, for pages.",
                },
            }
            schema["security"] = [{}, {"key": []}, {"session": []}]
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi_schema  # type: ignore[method-assign]
