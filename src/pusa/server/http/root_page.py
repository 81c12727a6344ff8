"""Answer for paths that are no route of the API, and render the documentation of the API."""

import html
from collections.abc import Iterator
from typing import Any

from fastapi.responses import HTMLResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from pusa.server import errors
from pusa.server.http.middleware import path_of
from pusa.server.service import ServerState, VideoService, in_thread
from pusa.server.settings import ServerSettings

_WITHOUT_VERSION = ("/videos/", "/models/")
_API_PATHS = ("/v1/", "/health/", "/ready/", "/metrics/", "/docs/", "/openapi.json/")


class RootPage:
    """ASGI app for all paths without a route: a status page at ``/`` on a server without the studio."""

    def __init__(self, service: VideoService, settings: ServerSettings) -> None:
        self._service, self._settings = service, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = path_of(scope)
        if scope["type"] != "http" or f"{path}/".startswith(_API_PATHS):
            raise HTTPException(404)
        if f"{path}/".startswith(_WITHOUT_VERSION):
            raise errors.ServiceError(404, "not_found", f"there is nothing at {path[:100]}: the API is below /v1")
        if path not in ("", "/") or scope["method"] not in ("GET", "HEAD"):
            raise HTTPException(404)
        state = await in_thread(self._service.readiness)
        page = status_page(state, has_docs=self._settings.docs, root_path=scope.get("root_path", ""))
        await HTMLResponse(page, headers={"cache-control": "no-store"})(scope, receive, send)


# ---- HTML ------------------------------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 3rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.1rem; margin-top: 2.5rem; } code { font-size: .95em; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; vertical-align: top; padding: .25rem .75rem
.25rem 0; border-bottom: 1px solid color-mix(in srgb, currentColor 15%, transparent); }
.muted { opacity: .7; } progress { width: 100%; height: .75rem; }
"""


def _html_page(title: str, content: str, head: str = "") -> str:
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{_STYLE}</style>{head}</head><body>{content}</body></html>\n"
    )


def status_page(state: ServerState, *, has_docs: bool, root_path: str = "") -> str:
    """Render the state of the server, in a page that reloads itself."""
    content = [
        "<h1>pusa</h1>",
        f"<p>Model <code>{html.escape(state.model)}</code>: {html.escape(state.message)}.</p>",
    ]
    if not state.ready:
        content.append(f'<progress max="100" value="{state.percent:.0f}"></progress>')
        content.append(f'<p class="muted">Stage: {html.escape(state.stage)}, {state.percent:.0f} %</p>')
    content.append(f'<p class="muted">{state.running} running, {state.queued} waiting.</p>')
    content.append(
        "<p>Videos are made over the API at <code>/v1/videos</code>"
        + (f', which <a href="{html.escape(root_path)}/docs">the documentation</a> describes.' if has_docs else ".")
        + "</p>"
    )
    content.append("<p>The studio, for the browser, is off here: its operator has set <code>studio = false</code>.</p>")
    head = f'<meta http-equiv="refresh" content="{30 if state.ready else 2}">'
    return _html_page("pusa", "\n".join(content), head)


def docs_page(schema: dict[str, Any]) -> str:
    """Render an OpenAPI schema as one page, without scripts or fonts from elsewhere."""
    return _html_page(f"{schema['info']['title']} API", "\n".join(_docs_content(schema)))


def _docs_content(schema: dict[str, Any]) -> Iterator[str]:
    yield f"<h1>{html.escape(schema['info']['title'])} API</h1>"
    yield f"<p>{html.escape(schema['info'].get('description', ''))}</p>"
    yield '<p class="muted">For programs: <a href="openapi.json">openapi.json</a>.</p>'
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            yield f"<h2><code>{method.upper()} {html.escape(path)}</code></h2>"
            yield f"<p>{html.escape(operation.get('summary', ''))}. {html.escape(operation.get('description', ''))}</p>"
            yield from _table("Parameters", _parameters(operation))
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            yield from _table("Fields, as JSON or as a form", _fields(body))
            answers = ((status, answer.get("description", "")) for status, answer in operation["responses"].items())
            yield from _table("Answers", answers)


def _parameters(operation: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for parameter in operation.get("parameters", []):
        yield f"{parameter['name']} ({parameter['in']})", parameter.get("description", "")


def _fields(body: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, field in body.get("properties", {}).items():
        options = [option for option in field.get("anyOf", [field]) if option.get("type") != "null"]
        bounds = next(
            (f" [{o['minimum']:g}..{o['maximum']:g}]" for o in options if {"minimum", "maximum"} <= set(o)), ""
        )
        choices = next((f" [{', '.join(map(str, o['enum']))}]" for o in options if "enum" in o), "")
        yield name, field.get("description", "") + bounds + choices


def _table(title: str, rows: Any) -> Iterator[str]:
    cells = [f"<tr><td><code>{html.escape(a)}</code></td><td>{html.escape(b)}</td></tr>" for a, b in rows]
    if cells:
        yield f"<table><tr><th colspan=2>{title}</th></tr>{''.join(cells)}</table>"
