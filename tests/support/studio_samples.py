"""Serve the studio with a quick engine, and drive it with a browser."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
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
from pusa.server.plans import PlanFunction, plan_model
from pusa.server.service import VideoService
from pusa.server.settings import ServerSettings
from pusa.server.worker.local import LocalExecutor, Placement

ENGINE = "studio_engine:StudioEngine"
# The first draws no window: the others' own pages can take all of a small machine's time.
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


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
    port = free_port()

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

    def __init__(self, browser: Any, url: str, *, patience_seconds: float = 60.0, **context: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, "locale": "en-US", **context})
        self.context.set_default_timeout(1000 * patience_seconds)
        self.page = self.context.new_page()
        self.url = url
        self.elsewhere: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", self._asked)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)

    def _asked(self, request: Any) -> None:
        if not request.url.startswith((self.url, "data:", "blob:")):
            self.elsewhere.append(request.url)

    def open(self, query: str = "") -> Any:
        self.page.goto(self.url + query)
        self.page.wait_for_selector("#generate")
        self.page.wait_for_selector(".pusa-example:visible")
        return self.page

    def close(self) -> None:
        self.context.close()

    # ---- what people do ----

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name, exact=True).click()

    def example(self, name: str) -> None:
        self.page.click(f"[data-example={name}]:visible")

    def generate(self) -> None:
        self.page.click("#generate")

    def field(self, elem_id: str) -> Any:
        kinds = ("textarea", "input[type=text]", "input[type=number]")
        return self.page.locator(", ".join(f"#{elem_id} {kind}" for kind in kinds)).first

    def write(self, elem_id: str, text: str, *, then: str | None = None) -> None:
        """Write into a field, and press a key there; once more where the page was still drawing it."""
        for _ in range(20):
            self.field(elem_id).fill(text)
            if then is not None:
                self.field(elem_id).press(then)
            self.page.wait_for_timeout(250)
            if self.field(elem_id).input_value() == text:
                return
        raise AssertionError(f"#{elem_id} does not take {text!r}")

    def holds(self, elem_id: str, text: str) -> None:
        """Wait until a text field holds this."""
        self.page.wait_for_function(
            "([id, text]) => document.querySelector(`#${id} textarea, #${id} input`)?.value === text",
            arg=[elem_id, text],
        )

    def job(self) -> str:
        """The id of the job on the stage, from the page's address."""
        return self.page.evaluate("new URLSearchParams(location.search).get('job') || ''")

    def new_job(self, after: str) -> str:
        self.page.wait_for_function(
            "old => { const job = new URLSearchParams(location.search).get('job') || ''; return job && job !== old }",
            arg=after,
        )
        return self.job()

    def made(self, act: Callable[[], None]) -> str:
        """Do something, wait until its video plays, and return the job's id."""
        before = self.job()
        act()
        job = self.new_job(before)
        self.plays(job)
        return job

    def plays(self, job: str) -> None:
        self.page.wait_for_function(
            """job => { const video = document.querySelector('.st-player'); return video?.src.includes(job)
            && video.readyState >= 2 && video.currentTime > 0 && video.videoWidth > 0 }""",
            arg=job,
        )

    def settings(self) -> dict[str, str]:
        """Return the text under the video on the stage."""
        names = self.page.locator(".st-settings dt").all_inner_texts()
        return dict(zip(names, self.page.locator(".st-settings dd").all_inner_texts(), strict=True))

    def shows(self, levels: list[str]) -> None:
        """Wait until the timeline shows this: for each cell its noise if it is given, "" if it is free."""
        self.page.wait_for_function(
            """levels => [...document.querySelectorAll('.tl-cell')]
            .map(cell => cell.querySelector('.tl-level')?.textContent ?? '').join() === levels""",
            arg=",".join(levels),
        )
