"""Create, list, follow, cancel and delete jobs, and open their files, for the HTTP API and the studio.

Every call that touches the disk or the database runs in a thread, so that the event loop stays free for other clients.
"""

import asyncio
import hashlib
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

from pusa.server.errors import ServiceError
from pusa.server.http.schemas import ID_PATTERN
from pusa.server.http.to_request import EDIT_NOISE, extension_length, invalid_value
from pusa.server.jobs.housekeeping import remove_files
from pusa.server.jobs.queue import Job, JobQueue
from pusa.server.jobs.store import FileStore
from pusa.server.settings import ServerSettings
from pusa.server.submit import JobSubmitter, in_thread, model_name
from pusa.server.uploads import Spool, Upload
from pusa.zoo import GenerationDefaults

__all__ = [
    "Content",
    "Readiness",
    "ServiceError",
    "Upload",
    "Variant",
    "VideoService",
    "in_thread",
    "is_video_id",
    "model_name",
]

Variant = Literal["video", "thumbnail", "spritesheet", "contact_sheet"]

_COUNTER_SECONDS = 0.1  # between two reads of this process' change counter
_DATABASE_SECONDS = 1.0  # between two reads of the database, for changes by other processes
_PACE_SECONDS = 1.0  # for which the mean duration of a job is cached
_MEDIA_TYPES = {".mp4": "video/mp4", ".webp": "image/webp", ".png": "image/png", ".gif": "image/gif"}


@dataclass(frozen=True)
class Content:
    """A file of a job, ready to be sent.

    Attributes:
        path: the file on this machine; None if the store is elsewhere.
        open: opens the file wherever it is.
        size: in bytes.
        name: proposed to whoever downloads it.
    """

    path: Path | None
    open: Callable[[], BinaryIO]
    size: int
    media_type: str
    name: str
    etag: str


@dataclass(frozen=True)
class Readiness:
    """State of the workers: `ready` once one of them has the model in memory, else how far loading is."""

    ready: bool
    stage: str
    percent: float
    model: str
    message: str
    queued: int = 0
    running: int = 0
    workers: int = 0


class VideoService:
    """All operations on jobs that clients have. Every refusal is a `ServiceError`.

    `owner` restricts an operation to the jobs of one API key: its digest, or "" where no keys are set; None lifts the
    restriction.
    """

    def __init__(self, settings: ServerSettings, queue: JobQueue, files: FileStore) -> None:
        self.settings, self.queue, self.files = settings, queue, files
        self.submitter = JobSubmitter(settings, queue, files)
        self.spool = Spool(settings.scratch_folder / "uploads")
        self.started_at = int(time.time())
        self._seconds_per_job, self._pace_read_at = 1.0, float("-inf")
        self.is_stopping = False
        """Set when the server begins to stop: `watch` ends."""

    @property
    def model(self) -> str:
        """Public name of the model."""
        return self.submitter.model

    @property
    def defaults(self) -> GenerationDefaults:
        """The model's defaults for what a request leaves open."""
        return self.submitter.defaults

    def close(self) -> None:
        """End every `watch` and the child process that probes uploads."""
        self.is_stopping = True
        self.submitter.prober.close()

    async def create(self, request: Mapping[str, Any], uploads: Mapping[str, Upload], **options: Any) -> Job:
        """Store a request as a job; arguments and errors are those of `JobSubmitter.create`."""
        return await self.submitter.create(request, uploads, **options)

    # ---- submitting jobs made from other jobs ------------------------------------------------------------------------

    async def rerun(
        self,
        id: str,
        *,
        vary_seed: bool = False,
        prompt: str | None = None,
        owner: str | None = "",
        **options: Any,
    ) -> Job:
        """Submit a job once more, with another seed or prompt if wanted; `options` are those of `create`."""
        old = await self.get(id, owner)
        metadata = self.settings.limit_metadata(old.request.get("metadata"))  # the operator may have changed it since
        request: dict[str, Any] = {**old.request, "model": old.model, "metadata": metadata}
        if prompt is not None:
            request["prompt"] = prompt
        if vary_seed:
            request["seed"] = secrets.randbits(32)
        request["lora"] = [Path(source).name for source in request.get("lora") or []]
        names = {key: f"input_{number}" for number, key in enumerate(old.inputs)}
        request["conditions"] = [
            {**condition, "file": names[condition["file"]], "sha256": None} for condition in request["conditions"]
        ]
        async with self._fetch({name: key for key, name in names.items()}, id) as uploads:
            return await self.create(
                request, uploads, owner=old.owner, parent=id, seconds=old.seconds, **{"source": "api", **options}
            )

    async def remix(self, id: str, prompt: str, owner: str | None = "", **options: Any) -> Job:
        """Submit a job once more with another prompt and the same inputs, settings and seed."""
        if not prompt.strip():
            raise invalid_value("the prompt is empty: say what the new video shows", "prompt")
        return await self.rerun(id, prompt=prompt, owner=owner, **options)

    async def extend(
        self,
        video: str | Upload,
        prompt: str = "",
        seconds: float | None = None,
        *,
        owner: str | None = "",
        request: Mapping[str, Any] | None = None,
        noise: Sequence[float] | None = None,
        **options: Any,
    ) -> Job:
        """Continue a finished video (by id) or an uploaded one after its end.

        Args:
            seconds: length of the addition; None takes what the model makes at once.
            request: further fields of a `GenerationRequest`.
            noise: one noise multiplier, or one for each latent frame of the overlap.
            options: those of `create`.
        """
        async with self._open_videos([video], owner) as (uploads, parent):
            fields: dict[str, Any] = {"prompt": prompt, **_size_and_fps(parent), **(request or {}), "task": "extend"}
            fields["prompt"] = fields["prompt"] or (parent.prompt if parent else "")
            if seconds is not None and "frames" not in fields:
                fields |= extension_length(seconds, fields, self.defaults)
            fields["conditions"] = [_video_condition(name, noise) for name in uploads]
            return await self.create(
                fields, uploads, owner=owner or "", parent=parent.id if parent else None, **options
            )

    async def edit(
        self,
        videos: Sequence[str | Upload],
        prompt: str = "",
        *,
        owner: str | None = "",
        request: Mapping[str, Any] | None = None,
        positions: Sequence[Any] | None = None,
        noise: Sequence[float] | None = None,
        **options: Any,
    ) -> Job:
        """Change one video after a prompt, or join two by a transition.

        Args:
            videos: one or two, each the id of a finished video or an upload.
            positions: latent frames that a single video keeps; None conditions on all, with much noise.
            request, noise, options: those of `extend`.
        """
        if len(videos) not in (1, 2):
            raise invalid_value(f"{len(videos)} videos are given: give one to change, or two to join", "video")
        async with self._open_videos(videos, owner) as (uploads, parent):
            uploads = await self.submitter.probe(uploads)
            fields: dict[str, Any] = {"prompt": prompt, **_size_and_fps(parent), **(request or {})}
            fields["prompt"] = fields["prompt"] or (parent.prompt if parent else "")
            if len(videos) == 2:
                fields["task"] = "transition"
                fields["conditions"] = [_video_condition(name, noise) for name in uploads]
            else:
                fields["task"] = "generate"
                multipliers = noise or (None if positions else [EDIT_NOISE])
                fields["conditions"] = [_video_condition(name, multipliers, positions) for name in uploads]
                fields.setdefault("frames", self._num_frames(next(iter(uploads.values())), fields))
            return await self.create(
                fields, uploads, owner=owner or "", parent=parent.id if parent else None, **options
            )

    def _num_frames(self, upload: Upload, fields: Mapping[str, Any]) -> int:
        """Count the frames of a video at the requested rate, rounded down to 4n + 1."""
        assert upload.info is not None
        frames = round(upload.info.seconds * (fields.get("fps") or self.defaults.fps))
        return max(1, (min(frames, self.settings.max_video_frames) - 1) // 4 * 4 + 1)

    @asynccontextmanager
    async def _open_videos(
        self, videos: Sequence[str | Upload], owner: str | None
    ) -> AsyncIterator[tuple[dict[str, Upload], Job | None]]:
        """Open videos as uploads; also return the first job among them."""
        uploads: dict[str, Upload] = {}
        parent: Job | None = None
        async with AsyncExitStack() as stack:
            for number, video in enumerate(videos):
                if isinstance(video, Upload):
                    uploads[f"video_{number}"] = replace(video, expected_kind="video")
                    continue
                job = await self.get(video, owner)
                parent = parent or job
                key = _result_key(job, "video")
                uploads |= await stack.enter_async_context(self._fetch({f"video_{number}": key}, video))
            yield uploads, parent

    @asynccontextmanager
    async def _fetch(self, keys: Mapping[str, str], id: str) -> AsyncIterator[dict[str, Upload]]:
        """Open files of the store, given as name -> key, as uploads; copies are removed on leaving."""
        copies: list[Path] = []
        uploads: dict[str, Upload] = {}
        try:
            for name, key in keys.items():
                try:
                    path = await in_thread(self.files.fetch, key, self.spool.folder)
                except FileNotFoundError:
                    raise ServiceError(404, "file_gone", f"a file of {id} is not kept any more: send it anew") from None
                if self.files.local(key) is None:
                    copies.append(path)
                uploads[name] = Upload(name=f"{key.rpartition('/')[2]} of {id}", path=path)
            yield uploads
        finally:
            for path in copies:
                path.unlink(missing_ok=True)

    # ---- reading jobs ------------------------------------------------------------------------------------------------

    async def get(self, id: str, owner: str | None = "") -> Job:
        """Read a job. Raises ServiceError (404) if there is none or it belongs to another owner."""
        job = await in_thread(self.queue.get, id, owner) if is_video_id(id) else None
        if job is None:
            raise _not_found(id)
        return job

    async def list(
        self,
        owner: str | None = "",
        *,
        after: str | None = None,
        limit: int = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> tuple[list[Job], bool]:
        """Read a page of jobs, by default the newest first, and whether more follow.

        Args:
            after: id of the last job of the page before; None begins.

        Raises:
            ServiceError: 400 for an unknown `after`.
        """
        try:
            return await in_thread(partial(self.queue.page, owner, after=after, limit=limit, order=order))
        except KeyError:
            raise invalid_value(
                f"after={str(after)[:60]!r} is no video: take last_id of a page before", "after"
            ) from None

    async def position(self, job: Job) -> int | None:
        """Count the queued jobs that run before this one; None if it is not queued."""
        return await in_thread(self.queue.position, job.id) if job.status == "queued" else None

    async def poll_after_ms(self, job: Job, position: int | None) -> int:
        """Advise a client how long to wait before it reads a job again."""
        if job.status == "in_progress":
            seconds = 1.0 if job.seconds_left is None else job.seconds_left / 10
        else:
            seconds = await self._mean_seconds_per_job() * ((position or 0) + 1) / 10
        return round(1000 * min(5.0, max(0.25, seconds)))

    async def _mean_seconds_per_job(self) -> float:
        """Return the queue's mean, cached because many clients poll at once."""
        now = time.monotonic()
        if now - self._pace_read_at >= _PACE_SECONDS:
            self._pace_read_at = now  # before the read, so that concurrent callers take the cached value
            mean = await in_thread(self.queue.seconds_per_job)
            self._seconds_per_job = mean or 1.0
        return self._seconds_per_job

    async def watch(self, id: str, owner: str | None = "") -> AsyncIterator[Job]:
        """Yield a job now and after every change, until it has ended, is deleted or the server stops.

        Raises ServiceError (404) at the first step if there is no such job.
        """
        job = await self.get(id, owner)
        yield job
        while not job.ended and not self.is_stopping:
            seen = self.queue.change_count()
            waited = 0.0
            while self.queue.change_count() == seen and waited < _DATABASE_SECONDS and not self.is_stopping:
                await asyncio.sleep(_COUNTER_SECONDS)
                waited += _COUNTER_SECONDS
            now = await in_thread(self.queue.get, id, owner)
            if now is None:
                return
            if now != job:
                job = now
                yield job

    async def content(self, id: str, variant: Variant = "video", owner: str | None = "") -> Content:
        """Find a file of a completed job.

        Raises:
            ServiceError: 404 if there is no such job or file, 409 if the job is not completed yet.
        """
        job = await self.get(id, owner)
        key = _result_key(job, variant)
        suffix = key[key.rfind(".") :]
        try:
            size = await in_thread(self.files.size, key)
        except FileNotFoundError:
            raise ServiceError(404, "file_gone", f"the {variant} of {id} is not kept any more") from None
        return Content(
            path=self.files.local(key),
            open=partial(self.files.open, key),
            size=size,
            media_type=_MEDIA_TYPES.get(suffix, "application/octet-stream"),
            name=f"{id}{'' if variant == 'video' else '_' + variant}{suffix}",
            etag=hashlib.sha256(key.encode()).hexdigest()[:32],  # the file of a key never changes
        )

    async def preview(self, id: str, owner: str | None = "") -> bytes | None:
        """Read the latest preview of a running job, a WebP image; None if there is none."""
        await self.get(id, owner)
        try:
            return await in_thread(self.files.get_bytes, f"previews/{id}.webp")
        except FileNotFoundError:
            return None

    # ---- cancelling and deleting jobs --------------------------------------------------------------------------------

    async def cancel(self, id: str, owner: str | None = "") -> Job:
        """Cancel a job: at once if it is queued, after its current step if it runs; an ended job is left alone."""
        await self.get(id, owner)
        try:
            return await in_thread(self.queue.cancel, id, owner)
        except KeyError:
            raise _not_found(id) from None

    async def delete(self, id: str, owner: str | None = "") -> Job:
        """Remove a job and its files; a running job is stopped."""
        await self.get(id, owner)
        try:
            job = await in_thread(self.queue.delete, id, owner)
        except KeyError:
            raise _not_found(id) from None
        await in_thread(remove_files, self.queue, self.files, [job])
        return job

    # ---- state of the server -----------------------------------------------------------------------------------------

    def readiness(self) -> Readiness:
        """Summarise the latest reports of all workers, on any machine. Reads the database: call it in a thread."""
        counts = self.queue.counts()
        workers = self.queue.workers(seen_within_seconds=max(2 * self.settings.lease_seconds, 10.0))
        states = [worker.state for worker in workers]
        best = max(states, key=lambda state: (bool(state.get("ready")), state.get("percent") or 0.0), default={})
        is_ready = bool(best.get("ready"))
        stage = str(best.get("stage") or "starting") if states or self.settings.workers else "no worker"
        stage = "starting" if stage == "stopped" else stage
        return Readiness(
            ready=is_ready,
            stage=stage,
            percent=100.0 if is_ready else float(best.get("percent") or 0.0),
            model=self.model,
            message=_readiness_message(is_ready, stage, best),
            queued=counts["queued"],
            running=counts["in_progress"],
            workers=len(workers),
        )


def _readiness_message(is_ready: bool, stage: str, state: Mapping[str, Any]) -> str:
    if is_ready:
        return "ready"
    if stage == "no worker":
        return "no worker is there: jobs are accepted and wait; start one with `pusa worker`"
    if state.get("error"):
        return f"the model cannot be loaded: {state['error']}"
    return "the model is being loaded; jobs are accepted and wait"


def is_video_id(text: str) -> bool:
    return re.fullmatch(ID_PATTERN, text) is not None


def _result_key(job: Job, variant: Variant) -> str:
    if job.status in ("queued", "in_progress"):
        raise ServiceError(409, "not_ready", f"{job.id} is {job.status}: its {variant} is there once it is completed")
    if variant not in job.results:
        raise ServiceError(404, "no_result", f"{job.id} has no {variant}: it is {job.status}")
    return job.results[variant]


def _video_condition(
    name: str, noise: Sequence[float] | None, positions: Sequence[Any] | None = None
) -> dict[str, Any]:
    condition: dict[str, Any] = {"kind": "video", "file": name, "positions": list(positions or [])}
    return condition | ({"noise": list(noise)} if noise else {})


def _size_and_fps(parent: Job | None) -> dict[str, Any]:
    """Read size and frame rate of a finished video, the defaults of a video made from it."""
    resolved = (parent.resolved or {}) if parent else {}
    return {name: resolved[name] for name in ("width", "height", "fps") if resolved.get(name) is not None}


def _not_found(id: str) -> ServiceError:
    return ServiceError(404, "video_not_found", f"there is no video {id[:60]!r}: see GET /v1/videos", "id")
