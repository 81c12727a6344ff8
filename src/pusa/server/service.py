"""Create, list, follow, cancel and delete jobs, and open their files, for the HTTP API and the studio.

Every call that touches the disk or the database runs in a thread, so that the event loop stays free for other clients.
"""

import logging
import secrets
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pusa import zoo
from pusa.codes import CodedText
from pusa.defaults import GenerationDefaults
from pusa.request import ResolvedRequest
from pusa.server.changes import JobChanges, is_video_id, not_found
from pusa.server.clock import TrustedClock
from pusa.server.content import Content, result_key, speaking_name
from pusa.server.derived import final_of, num_frames_of, prompt_of, request_of, size_and_fps, video_condition
from pusa.server.enhancer import PromptEnhancer
from pusa.server.errors import ServiceError
from pusa.server.events import EventFeed
from pusa.server.exports import VideoExports
from pusa.server.feed import JobFeed, Snapshot
from pusa.server.files import FileLibrary
from pusa.server.http.keys import WrongKeys
from pusa.server.http.to_request import EDIT_NOISE, extension_length
from pusa.server.http.validation import invalid_value
from pusa.server.jobs.integrity import FileIntegrity
from pusa.server.jobs.queue import EVERY_JOB, Job, JobFilter, JobQueue, Status
from pusa.server.jobs.store import FileStore, fragment_key
from pusa.server.plans import Estimate, PlanFunction, Planner, plan_model
from pusa.server.readiness import ServerState, read_readiness
from pusa.server.settings import ServerSettings
from pusa.server.submit import JobSubmitter, in_thread, model_name
from pusa.server.transfers.reservations import Arrival, DiskSpace, TextMemory
from pusa.server.transfers.uploads import Spool, Upload

logger = logging.getLogger(__name__)

__all__ = [
    "Content",
    "ServerState",
    "ServiceError",
    "Upload",
    "Variant",
    "VideoService",
    "in_thread",
    "is_video_id",
    "model_name",
]

Variant = Literal["video", "thumbnail", "spritesheet", "contact_sheet"]

_PACE_SECONDS = 1.0  # for which the mean duration of a job is cached


class VideoService(JobChanges):
    """All operations on jobs that clients have. Every refusal is a `ServiceError`.

    `owner` restricts an operation to the jobs of one API key: its digest, or "" where no keys are set; None lifts the
    restriction.
    """

    def __init__(
        self, settings: ServerSettings, queue: JobQueue, files: FileStore, plan: PlanFunction = plan_model
    ) -> None:
        self.settings, self.queue, self.files = settings, queue, files
        self.planner = Planner(settings, queue, plan)
        self.submitter = JobSubmitter(settings, queue, files, self.planner)
        self.spool = Spool(settings.scratch_folder / "uploads")
        self.started_at = int(time.time())
        self.clock = TrustedClock()
        self.feed = JobFeed(queue, lambda: self.is_stopping)
        self.events = EventFeed(queue, files, self.readiness, lambda: self.is_stopping)
        self.integrity = FileIntegrity(queue, files)
        self.library = FileLibrary(self)
        self.exports = VideoExports(self)
        self.enhancer = PromptEnhancer(settings, _known_words(settings.model))
        self.wrong_keys = WrongKeys()
        self._disk = DiskSpace(settings.min_free_bytes)
        self._text_memory = TextMemory(settings.max_text_memory_bytes)
        self._streams: Counter[str] = Counter()  # open event streams by owner
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

    @property
    def is_followed(self) -> bool:
        """Tell whether an event stream is open, as every page has one."""
        return bool(self._streams)

    def close(self) -> None:
        """End every `watch` and the child process that probes uploads."""
        self.is_stopping = True
        self.submitter.prober.close()

    def arrival(self, length: int | None, *folders: Path) -> Arrival:
        """Reserve space for a request's body, in the spool and in `folders` (the store by default); in a thread.

        Raises StorageFullError and StorageUnavailableError.
        """
        targets = folders or ((self.files.folder,) if self.files.folder else ())
        return Arrival(self._disk, self._text_memory, (self.spool.folder, *targets), length)

    async def create(self, request: Mapping[str, Any], uploads: Mapping[str, Upload], **options: Any) -> Job:
        """Store a request as a job; arguments and errors are those of `JobSubmitter.create`."""
        return await self.submitter.create(request, uploads, **options)

    async def estimate(
        self, request: Mapping[str, Any], uploads: Mapping[str, Upload]
    ) -> tuple[ResolvedRequest, Estimate]:
        """Tell what a request would need, without a job; arguments and errors are those of `create`."""
        return await self.submitter.estimate(request, uploads)

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
        request, keys = request_of(old, self.settings)
        if prompt is not None:
            request |= {"prompt": prompt, "prompts": []}
        if vary_seed:
            request["seed"] = secrets.randbits(32)
        return await self._create_from(old, request, keys, options)

    async def final(self, id: str, owner: str | None = "", *, asked: Mapping[str, Any], **options: Any) -> Job:
        """Submit the final of a finished draft, with the same inputs; `options` are those of `create`.

        Args:
            asked: `noise`, `size` and `steps` of `pusa.request.final_request`.

        Raises:
            ServiceError: 404 without such a job, 409 before it is completed, 400 if it is no draft.
        """
        job = await self.get(id, owner)
        request, keys = request_of(job, self.settings)
        keys["draft"] = result_key(job, "video")
        fields = final_of(job, request, "draft", self.defaults, **asked)
        return await self._create_from(job, fields, keys, options)

    async def _create_from(
        self, job: Job, request: Mapping[str, Any], keys: Mapping[str, str], options: Mapping[str, Any]
    ) -> Job:
        """Submit a request made from a job and as long as it; `keys` name the files of the store that it needs."""
        async with self._fetch(keys, job.id) as uploads:
            return await self.create(request, uploads, owner=job.owner, parent=job.id, seconds=job.seconds, **options)

    async def remix(self, id: str, prompt: str, owner: str | None = "", **options: Any) -> Job:
        """Submit a job once more with another prompt and the same inputs, settings and seed."""
        if not prompt.strip() and self.defaults.has_text:
            raise invalid_value("the prompt is empty: say what the new video shows", "prompt", "prompt_missing")
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
            fields: dict[str, Any] = {
                "prompt": prompt,
                **size_and_fps(parent, request),
                **(request or {}),
                "task": "extend",
            }
            fields["prompt"] = prompt_of(fields, parent)
            if seconds is not None and "frames" not in fields:
                fields |= extension_length(seconds, fields, self.defaults)
            fields["conditions"] = [video_condition(name, noise) for name in uploads]
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
            message = f"{len(videos)} videos are given: give one to change, or two to join"
            raise invalid_value(message, "video", "too_many_videos", given=len(videos), limit=2)
        async with self._open_videos(videos, owner) as (uploads, parent):
            uploads = await self.submitter.probe(uploads)
            fields: dict[str, Any] = {"prompt": prompt, **size_and_fps(parent, request), **(request or {})}
            fields["prompt"] = prompt_of(fields, parent)
            if len(videos) == 2:
                fields["task"] = "transition"
                fields["conditions"] = [video_condition(name, noise) for name in uploads]
            else:
                fields["task"] = "generate"
                multipliers = noise or (None if positions else [EDIT_NOISE])
                fields["conditions"] = [video_condition(name, multipliers, positions) for name in uploads]
                info = next(iter(uploads.values())).info
                assert info is not None
                most = self.settings.max_video_frames
                fields.setdefault("frames", num_frames_of(info.seconds, fields.get("fps"), most, self.defaults))
            return await self.create(
                fields, uploads, owner=owner or "", parent=parent.id if parent else None, **options
            )

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
                    parent = parent or (await self.get(video.parent, owner) if video.parent else None)
                    continue
                job = await self.get(video, owner)
                parent = parent or job
                key = result_key(job, "video")
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
                if not await in_thread(self.integrity.is_intact, id, key):
                    raise await self.damaged(id, key)
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
            raise not_found(id)
        return job

    async def list(
        self,
        owner: str | None = "",
        *,
        after: str | None = None,
        limit: int = 20,
        order: Literal["asc", "desc"] = "desc",
        statuses: Collection[Status] | None = None,
        filter: JobFilter = EVERY_JOB,
    ) -> tuple[list[Job], bool]:
        """Read a page of jobs, by default the newest first, and whether more follow.

        Args:
            after: id of the last job of the page before; None begins.
            statuses: only jobs in these; None: all.
            filter: further limits.

        Raises:
            ServiceError: 400 for an unknown `after`.
        """
        try:
            page = partial(
                self.queue.page, owner, after=after, limit=limit, order=order, statuses=statuses, filter=filter
            )
            return await in_thread(page)
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
        async with aclosing(self.feed.follow(await self.get(id, owner))) as snapshots:
            async for snapshot in snapshots:
                yield snapshot.job

    async def follow(self, job: Job) -> AsyncGenerator[Snapshot, None]:
        """Yield snapshots of a job, just read, like `watch`; they share what is made of them with other followers.

        Raises ServiceError (429) at the first step if its owner follows too many.
        """
        with self._counted_stream(job.owner):
            async with aclosing(self.feed.follow(job)) as snapshots:
                async for snapshot in snapshots:
                    yield snapshot

    async def follow_all(self, owner: str, is_allowed: Callable[[], Awaitable[bool]]) -> AsyncGenerator[bytes, None]:
        """Yield the events of all jobs of an owner, for as long as `is_allowed`; see `EventFeed.follow`.

        Raises ServiceError (429) at the first step like `follow`, and 503 if the queue cannot be reached.
        """
        with self._counted_stream(owner):
            async with aclosing(self.events.follow(owner, is_allowed)) as texts:
                async for text in texts:
                    yield text

    @contextmanager
    def _counted_stream(self, owner: str) -> Iterator[None]:
        """Count an event stream of an owner. Raises ServiceError (429) if it has too many."""
        limit = self.settings.key_stream_limit
        if owner and self._streams[owner] >= limit:
            raise ServiceError(
                429,
                "too_many_streams",
                f"your key follows {limit} videos at once, which is the limit: close a stream, or poll",
                headers={"retry-after": "5"},
                values={"limit": limit},
            )
        self._streams[owner] += 1
        try:
            yield
        finally:
            self._streams[owner] -= 1
            if not self._streams[owner]:
                del self._streams[owner]

    async def content(self, id: str, variant: Variant = "video", owner: str | None = "") -> Content:
        """Find a file of a completed job.

        Raises:
            ServiceError: 404 if there is no such job or file, 409 if the job is not completed yet.
        """
        job = await self.get(id, owner)
        key = result_key(job, variant)
        try:
            size = await in_thread(self.files.size, key)
            if not await in_thread(self.integrity.is_intact, id, key):
                raise await self.damaged(id, key)
        except FileNotFoundError:
            raise ServiceError(404, "file_gone", f"the {variant} of {id} is not kept any more") from None
        return Content.of(self.files, key, size, f"{speaking_name(job)}{'' if variant == 'video' else '_' + variant}")

    async def damaged(self, id: str, key: str) -> ServiceError:
        """Have a job with a damaged result made again; return the error that says so."""
        logger.error("%s of %s is damaged: its size or sha256 is not what was stored", key, id)
        if key.startswith("inputs/"):
            return ServiceError(409, "file_damaged", f"an input of {id} is damaged on the server's disk: send it anew")
        note = CodedText("made_again", "a file of it was damaged on the server's disk, so it was made again")
        completed: tuple[Status] = ("completed",)
        await in_thread(partial(self.queue.restart, id, statuses=completed, note=note))
        message = f"a file of {id} was damaged on the server's disk and is made again: wait until it is completed"
        return ServiceError(409, "file_damaged", message)

    async def preview(self, id: str, owner: str | None = "") -> bytes | None:
        """Read the latest preview of a running job, a WebP image; None if there is none."""
        return await self.preview_of(await self.get(id, owner))

    async def preview_of(self, job: Job) -> bytes | None:
        """Read the latest preview of a job that was just read, like `preview`."""
        try:
            return await in_thread(self.files.get_bytes, f"previews/{job.id}.webp")
        except FileNotFoundError:
            return None

    async def fragment_of(self, job: Job, number: int) -> bytes | None:
        """Read a part, from 0 on, of the video that a running job makes piece by piece; None if it is not there."""
        try:
            return await in_thread(self.files.get_bytes, fragment_key(job.id, job.attempt, number))
        except FileNotFoundError:
            return None

    # ---- state of the server -----------------------------------------------------------------------------------------

    def readiness(self) -> ServerState:
        """Summarise the latest reports of all workers, on any machine. Reads the database: call it in a thread."""
        return read_readiness(self.queue, self.settings, self.model)


def _known_words(model: str) -> list[str]:
    """List the phrases that a small model was trained on, one for each meaning; none for a model that reads any."""
    entry = zoo.find(model)
    return [group[0] for groups in (entry.words if entry else {}).values() for group in groups]
