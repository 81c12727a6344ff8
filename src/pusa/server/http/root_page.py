"""What lies behind the API's own routes: the studio, and a small page of our own until it is there.

Gradio takes seconds to import. The server answers meanwhile: the studio is loaded beside it and takes over when it can.
"""

import asyncio
import importlib.util
import logging
import threading
from contextlib import suppress

from fastapi import FastAPI
from fastapi.responses import HTMLResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from pusa.server import errors
from pusa.server.http import pages
from pusa.server.http.middleware import path_of
from pusa.server.service import VideoService, in_thread
from pusa.server.settings import ServerSettings

logger = logging.getLogger(__name__)

_OF_THE_API = ("/v1/", "/health/", "/ready/", "/metrics/", "/docs/", "/openapi.json/")


class Front:
    """An ASGI app for every path that is no route of the API.

    Args:
        later: load the studio once the server runs; else it is there from the first request on.
    """

    def __init__(self, service: VideoService, settings: ServerSettings, *, later: bool) -> None:
        self._service, self._settings = service, settings
        self.has_studio = settings.studio and importlib.util.find_spec("gradio") is not None
        self._loaded = None if later or not self.has_studio else self._load()
        self._studio: FastAPI | None = None
        self._is_there = asyncio.Event()
        self._waits = self._loaded is not None

    def _load(self) -> FastAPI:
        from pusa.server.studio import mount

        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        errors.install(app, [])
        return mount(app, self._service, self._settings)

    async def _load_beside(self) -> FastAPI:
        """In a thread that nobody waits for: a server that is to end must not wait for Gradio."""
        loop = asyncio.get_running_loop()
        loaded: asyncio.Future[FastAPI] = loop.create_future()

        def tell(app: FastAPI | None, error: Exception | None) -> None:
            if loaded.done():
                return
            if app is not None:
                loaded.set_result(app)
            elif error is not None:
                loaded.set_exception(error)

        def load() -> None:
            app, error = None, None
            try:
                app = self._load()
            except Exception as caught:
                error = caught
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(tell, app, error)

        threading.Thread(target=load, name="pusa-studio", daemon=True).start()
        return await loaded

    async def run(self) -> None:
        """Load the studio and keep it until this task is cancelled."""
        try:
            app = self._loaded or await self._load_beside()
            async with app.router.lifespan_context(app):
                self._studio = app
                self._is_there.set()
                await asyncio.Event().wait()
        except Exception:
            logger.exception("the studio cannot be shown; the API works without it")
            self.has_studio = False
        finally:
            self._studio = None
            self._is_there.set()

    async def wait(self) -> None:
        """Until the studio is there, if it is to be there from the first request on."""
        if self._waits:
            await self._is_there.wait()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = path_of(scope)
        if scope["type"] != "http" or f"{path}/".startswith(_OF_THE_API):
            raise HTTPException(404)
        if self._studio is not None:
            await self._studio(dict(scope), receive, send)
        elif path in ("", "/") and scope["method"] in ("GET", "HEAD"):
            state = await in_thread(self._service.readiness)
            page = pages.start(
                state,
                has_docs=self._settings.docs,
                studio_comes=self.has_studio,
                root_path=scope.get("root_path", ""),
            )
            await HTMLResponse(page, headers={"cache-control": "no-store"})(scope, receive, send)
        else:
            raise HTTPException(404)
