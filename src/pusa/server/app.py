"""Assemble the server's ASGI app: routes, middleware, and background threads (workers, housekeeping).

Importing it loads no torch: models are loaded in child processes.
"""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI, Response
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.middleware.cors import CORSMiddleware

from pusa import __version__
from pusa.fsutil import private_folder
from pusa.server import errors
from pusa.server.http import api, films, growing, jobs, models, openapi, prompts, requests, session
from pusa.server.http import files as file_routes
from pusa.server.http.keys import ApiKeys
from pusa.server.http.middleware import SESSION_PATH, AccessMiddleware, HostCheck
from pusa.server.http.root_page import RootPage, docs_page
from pusa.server.http.schemas import Health, Ready
from pusa.server.http.session_cookies import SessionCookies
from pusa.server.jobs.ended_sessions import EndedSessions
from pusa.server.jobs.housekeeping import Housekeeping
from pusa.server.jobs.queue import JobQueue, QueueUnavailable
from pusa.server.jobs.store import FileStore
from pusa.server.metrics import CONTENT_TYPE, COUNT_SECONDS, Metrics
from pusa.server.plans import PlanFunction, plan_model
from pusa.server.service import ServiceError, VideoService, in_thread
from pusa.server.settings import ServerSettings
from pusa.server.studio import page as studio
from pusa.server.submit import DAMAGED
from pusa.server.worker.executor import Executor
from pusa.server.worker.worker import Worker, make_executor

logger = logging.getLogger(__name__)

_ROUTES = (api, jobs, session, file_routes, growing, models, requests, films, prompts)
_ROUTERS = tuple(module.router for module in _ROUTES)
_JOIN_SECONDS = 10.0  # for a worker to return its job to the queue
_LOOK_SECONDS = 0.1  # between two looks for a page or a job, during the head start
_DESCRIPTION = (
    "Videos from words, images and pieces of video. OpenAI's videos API, with vLLM-Omni's names for more of the "
    "settings and our own for keyframes, positions and noise multipliers."
)


def create_app(
    settings: ServerSettings,
    *,
    queue: JobQueue | None = None,
    files: FileStore | None = None,
    make_executor: Callable[[ServerSettings, int], Executor] = make_executor,
    plan: PlanFunction = plan_model,
    drain_seconds: float = 2.0,
    head_start_seconds: float = 0.0,
) -> FastAPI:
    """Create the app. Its workers start with it, and return their jobs to the queue when it stops.

    Args:
        settings: of the server and its workers.
        queue, files: replace those that the settings name.
        make_executor: called with the number of each of `settings.workers`.
        plan: plans what requests need, see `pusa.server.plans`.
        drain_seconds: how long the body of a refused request is read before its connection is closed.
        head_start_seconds: for which the machine is left to a page that is being opened, before a worker loads the
            model; at most, as the page's event stream or a job ends it.

    Raises:
        ValueError, SchemaError, QueueUnavailable: the database or the file store cannot be used.
    """
    private_folder(settings.data_folder)
    settings.scratch_folder.mkdir(mode=0o700, exist_ok=True)
    queue = queue or JobQueue(settings.database_url)
    files = files or FileStore(settings.files_url)
    service = VideoService(settings, queue, files, plan)
    metrics = Metrics(service)
    background = _BackgroundThreads(service, metrics, make_executor, head_start_seconds)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        background.start()
        tasks = [asyncio.create_task(background.count_ended_jobs())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await in_thread(background.close)

    app = FastAPI(
        title="pusa",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # FastAPI's own pages load scripts from a CDN
        redoc_url=None,
        redirect_slashes=False,
    )
    keys = ApiKeys(settings.api_keys, settings.keys_file)
    sessions = SessionCookies(keys, EndedSessions(queue), queue.identity)
    app.state.service, app.state.settings, app.state.stop = service, settings, background.stop
    errors.install(app)
    app.state.sessions = sessions
    openapi.install(app, sessions.name)
    for router in _ROUTERS:
        app.router.routes.extend(router.routes)  # as they are: `include_router` would build all of them once more
    _add_server_routes(app, service, metrics, settings)
    if settings.studio:
        app.router.routes.extend(studio.router().routes)
    app.router.default = RootPage(service, settings)
    app.add_middleware(
        AccessMiddleware,
        keys=keys,
        wrong_keys=service.wrong_keys,
        sessions=sessions,
        open_paths=(SESSION_PATH, *(studio.PATHS if settings.studio else ())),
        hosts=HostCheck((*settings.allowed_hosts, settings.host), settings.allowed_origins),
        max_body_bytes=settings.max_body_bytes,
        silent_seconds=settings.silent_seconds,
        drain_seconds=drain_seconds,
    )
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allowed_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["authorization", "content-type", "idempotency-key", "range", "x-request-id"],
            expose_headers=["openai-poll-after-ms", "x-request-id", "content-range"],
        )
    return app


class _BackgroundThreads:
    """Start and stop the workers and housekeeping of one app."""

    def __init__(
        self,
        service: VideoService,
        metrics: Metrics,
        make_executor: Callable[[ServerSettings, int], Executor],
        head_start_seconds: float,
    ) -> None:
        self._service, self._metrics, self._make_executor = service, metrics, make_executor
        self._head_start_seconds = head_start_seconds
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._housekeeping: Housekeeping | None = None

    def start(self) -> None:
        """Start the workers, housekeeping and a spare process for probing uploads."""
        service, settings = self._service, self._service.settings
        for number in range(settings.workers):
            worker = Worker(settings, service.queue, service.files, self._make_executor(settings, number))
            thread = threading.Thread(target=self._work, args=(worker,), name=worker.name, daemon=True)
            thread.start()
            self._threads.append(thread)
        self._housekeeping = Housekeeping(
            service.queue,
            service.files,
            every_seconds=settings.housekeeping_seconds,
            keep_seconds=settings.keep_seconds,
            orphan_seconds=settings.orphan_seconds,
            scratch=settings.scratch_folder,
            scratch_seconds=settings.job_seconds + 3600,
            max_failures=settings.max_failures,
            clock=service.clock,
        )
        self._housekeeping.start()
        threading.Thread(target=self._warm_prober, name="warm-probe", daemon=True).start()

    def _work(self, worker: Worker) -> None:
        self._give_head_start()
        worker.run(self._stop)

    def _warm_prober(self) -> None:
        self._give_head_start()
        self._service.submitter.prober.warm()

    def _give_head_start(self) -> None:
        """Leave the machine to a page that is being opened: a process that imports torch takes a core for seconds."""
        end = time.monotonic() + self._head_start_seconds
        while time.monotonic() < end and not self._is_needed() and not self._stop.wait(_LOOK_SECONDS):
            pass

    def _is_needed(self) -> bool:
        """Tell if a page is there, or a job is unfinished."""
        with suppress(QueueUnavailable):
            return self._service.is_followed or any(self._service.queue.count_unfinished().values())
        return False

    async def count_ended_jobs(self) -> None:
        """Count ended jobs for the metrics until cancelled."""
        update = self._metrics.start
        while True:
            try:
                await asyncio.to_thread(update)
                update = self._metrics.count_ended
            except QueueUnavailable as error:
                logger.warning("the queue does not answer: %s", error)
            await asyncio.sleep(COUNT_SECONDS)

    def stop(self) -> None:
        """Signal all threads to stop, without waiting: requests may still be in progress."""
        self._service.is_stopping = True
        self._stop.set()

    def close(self) -> None:
        """Stop all threads, wait for them and close the queue."""
        self.stop()
        self._service.close()
        if self._housekeeping is not None:
            self._housekeeping.close()
        for thread in self._threads:
            thread.join(_JOIN_SECONDS)
            if thread.is_alive():
                logger.warning("worker %s does not end: its job is taken back when its lease ends", thread.name)
        self._service.queue.close()


def _add_server_routes(app: FastAPI, service: VideoService, metrics: Metrics, settings: ServerSettings) -> None:
    @app.get("/health", summary="Alive", response_model=Health, responses=openapi.errors(503))
    async def health() -> Health:
        """While the process runs, but for a queue that only its operator can repair."""
        if service.queue.fault() is not None:
            raise ServiceError(503, "queue_unavailable", DAMAGED, headers={"retry-after": "30"})
        return Health(version=app.version)

    @app.get(
        "/ready",
        summary="Ready to make a video",
        response_model=Ready,
        responses={503: {"model": Ready, "description": "The model is being loaded, or no worker is there."}},
    )
    async def ready() -> Response:
        """While the model loads, `stage` and `percent` tell the progress; jobs are accepted meanwhile."""
        state = await in_thread(service.readiness)
        body = Ready(**vars(state)).model_dump()
        return JSONResponse(body, 200 if state.ready else 503, headers={} if state.ready else {"retry-after": "2"})

    if settings.metrics:

        @app.get(
            "/metrics",
            summary="Figures for Prometheus",
            response_class=Response,
            responses={200: {"description": "Text.", "content": {CONTENT_TYPE: {}}}, **openapi.errors(503)},
        )
        async def prometheus_metrics() -> Response:
            return Response(await in_thread(metrics.text), headers={"content-type": CONTENT_TYPE})

    if settings.docs:

        @app.get("/docs", include_in_schema=False)
        async def documentation() -> Response:
            return HTMLResponse(docs_page(app.openapi()))
