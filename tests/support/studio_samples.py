"""Serve the studio with a quick engine, and drive it with a browser."""

import json
import shutil
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from needs import missing
from paths import SUPPORT
from ports import free_port

from pusa.acceleration.decisions import Machine
from pusa.server.app import create_app
from pusa.server.jobs.job import Job
from pusa.server.plans import PlanFunction, plan_model
from pusa.server.service import VideoService
from pusa.server.settings import ServerSettings
from pusa.server.worker.local import LocalExecutor, Placement

ENGINE = "studio_engine:StudioEngine"
# The first draws no window: the others' own pages can take all of a small machine's time.
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
BODY = """async () => {
    const base = document.querySelector('script[type=module][src]').src.replace('app.js', '')
    const [store, request] = [await import(base + 'core/store.js'), await import(base + 'core/request.js')]
    return request.toBody(store.form.value, store.model.value)
}"""
"""Read the body that Generate would send now."""
CARDS_REST = "() => [...document.querySelectorAll('.card-picture')].every(card => !card.getAnimations().length)"
"""Tell if every picture on the timeline has come to rest."""


@dataclass
class Running:
    url: str
    service: VideoService


def settings_of(folder: Path, **changes: Any) -> ServerSettings:
    values = {
        "data": str(folder),
        "model": "mini",
        "poll_seconds": 0.1,
        "preview_seconds": 0.05,
        "cancel_seconds": 2.0,
    }
    return ServerSettings.model_validate(values | changes)


@contextmanager
def studio(
    folder: Path,
    engine: str | None = ENGINE,
    *,
    machine: Machine | None = None,
    plan: PlanFunction = plan_model,
    **changes: Any,
) -> Iterator[Running]:
    """A server on a free port; `engine` None is the real one. Its worker reports `machine`, for which `plan` plans."""
    port = changes.pop("port", None) or free_port()

    def executor(settings: ServerSettings, _: int) -> LocalExecutor:
        target: dict[str, Any] = {"target": engine} if engine else {}
        env = {"PYTHONPATH": str(SUPPORT)}
        return LocalExecutor(settings.model, env=env, place=lambda: Placement(machine=machine), **target)

    app = create_app(settings_of(folder, port=port, **changes), make_executor=executor, plan=plan)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_config=None, ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.02)
        yield Running(f"http://127.0.0.1:{port}/", app.state.service)
    finally:
        server.should_exit = True
        thread.join(30)


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser; skips, or fails as `needs.missing` says, where none is installed."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        missing("chromium", "no browser is on the PATH: apt-get install chromium-headless-shell")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Containers often give /dev/shm 64 MB: too little for a browser with videos.
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        try:
            yield browser
        finally:
            browser.close()


class Visitor:
    """Somebody before a page: notes what the page asked of others, and what went wrong in it."""

    def __init__(self, browser: Any, running: Running, *, patience_seconds: float = 30.0, **context: Any) -> None:
        options = {"viewport": {"width": 1366, "height": 768}, "locale": "en-US", "reduced_motion": "reduce", **context}
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(1000 * patience_seconds)
        self.page = self.context.new_page()
        self.running = running
        self.elsewhere: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", self._asked)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _asked(self, request: Any) -> None:
        if not request.url.startswith((self.running.url, "data:", "blob:")):
            self.elsewhere.append(request.url)

    def open(self, query: str = "") -> Any:
        self.page.goto(self.running.url + query)
        self.ready()
        return self.page

    def ready(self) -> None:
        """Wait until the page knows the model."""
        self.page.wait_for_selector("#generate:not([disabled])")

    def close(self) -> None:
        self.context.close()
        assert self.errors == [], self.errors
        assert self.elsewhere == [], "a request left the machine"

    # ---- what people do ----

    def tab(self, name: str, mode: str | None = None) -> None:
        self.page.click(f"#tab-{name}")
        if mode is not None:
            self.page.click(f".mode [data-value={mode}]")

    def write(self, field: str, text: str) -> None:
        """Write into the field of this id, and leave it."""
        self.page.fill(f"#{field}", text)
        self.page.locator(f"#{field}").blur()

    def choose(self, *files: Any, place: int = 0) -> None:
        """Give files to the chooser of the open tab, and wait until they are in the form."""
        before = self.page.locator(".item-card").count()
        self.page.locator(".item-place input[type=file]").nth(place).set_input_files(list(files))
        self.page.wait_for_function(
            "count => document.querySelectorAll('.item-card').length === count", arg=before + len(files)
        )

    def generate(self) -> Job:
        """Press Generate, and return the newest of the jobs that the server then has more than before."""
        before = {job.id for job in self.jobs()}
        self.page.click("#generate")
        return self.new_job(before)

    # ---- what they see ----

    def form(self) -> dict[str, Any]:
        """Return the state that the page shows, from the browser's storage."""
        found: dict[str, Any] = json.loads(self.page.evaluate("() => localStorage['pusa.form'] ?? '{}'"))
        return found

    def jobs(self) -> list[Job]:
        return list(self.running.service.queue.jobs_of("", 100))

    def new_job(self, before: Collection[str]) -> Job:
        deadline = time.monotonic() + 30
        while not (found := [job for job in self.jobs() if job.id not in before]):
            assert time.monotonic() < deadline, "no job has come"
            self.page.wait_for_timeout(20)
        return found[0]

    def request(self, job: Job) -> dict[str, Any]:
        """Return what a job was asked for."""
        found = self.running.service.queue.get(job.id)
        assert found is not None
        return dict(found.request)

    def shows(self, text: str) -> None:
        """Wait until this stands somewhere on the page."""
        self.page.wait_for_function("text => document.body.innerText.includes(text)", arg=text)
