"""Mount the studio in the server's app: its routes, its page at ``/``, and the scripts that load before Gradio."""

import hashlib
import json
import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import FileResponse
from starlette.routing import Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when Gradio is imported: it sends no usage data

import gradio as gr
from gradio.components import Component
from gradio.utils import get_upload_folder
from gradio_client.utils import is_http_url_like

from pusa.server.service import VideoService
from pusa.server.settings import ServerSettings
from pusa.server.studio.files.request_filter import RequestFilter
from pusa.server.studio.files.routes import file_router
from pusa.server.studio.files.uploads import VisitorFiles
from pusa.server.studio.page import build
from pusa.server.studio.routes import ASSETS, router
from pusa.server.studio.texts import LANGUAGES, texts, translations
from pusa.server.studio.theme import theme

SCRIPTS = ("common.js", "timeline.js", "stage.js", "gallery.js", "header.js", "words.js", "estimate.js")
STYLES = ("studio.css", "timeline.css", "stage.css")

# The browser may ask no other server, whatever a component tries. Gradio's own scripts are inline and evaluated.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)


def mount_studio(app: FastAPI, service: VideoService, settings: ServerSettings) -> FastAPI:
    """Serve the page at ``/`` of `app`. Call it after all other routes are added: Gradio takes every path left."""
    files = VisitorFiles(Path(get_upload_folder()))
    app.include_router(router(service))
    app.include_router(file_router(files, service))

    @app.get("/favicon.ico", include_in_schema=False)
    async def favicon() -> FileResponse:
        return FileResponse(ASSETS / "favicon.svg", media_type="image/svg+xml")

    page = build(service, files)
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        i18n=translations(),
        theme=theme(),
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        show_error=False,  # unexpected errors go to the log, not to the page
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        max_file_size=settings.max_body_bytes,
        root_path=settings.root_path or None,
        allowed_paths=[],
    )
    mounted = next(r for r in reversed(app.routes) if isinstance(r, Mount) and r.path in ("", "/"))
    mounted.app = RequestFilter(_Page(mounted.app, head()), page, files)
    confine(page)
    return app


def confine(page: gr.Blocks) -> None:
    """Make Gradio check paths, as it does for pages that it launches itself, and fetch no URLs."""
    page.has_launched = True
    for part in page.blocks.values():
        if isinstance(part, Component):
            part.async_move_resource_to_block_cache = _without_urls(part)  # type: ignore[assignment]


def _without_urls(part: Component) -> Callable[[str | Path | None], Coroutine[Any, Any, str | None]]:
    original = part.async_move_resource_to_block_cache

    async def move(path: str | Path | None) -> str | None:
        if path is not None and is_http_url_like(str(path)):
            raise gr.Error("this page fetches nothing from addresses: choose a file", print_exception=False)
        return await original(path)

    return move


def head() -> bytes:
    """Return the HTML that comes first in the page's head: its texts, scripts and styles.

    ``first.js`` sets language and theme before the browser draws anything.
    """
    translated = {language: texts(language) for language in LANGUAGES}
    shared = json.dumps({"languages": LANGUAGES, "texts": translated}, ensure_ascii=False).replace("</", r"<\/")
    first = (ASSETS / "first.js").read_text(encoding="utf-8")
    lines = [
        f"<script>window.pusa = {shared};\n{first}</script>",
        '<link rel="icon" type="image/svg+xml" href="studio/assets/favicon.svg">',
        *(f'<link rel="stylesheet" href="studio/assets/{name}?{_stamp(ASSETS / name)}">' for name in STYLES),
        *(f'<script src="studio/assets/{name}?{_stamp(ASSETS / name)}"></script>' for name in SCRIPTS),
    ]
    return "\n".join(lines).encode()


def _stamp(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


class _Page:
    """Add `head` and a content security policy to the page that Gradio's app serves."""

    def __init__(self, app: ASGIApp, head: bytes) -> None:
        self.app, self.head = app, head

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD") or not _is_page(scope):
            await self.app(scope, receive, send)
            return
        plain = [(name, value) for name, value in scope["headers"] if name != b"accept-encoding"]
        start: Message = {}
        body = bytearray()

        async def send_whole(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
                return
            if message["type"] != "http.response.body":
                await send(message)
                return
            body.extend(message.get("body", b""))
            if message.get("more_body"):
                return
            page = bytes(body).replace(b"<head>", b"<head>" + self.head, 1)
            headers = [(n, v) for n, v in start["headers"] if n.lower() not in (b"content-length", b"etag")]
            extra = [(b"content-length", str(len(page)).encode()), (b"content-security-policy", _POLICY.encode())]
            await send({**start, "headers": [*headers, *extra]})
            await send({"type": "http.response.body", "body": page if scope["method"] == "GET" else b""})

        await self.app({**scope, "headers": plain}, receive, send_whole)


def _is_page(scope: Scope) -> bool:
    return scope["path"].removeprefix(scope.get("root_path", "")) in ("", "/")
