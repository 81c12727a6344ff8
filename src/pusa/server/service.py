"""What the API and the studio both do: accept jobs, show them, follow them, hand out their files.

Every method that touches the disk or the database does it in a thread: the event loop stays free for all others.
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
from pusa.server.http.to_request import EDIT_NOISE, added_length, invalid
from pusa.server.jobs.housekeeping import remove_files
from pusa.server.jobs.queue import Job, JobQueue
from pusa.server.jobs.store import FileStore
from pusa.server.settings import ServerSettings
from pusa.server.submit import Accepting, in_thread, model_name
from pusa.server.uploads import Upload

__all__ = [
    "Content",
    "Readiness",
    "ServiceError",
    "Upload",
    "Variant",
    "VideoService",
    "in_thread",
    "is_id",
    "model_name",
]

Variant = Literal["video", "thumbnail", "spritesheet", "contact_sheet"]

_WATCH_SECONDS = 0.1  # between two looks at the change counter of this process
_LOOK_SECONDS = 1.0  # between two looks at the database, for what other processes have changed
_PACE_SECONDS = 1.0  # for which the usual time of a job is believed
_TYPES = {".mp4": "video/mp4", ".webp": "image/webp", ".png": "image/png", ".gif": "image/gif"}


@dataclass(frozen=True)
class Content:
    """A file of a job: where it is on this machine, or how it is opened where it lies elsewhere."""

    path: Path | None
    open: Callable[[], BinaryIO]
    size: int
    media_type: str
    name: str
    etag: str


@dataclass(frozen=True)
class Readiness:
    """Whether a job that is sent now would be begun at once; `stage` and `percent` are of loading the model."""

    ready: bool
    stage: str
    percent: float
    model: str
    message: str
    queued: int = 0
    running: int = 0
    workers: int = 0


class VideoService(Accepting):
    """Jobs as clients see them. Refusals are `ServiceError`.

    An `owner` sees and changes its own jobs only; "" is everyone where no keys are set, None is anyone.
    """

    def __init__(self, settings: ServerSettings, queue: JobQueue, files: FileStore) -> None:
        super().__init__(settings, queue, files)
        self.started_at = int(time.time())
        self._pace_seconds, self._pace_asked_at = 1.0, float("-inf")
        self.is_stopping = False
        """Set when the server is about to end: whoever follows a job is let go."""

    def close(self) -> None:
        """Let go of those who follow jobs, and of the process that looks at uploads."""
        self.is_stopping = True
        self.prober.close()

    # ---- made from other jobs ----------------------------------------------------------------------------------------

    async def again(
        self,
        id: str,
        *,
        vary_seed: bool = False,
        prompt: str | None = None,
        owner: str | None = "",
        **options: Any,
    ) -> Job:
        """The same job once more; with another seed, or with another prompt. `options`: as for `create`."""
        old = await self.get(id, owner)
        request: dict[str, Any] = {**old.request, "model": old.model}
        if prompt is not None:
            request["prompt"] = prompt
        if vary_seed:
            request["seed"] = secrets.randbits(32)
        request["lora"] = [Path(source).name for source in request.get("lora") or []]
        names = {key: f"input_{number}" for number, key in enumerate(old.inputs)}
        request["conditions"] = [
            {**condition, "file": names[condition["file"]], "sha256": None} for condition in request["conditions"]
        ]
        async with self._fetched({name: key for key, name in names.items()}, id) as uploads:
            return await self.create(
                request, uploads, owner=old.owner, parent=id, seconds=old.seconds, **{"source": "api", **options}
            )

    async def remix(self, id: str, prompt: str, owner: str | None = "", **options: Any) -> Job:
        """The same inputs, settings and seed with another prompt."""
        if not prompt.strip():
            raise invalid("the prompt is empty: say what the new video shows", "prompt")
        return await self.again(id, prompt=prompt, owner=owner, **options)

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
            seconds: of what is added; None: as much as the model makes at once.
            request: further fields of a `GenerationRequest`.
            noise: one multiplier, or one for each latent frame that is taken over.
            options: as for `create`.
        """
        async with self._videos([video], owner) as (uploads, parent):
            fields: dict[str, Any] = {"prompt": prompt, **_look_of(parent), **(request or {}), "task": "extend"}
            fields["prompt"] = fields["prompt"] or (parent.prompt if parent else "")
            if seconds is not None and "frames" not in fields:
                fields |= added_length(seconds, fields, self.defaults)
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
        """Make one video again after a prompt, or join two by a transition; ids of finished videos, or uploads.

        Args:
            positions: latent frames of the one video that are kept; None: all, loosely.
            request, noise, options: as for `extend`.
        """
        if len(videos) not in (1, 2):
            raise invalid(f"{len(videos)} videos are given: give one to change, or two to join", "video")
        async with self._videos(videos, owner) as (uploads, parent):
            uploads = await self.probe(uploads)
            fields: dict[str, Any] = {"prompt": prompt, **_look_of(parent), **(request or {})}
            fields["prompt"] = fields["prompt"] or (parent.prompt if parent else "")
            if len(videos) == 2:
                fields["task"] = "transition"
                fields["conditions"] = [_video_condition(name, noise) for name in uploads]
            else:
                fields["task"] = "generate"
                level = noise or (None if positions else [EDIT_NOISE])
                fields["conditions"] = [_video_condition(name, level, positions) for name in uploads]
                fields.setdefault("frames", self._length_of(next(iter(uploads.values())), fields))
            return await self.create(
                fields, uploads, owner=owner or "", parent=parent.id if parent else None, **options
            )

    def _length_of(self, upload: Upload, fields: Mapping[str, Any]) -> int:
        """Frames of a whole video at the rate it is made again at, down to 4n + 1."""
        assert upload.probed is not None
        frames = round(upload.probed.seconds * (fields.get("fps") or self.defaults.fps))
        return max(1, (min(frames, self.settings.max_video_frames) - 1) // 4 * 4 + 1)

    @asynccontextmanager
    async def _videos(
        self, videos: Sequence[str | Upload], owner: str | None
    ) -> AsyncIterator[tuple[dict[str, Upload], Job | None]]:
        """The videos as uploads, and the first that is a job's."""
        uploads: dict[str, Upload] = {}
        parent: Job | None = None
        async with AsyncExitStack() as stack:
            for number, video in enumerate(videos):
                if isinstance(video, Upload):
                    uploads[f"video_{number}"] = replace(video, wanted="video")
                    continue
                job = await self.get(video, owner)
                parent = parent or job
                key = _result(job, "video")
                uploads |= await stack.enter_async_context(self._fetched({f"video_{number}": key}, video))
            yield uploads, parent

    @asynccontextmanager
    async def _fetched(self, keys: Mapping[str, str], id: str) -> AsyncIterator[dict[str, Upload]]:
        """Files of the store by name, for as long as they are needed."""
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

    # ---- showing -----------------------------------------------------------------------------------------------------

    async def get(self, id: str, owner: str | None = "") -> Job:
        """Raises ServiceError (404) for a job that is not there or not this owner's."""
        job = await in_thread(self.queue.get, id, owner) if is_id(id) else None
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
        """A page of jobs, the newest first unless asked otherwise, and whether there are more.

        Raises ServiceError (400) for an `after` that is not there.
        """
        try:
            return await in_thread(partial(self.queue.page, owner, after=after, limit=limit, order=order))
        except KeyError:
            raise invalid(f"after={str(after)[:60]!r} is no video: take last_id of a page before", "after") from None

    async def position(self, job: Job) -> int | None:
        """Jobs that come before it; None where it does not wait."""
        return await in_thread(self.queue.position, job.id) if job.status == "queued" else None

    async def poll_after_ms(self, job: Job, position: int | None) -> int:
        """When it is worth looking again."""
        if job.status == "in_progress":
            seconds = 1.0 if job.seconds_left is None else job.seconds_left / 10
        else:
            seconds = await self._seconds_per_job() * ((position or 0) + 1) / 10
        return round(1000 * min(5.0, max(0.25, seconds)))

    async def _seconds_per_job(self) -> float:
        """Asked of the queue once in a while only: many who wait are told the same."""
        now = time.monotonic()
        if now - self._pace_asked_at >= _PACE_SECONDS:
            self._pace_asked_at = now  # first, so that those who come meanwhile do not ask too
            found = await in_thread(self.queue.seconds_per_job)
            self._pace_seconds = found or 1.0
        return self._pace_seconds

    async def watch(self, id: str, owner: str | None = "") -> AsyncIterator[Job]:
        """The job as it is, and again at every change, until it has ended, is deleted or the server stops.

        Raises ServiceError (404) at the first step for a job that is not there.
        """
        job = await self.get(id, owner)
        yield job
        while not job.ended and not self.is_stopping:
            seen = self.queue.change_count()
            waited = 0.0
            while self.queue.change_count() == seen and waited < _LOOK_SECONDS and not self.is_stopping:
                await asyncio.sleep(_WATCH_SECONDS)
                waited += _WATCH_SECONDS
            now = await in_thread(self.queue.get, id, owner)
            if now is None:
                return
            if now != job:
                job = now
                yield job

    async def content(self, id: str, variant: Variant = "video", owner: str | None = "") -> Content:
        """A file of a job that is completed.

        Raises:
            ServiceError: 404 for one that is not there or never will be, 409 for one that is not there yet.
        """
        job = await self.get(id, owner)
        key = _result(job, variant)
        suffix = key[key.rfind(".") :]
        try:
            size = await in_thread(self.files.size, key)
        except FileNotFoundError:
            raise ServiceError(404, "file_gone", f"the {variant} of {id} is not kept any more") from None
        return Content(
            path=self.files.local(key),
            open=partial(self.files.open, key),
            size=size,
            media_type=_TYPES.get(suffix, "application/octet-stream"),
            name=f"{id}{'' if variant == 'video' else '_' + variant}{suffix}",
            etag=hashlib.sha256(key.encode()).hexdigest()[:32],  # a key is written once
        )

    async def preview(self, id: str, owner: str | None = "") -> bytes | None:
        """The video so far as one WebP picture, while it is being made."""
        await self.get(id, owner)
        try:
            return await in_thread(self.files.get_bytes, f"previews/{id}.webp")
        except FileNotFoundError:
            return None

    # ---- ending ------------------------------------------------------------------------------------------------------

    async def cancel(self, id: str, owner: str | None = "") -> Job:
        """End a job that waits at once, one that runs after its step; one that has ended stays as it is."""
        await self.get(id, owner)
        try:
            return await in_thread(self.queue.cancel, id, owner)
        except KeyError:
            raise _not_found(id) from None

    async def delete(self, id: str, owner: str | None = "") -> Job:
        """Remove a job and its files; a running one is stopped."""
        await self.get(id, owner)
        try:
            job = await in_thread(self.queue.delete, id, owner)
        except KeyError:
            raise _not_found(id) from None
        await in_thread(remove_files, self.queue, self.files, [job])
        return job

    # ---- the server itself -------------------------------------------------------------------------------------------

    def readiness(self) -> Readiness:
        """From what the workers have last said, here and on other machines. Reads the database: call it in a thread."""
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
            message=_readiness_in_words(is_ready, stage, best),
            queued=counts["queued"],
            running=counts["in_progress"],
            workers=len(workers),
        )


def _readiness_in_words(is_ready: bool, stage: str, state: Mapping[str, Any]) -> str:
    if is_ready:
        return "ready"
    if stage == "no worker":
        return "no worker is there: jobs are accepted and wait; start one with `pusa worker`"
    if state.get("error"):
        return f"the model cannot be loaded: {state['error']}"
    return "the model is being loaded; jobs are accepted and wait"


def is_id(text: str) -> bool:
    return re.fullmatch(ID_PATTERN, text) is not None


def _result(job: Job, variant: Variant) -> str:
    if job.status in ("queued", "in_progress"):
        raise ServiceError(409, "not_ready", f"{job.id} is {job.status}: its {variant} is there once it is completed")
    if variant not in job.results:
        raise ServiceError(404, "no_result", f"{job.id} has no {variant}: it is {job.status}")
    return job.results[variant]


def _video_condition(
    name: str, noise: Sequence[float] | None, positions: Sequence[Any] | None = None
) -> dict[str, Any]:
    levels = {"noise": list(noise)} if noise else {}
    return {"kind": "video", "file": name, "positions": list(positions or []), **levels}


def _look_of(parent: Job | None) -> dict[str, Any]:
    """Size and rate of a finished video, which what is made from it takes over."""
    made = (parent.resolved or {}) if parent else {}
    return {name: made[name] for name in ("width", "height", "fps") if made.get(name) is not None}


def _not_found(id: str) -> ServiceError:
    return ServiceError(404, "video_not_found", f"there is no video {id[:60]!r}: see GET /v1/videos", "id")
