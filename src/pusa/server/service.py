"""What the API and the studio both do: accept jobs, show them, follow them, hand out their files.

Every method that touches the disk or the database does it in a thread: the event loop stays free for all others.
"""

import asyncio
import hashlib
import json
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

import anyio
import anyio.to_thread
from pydantic import ValidationError

from pusa import zoo
from pusa.request import GenerationRequest, ResolvedRequest
from pusa.server.errors import ServiceError
from pusa.server.files import FileStore
from pusa.server.housekeeping import check_space, remove_files
from pusa.server.jobs import Job, JobQueue, NewJob, QueueFull, QueueUnavailable, new_id
from pusa.server.logs import log_context
from pusa.server.schemas import ID_PATTERN
from pusa.server.settings import ServerSettings
from pusa.server.translate import EDIT_NOISE, added_length, invalid, refusal, shown_number, turned
from pusa.server.uploads import PROBES_AT_ONCE, ProbeLimits, Prober, Spool, Upload, shown_name

__all__ = ["Content", "Readiness", "ServiceError", "Upload", "Variant", "VideoService"]

logger = logging.getLogger(__name__)

T = TypeVar("T")
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


class VideoService:
    """Jobs as clients see them. Refusals are `ServiceError`.

    An `owner` sees and changes its own jobs only; "" is everyone where no keys are set, None is anyone.
    """

    def __init__(self, settings: ServerSettings, queue: JobQueue, files: FileStore) -> None:
        self.settings, self.queue, self.files = settings, queue, files
        self.spool = Spool(settings.scratch_folder / "uploads")
        self.prober = Prober(
            ProbeLimits(
                max_bytes=settings.max_body_bytes,
                max_pixels=settings.max_upload_pixels,
                max_frames=settings.max_upload_frames,
                max_seconds=settings.max_upload_seconds,
                max_decode_seconds=settings.probe_seconds,
                memory_bytes=settings.probe_memory_bytes,
                wall_seconds=settings.probe_seconds,
            )
        )
        self._looking = anyio.CapacityLimiter(PROBES_AT_ONCE)  # they may take long, and must not use up all threads
        self.model = model_name(settings.model)
        self.loras = {Path(source).name: source for source in settings.lora}
        self.started_at = int(time.time())
        self._pace_seconds, self._pace_asked_at = 1.0, float("-inf")
        self.is_stopping = False
        """Set when the server is about to end: whoever follows a job is let go."""

    def close(self) -> None:
        """Let go of those who follow jobs, and of the process that looks at uploads."""
        self.is_stopping = True
        self.prober.close()

    @cached_property
    def defaults(self) -> zoo.GenerationDefaults:
        """Of the model; `generate` takes the tiny one where the embedded one is not installed."""
        is_missing = self.settings.model == "mini" and "mini" not in zoo.ZOO
        return zoo.defaults_of("tiny" if is_missing else self.settings.model)

    # ---- accepting ---------------------------------------------------------------------------------------------------

    async def probe(self, uploads: Mapping[str, Upload]) -> dict[str, Upload]:
        """The same files with what they are. Raises ServiceError (400) for one that cannot be read."""
        unknown = [name for name, upload in uploads.items() if upload.probed is None]
        look = partial(self.prober.probe, [uploads[name] for name in unknown])
        found = await anyio.to_thread.run_sync(look, limiter=self._looking) if unknown else []
        return {**uploads, **{n: replace(uploads[n], probed=p) for n, p in zip(unknown, found, strict=True)}}

    async def create(
        self,
        request: Mapping[str, Any],
        uploads: Mapping[str, Upload],
        *,
        owner: str = "",
        source: str = "api",
        parent: str | None = None,
        idempotency_key: str | None = None,
        priority: int = 0,
        is_retry: bool = False,
        seconds: str | None = None,
        traceparent: str | None = None,
    ) -> Job:
        """Accept a job: when this returns, its inputs and its row are on disk.

        Args:
            request: a `GenerationRequest` as JSON. Its conditions' `file` names an upload; their `kind` may be left
                out, the file says it. `model` and `lora` are names that the operator offers.
            uploads: by name. They are copied; the caller removes them.
            parent: the job that this one was made from.
            idempotency_key: of this owner: the job that was made with it is returned, whatever it has become.
            is_retry: the client says that it sent this before: the same request, if it came a short while ago, is
                returned.
            seconds: the length as the client said it; None: that of the request.

        Raises:
            ServiceError: 400 for what cannot be made, 422 for a key that was used for another request, 429 where too
                much waits, 503 where the queue cannot be reached, 507 where the disk is full.
        """
        await in_thread(check_space, self.files, self.settings.min_free_bytes)
        uploads = await self.probe(uploads)
        checked = self._checked(request, uploads)
        resolved = self._resolved(checked, uploads)
        digests = {name: await in_thread(_sha256, upload.path) for name, upload in uploads.items()}
        fingerprint = _fingerprint(checked, digests)
        id = new_id()
        keys = {
            name: f"inputs/{id}/{number}{upload.probed.suffix if upload.probed else ''}"
            for number, (name, upload) in enumerate(uploads.items())
        }
        stored = checked.model_copy(
            update={
                "seed": resolved.seed,  # a run that goes on elsewhere must be the same run
                "conditions": [
                    spec.model_copy(update={"file": keys[spec.file], "sha256": digests[spec.file]})
                    for spec in checked.conditions
                ],
            }
        )
        new = NewJob(
            id=id,
            owner=owner,
            request=stored.model_dump(mode="json"),
            model=self.model,
            prompt=checked.prompt,
            seconds=seconds or shown_number(_total_seconds(resolved, uploads)),
            size=f"{resolved.width}x{resolved.height}",
            inputs=tuple(keys.values()),
            priority=priority,
            parent=parent,
            idempotency_key=idempotency_key,
            fingerprint=fingerprint,
            source=source,
            traceparent=traceparent,
        )
        with log_context(job=id):
            job = await self._accepted(new, {keys[name]: upload.path for name, upload in uploads.items()}, is_retry)
        if job.id != id and job.fingerprint != fingerprint:
            raise ServiceError(
                422,
                "idempotency_key_reused",
                f"this Idempotency-Key belongs to another request, {job.id}: use a new key for a new request",
            )
        return job

    async def _accepted(self, new: NewJob, inputs: Mapping[str, Path], is_retry: bool) -> Job:
        settings = self.settings
        is_new = False
        try:
            for key, path in inputs.items():
                await in_thread(self.files.put_file, key, path)
            submit = partial(
                self.queue.submit,
                new,
                total_limit=settings.queue_limit,
                key_limit=settings.key_queue_limit if new.owner else None,
                same_fingerprint_seconds=settings.retry_window_seconds if is_retry else None,
            )
            job, is_new = await in_thread(submit)
        except QueueFull as full:
            wait_ms = round(full.retry_after_seconds * 1000)
            wait = {"retry-after": str(max(1, round(full.retry_after_seconds))), "retry-after-ms": str(wait_ms)}
            raise ServiceError(429, "queue_full", str(full), headers=wait) from None
        finally:
            if not is_new and inputs:
                await in_thread(self.files.delete_prefix, f"inputs/{new.id}")
        if is_new:
            logger.info("accepted", extra={"task": new.request["task"], "size": new.size, "source": new.source})
        return job

    def _checked(self, request: Mapping[str, Any], uploads: Mapping[str, Upload]) -> GenerationRequest:
        """The request with the operator's names for model and LoRA replaced by what they stand for."""
        values = {name: value for name, value in request.items() if value is not None}
        if values.get("model", self.model) != self.model:
            told = f"model {str(values['model'])[:60]!r} is not offered here: there is {self.model}"
            raise ServiceError(400, "model_not_found", told, "model")
        values["model"] = self.settings.model
        values["lora"] = [self._lora(name) for name in values.get("lora") or self.loras]
        values["conditions"] = [_with_kind(condition, uploads) for condition in values.get("conditions") or []]
        try:
            checked = GenerationRequest.model_validate_json(json.dumps(values))
        except ValidationError as error:
            raise refusal(error) from None
        for spec in checked.conditions:
            upload = uploads.get(spec.file)
            if upload is None or upload.probed is None:
                raise invalid(f"file {spec.file[:60]!r} was not sent along", "input_reference")
            if upload.probed.kind != spec.kind:
                told = f"{shown_name(upload)} is {_a(upload.probed.kind)}, and {_a(spec.kind)} is needed here"
                raise invalid(told, "input_reference")
        unused = set(uploads) - {spec.file for spec in checked.conditions}
        if unused:
            told = f"{shown_name(uploads[min(unused)])} is not used: leave it out, or say where it goes"
            raise invalid(told, "input_reference")
        return checked

    def _lora(self, name: str) -> str:
        if name not in self.loras:
            there = f"there are {', '.join(self.loras)}" if self.loras else "this server offers none"
            raise ServiceError(400, "lora_not_found", f"LoRA {str(name)[:60]!r} is not offered: {there}", "lora")
        return self.loras[name]

    def _resolved(self, request: GenerationRequest, uploads: Mapping[str, Upload]) -> ResolvedRequest:
        """As it would be made, within the operator's limits."""
        first = uploads[request.conditions[0].file].probed if request.conditions else None
        try:
            resolved = turned(request, first, self.defaults).resolved(self.defaults)
        except ValueError as error:
            raise invalid(str(error).splitlines()[0]) from None
        settings, size = self.settings, f"{resolved.width}x{resolved.height}"
        pixels = resolved.width * resolved.height
        for param, asked, value, most in (
            ("size", f"{size}, {pixels} pixels", pixels, settings.max_video_pixels),
            ("seconds", f"{resolved.frames} frames", resolved.frames, settings.max_video_frames),
            ("num_inference_steps", f"{resolved.steps} steps", resolved.steps, settings.max_steps),
        ):
            if value > most:
                raise invalid(f"{asked} are too many: this server makes at most {most}", param)
        return resolved

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
            self._pace_seconds = await in_thread(self.queue.seconds_per_job) or 1.0
        return self._pace_seconds

    async def watch(self, id: str, owner: str | None = "") -> AsyncIterator[Job]:
        """The job as it is, and again at every change, until it has ended, is deleted or the server stops.

        Raises ServiceError (404) at the first step for a job that is not there.
        """
        job = await self.get(id, owner)
        yield job
        while not job.ended and not self.is_stopping:
            seen = self.queue.changed()
            waited = 0.0
            while self.queue.changed() == seen and waited < _LOOK_SECONDS and not self.is_stopping:
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


async def in_thread(function: Callable[..., T], *arguments: Any) -> T:
    """A blocking call, away from the event loop; the database's own troubles become a ServiceError."""
    try:
        return await anyio.to_thread.run_sync(partial(function, *arguments))
    except QueueUnavailable as error:
        logger.error("the queue cannot be reached: %s", error)
        told = "the queue cannot be reached at the moment: try again"
        raise ServiceError(503, "queue_unavailable", told, headers={"retry-after": "5"}) from error


def model_name(source: str) -> str:
    """What a model is called outside: its name in the zoo or on the Hub; of a folder the last part."""
    known = zoo.find(source)
    if known is not None:
        return known.name
    return source if not Path(source).expanduser().exists() else Path(source).expanduser().resolve().name


def is_id(text: str) -> bool:
    return re.fullmatch(ID_PATTERN, text) is not None


def _result(job: Job, variant: Variant) -> str:
    if job.status in ("queued", "in_progress"):
        raise ServiceError(409, "not_ready", f"{job.id} is {job.status}: its {variant} is there once it is completed")
    if variant not in job.results:
        raise ServiceError(404, "no_result", f"{job.id} has no {variant}: it is {job.status}")
    return job.results[variant]


def _with_kind(condition: Mapping[str, Any], uploads: Mapping[str, Upload]) -> dict[str, Any]:
    upload = uploads.get(str(condition.get("file")))
    kind = {"kind": upload.probed.kind} if upload is not None and upload.probed is not None else {}
    return {**kind, **condition}


def _video_condition(
    name: str, noise: Sequence[float] | None, positions: Sequence[Any] | None = None
) -> dict[str, Any]:
    levels = {"noise": list(noise)} if noise else {}
    return {"kind": "video", "file": name, "positions": list(positions or []), **levels}


def _look_of(parent: Job | None) -> dict[str, Any]:
    """Size and rate of a finished video, which what is made from it takes over."""
    made = (parent.resolved or {}) if parent else {}
    return {name: made[name] for name in ("width", "height", "fps") if made.get(name) is not None}


def _total_seconds(resolved: ResolvedRequest, uploads: Mapping[str, Upload]) -> float:
    """Of the file that comes out: what is joined is in it, its overlaps once."""
    sides = {"extend": 1, "transition": 2}.get(resolved.task, 0)
    before = sum(upload.probed.seconds for upload in uploads.values() if upload.probed) if sides else 0.0
    return before + (resolved.frames - sides * resolved.overlap) / resolved.fps


def _fingerprint(request: GenerationRequest, digests: Mapping[str, str]) -> str:
    """Of what is asked for: equal for a request that is sent again."""
    said = request.model_dump(mode="json")
    for condition in said["conditions"]:
        condition["file"] = digests[condition["file"]]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _a(kind: str) -> str:
    return "an image" if kind == "image" else "a video"


def _not_found(id: str) -> ServiceError:
    return ServiceError(404, "video_not_found", f"there is no video {id[:60]!r}: see GET /v1/videos", "id")
