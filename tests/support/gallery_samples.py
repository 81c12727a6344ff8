"""Fill a studio without workers with videos that a test leaves as it wants them, and look at its page."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from studio_samples import studio

from pusa.request import GenerationRequest
from pusa.server.jobs.job import Job, NewJob
from pusa.server.service import VideoService
from pusa.server.studio import examples

CLIP = (examples.CLIPS / "apple.mp4").read_bytes()
STILL = (examples.CLIPS / "apple.webp").read_bytes()


@dataclass
class Filled:
    """A running studio, whose jobs move on when a test says so."""

    url: str
    service: VideoService

    def submit(
        self, prompt: str = "a red apple bounces on the grass", *, batch: str | None = None, **fields: Any
    ) -> Job:
        request = GenerationRequest.model_validate({"prompt": prompt, "seed": 7, "steps": 10, **fields})
        new = NewJob(
            request=request.model_dump(mode="json"),
            model="mini",
            prompt=prompt,
            seconds="2.06",
            size="96x96",
            batch=batch,
        )
        job, _ = self.service.queue.submit(new)
        return job

    def begin(self) -> Job:
        """Let the first job that waits run."""
        job = self.service.queue.claim("worker", lease_seconds=600)
        assert job is not None
        return job

    def reach(self, job: Job, step: int, *, steps: int = 10, seconds_left: float = 42.0) -> None:
        """Let a running job have done so many steps, with a preview."""
        self.service.files.put_bytes(f"previews/{job.id}.webp", STILL)
        self.service.queue.heartbeat(
            job,
            lease_seconds=600,
            stage="denoise",
            step=step,
            steps=steps,
            progress=100 * step / steps,
            seconds_left=seconds_left,
        )

    def finish(self, job: Job) -> str:
        """Let a running job be done; return its id."""
        pictures = {kind: (f"{kind}.webp", STILL) for kind in ("thumbnail", "contact_sheet")}
        files = {"video": ("video.mp4", CLIP), **pictures}
        keys = {}
        for kind, (name, content) in files.items():
            keys[kind] = f"results/{job.id}/{job.attempt}/{name}"
            self.service.files.put_bytes(keys[kind], content)
        self.service.queue.finish(job, results=keys, timings={"denoise": 3.0})
        return job.id

    def fail(self, job: Job) -> str:
        self.service.queue.fail(job, "internal_error", "the engine was told to fail", retry=False)
        return job.id

    def make(self, *args: Any, **fields: Any) -> str:
        """A finished video; return its id. No other job may wait."""
        asked = self.submit(*args, **fields)
        job = self.begin()
        assert job.id == asked.id
        return self.finish(job)


@contextmanager
def filled(folder: Path, **changes: Any) -> Iterator[Filled]:
    with studio(folder, workers=0, **changes) as running:
        yield Filled(running.url, running.service)


@dataclass
class Looker:
    """Somebody before the page in one browser, with one or more tabs."""

    browser: Any
    url: str
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        options = {"viewport": {"width": 1366, "height": 768}, "locale": "en-US", **self.options}
        self.context = self.browser.new_context(**options)
        self.context.set_default_timeout(30_000)
        self.errors: list[str] = []
        self.streams = 0
        self.context.on("request", self._asked)
        self.context.on("weberror", lambda error: self.errors.append(str(error.error)))

    def _asked(self, request: Any) -> None:
        self.streams += request.url.endswith("/v1/events")

    def open(self, *ids: str) -> Any:
        """Open a tab with these videos on its stage."""
        page = self.context.new_page()
        page.goto(self.url + ("?" + "&".join(f"job={id}" for id in ids) if ids else ""))
        page.wait_for_selector(".gallery")
        return page

    def close(self) -> None:
        self.context.close()
