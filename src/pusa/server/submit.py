"""Validate a request and its uploads and store it as a job.

Every call that touches the disk or the database runs in a thread, so that the event loop stays free for other clients.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import anyio
import anyio.to_thread
from pydantic import ValidationError

from pusa import zoo
from pusa.defaults import GenerationDefaults
from pusa.lora.sources import parse_lora, public_name
from pusa.positions import latent_frames
from pusa.request import METADATA, GenerationRequest, ResolvedRequest, match_orientation
from pusa.server.errors import ServiceError
from pusa.server.http.to_request import format_seconds
from pusa.server.http.validation import invalid_value, refused_value, validation_error
from pusa.server.jobs.housekeeping import check_space
from pusa.server.jobs.queue import FileDigest, Job, JobQueue, NewJob, QueueDamaged, QueueFull, QueueUnavailable, new_id
from pusa.server.jobs.store import FileStore
from pusa.server.logs import log_context
from pusa.server.plans import Estimate, Planner, problem_of
from pusa.server.settings import ServerSettings
from pusa.server.transfers.uploads import PROBES_AT_ONCE, ProbeLimits, Prober, Upload, display_name

logger = logging.getLogger(__name__)

_ARTICLES = {"image": "an image", "video": "a video", "draft": "a video"}

DAMAGED = (
    "the queue's database is damaged or gone: its operator restores a backup (docs/deployment.md, Backup and restore)"
)

T = TypeVar("T")


class JobSubmitter:
    """Turn requests into jobs of the queue.

    Attributes:
        model: public name of the server's model.
        loras: sources of the LoRAs that the operator offers, by public name.
        prober: reads the metadata of uploads in a child process.
        planner: plans requests for the workers' machines.
    """

    def __init__(self, settings: ServerSettings, queue: JobQueue, files: FileStore, planner: Planner) -> None:
        self.settings, self.queue, self.files, self.planner = settings, queue, files, planner
        self.prober = Prober(
            ProbeLimits(
                max_bytes=max(settings.max_body_bytes, ProbeLimits.max_bytes),  # results and pieces are larger
                max_pixels=settings.max_upload_pixels,
                max_frames=settings.max_upload_frames,
                max_seconds=settings.max_upload_seconds,
                max_decode_seconds=settings.probe_seconds,
                memory_bytes=settings.probe_memory_bytes,
                wall_seconds=settings.probe_seconds,
                made_frames=settings.max_video_frames,
                made_seconds=settings.max_video_frames + 1.0,  # at one frame per second, the least
            )
        )
        self._probing = anyio.CapacityLimiter(PROBES_AT_ONCE)  # probes may take long: they must not use up all threads
        self.model = model_name(settings.model)
        self.loras = {public_name(source): source for source in settings.lora}
        sources = [file for source in settings.lora for file in parse_lora(source).files.values()]
        self._lora_files = {Path(file).name: file for file in sources}

    @cached_property
    def defaults(self) -> GenerationDefaults:
        """The model's defaults for what a request leaves open."""
        return zoo.defaults_of(self.settings.model)

    async def probe(self, uploads: Mapping[str, Upload]) -> dict[str, Upload]:
        """Add `info` to the uploads that have none. Raises ServiceError (400) for a file that cannot be read."""
        unknown = [name for name, upload in uploads.items() if upload.info is None]
        if not unknown:
            return dict(uploads)
        probe = partial(self.prober.probe, [uploads[name] for name in unknown])
        infos = await anyio.to_thread.run_sync(probe, limiter=self._probing)
        return {
            **uploads,
            **{name: replace(uploads[name], info=info) for name, info in zip(unknown, infos, strict=True)},
        }

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
        batch: str | None = None,
    ) -> Job:
        """Store a request as a job. Once this returns, the job's inputs and its row are on disk.

        Args:
            request: fields of a `GenerationRequest` as JSON. The `file` of a condition is a key of `uploads`; its
                `kind` defaults to that of the file. `model` and `lora` are public names of what the operator offers.
            uploads: files by name. They are copied; the caller removes them.
            owner: digest of the client's API key, "" where the server has no keys.
            source: the interface that the request came by, for the log.
            parent: id of the job that this one is made from.
            idempotency_key: if this owner has used it before, the job of that time is returned, whatever its status.
            priority: jobs with a higher one run first.
            is_retry: the client may have sent the same request shortly before: then that job is returned.
            seconds: the length as the client wrote it; None takes it from the request.
            traceparent: W3C trace context of the client.
            batch: the client's name for jobs that belong together.

        Raises:
            ServiceError: 400 for an invalid request, 422 for an idempotency key that belongs to another request, 429
                if the queue is full, 503 if it cannot be reached, 507 if the disk is full.
        """
        await in_thread(check_space, self.files, self.settings.min_free_bytes)
        uploads = await self.probe(uploads)
        checked = self._validate(request, uploads)
        resolved = self._resolve(checked, uploads)
        planned = await in_thread(self.planner.plan_request, resolved)
        if planned is not None and planned.problem:
            raise ServiceError(400, "does_not_fit", planned.problem, "size", values=problem_of(planned)["values"])
        stated = {name: await in_thread(FileDigest.of, upload.path) for name, upload in uploads.items()}
        digests = {name: digest.sha256 for name, digest in stated.items()}
        fingerprint = _fingerprint(checked, digests)
        id = new_id()
        keys = {
            name: f"inputs/{id}/{number}{upload.info.suffix if upload.info else ''}"
            for number, (name, upload) in enumerate(uploads.items())
        }
        stored = checked.model_copy(
            update={
                "seed": resolved.seed,  # an attempt that another worker continues must have the same noise
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
            seconds=seconds or format_seconds(_total_seconds(resolved, uploads)),
            size=f"{resolved.width}x{resolved.height}",
            inputs=tuple(keys.values()),
            priority=priority,
            parent=parent,
            idempotency_key=idempotency_key,
            fingerprint=fingerprint,
            source=source,
            traceparent=traceparent,
            batch=batch,
        )
        with log_context(job=id):
            inputs = {keys[name]: (upload.path, stated[name]) for name, upload in uploads.items()}
            job = await self._store(new, inputs, is_retry)
        if job.id != id and job.fingerprint != fingerprint:
            raise ServiceError(
                422,
                "idempotency_key_reused",
                f"this Idempotency-Key belongs to another request, {job.id}: use a new key for a new request",
            )
        return job

    async def estimate(
        self, request: Mapping[str, Any], uploads: Mapping[str, Upload]
    ) -> tuple[ResolvedRequest, Estimate]:
        """Check a request as `create` does, fill it and estimate what it would need; store nothing."""
        uploads = await self.probe(uploads)
        resolved = self._resolve(self._validate(request, uploads), uploads)
        return resolved, await in_thread(self.planner.estimate, resolved)

    async def _store(self, new: NewJob, inputs: Mapping[str, tuple[Path, FileDigest]], is_retry: bool) -> Job:
        """Copy the inputs to the store, then add the row; without a new row the copies are removed."""
        settings = self.settings
        is_new = False
        try:
            for key, (path, _) in inputs.items():
                await in_thread(self.files.put_file, key, path)
            submit = partial(
                self.queue.submit,
                new,
                digests={key: digest for key, (_, digest) in inputs.items()},
                total_limit=settings.queue_limit,
                key_limit=settings.key_queue_limit if new.owner else None,
                same_fingerprint_seconds=settings.retry_window_seconds if is_retry else None,
            )
            job, is_new = await in_thread(submit)
        except QueueFull as full:
            raise queue_full(full) from None
        finally:
            if not is_new and inputs:
                await in_thread(self.files.delete_prefix, f"inputs/{new.id}")
        if is_new:
            logger.info("accepted", extra={"task": new.request["task"], "size": new.size, "source": new.source})
        return job

    def _validate(self, request: Mapping[str, Any], uploads: Mapping[str, Upload]) -> GenerationRequest:
        """Check a request against its uploads and replace public names of model and LoRA by their sources."""
        values = {name: value for name, value in request.items() if value is not None}
        if values.get("model", self.model) != self.model:
            message = f"model {str(values['model'])[:60]!r} is not offered here: there is {self.model}"
            named = {"name": str(values["model"])[:60], "offered": self.model}
            raise ServiceError(400, "model_not_found", message, "model", values=named)
        values["model"] = self.settings.model
        values["metadata"] = self._metadata(values.get("metadata"))
        values["lora"] = [self._lora_source(name) for name in values.get("lora") or self.loras]
        values["conditions"] = [_with_kind(condition, uploads) for condition in values.get("conditions") or []]
        try:
            checked = GenerationRequest.model_validate(values)
        except ValidationError as error:
            raise validation_error(error) from None
        for spec in checked.conditions:
            upload = uploads.get(spec.file)
            if upload is None or upload.info is None:
                message = f"file {spec.file[:60]!r} was not sent along"
                raise invalid_value(message, "input_reference", "file_missing", name=spec.file[:60])
            if upload.info.kind != ("video" if spec.kind == "draft" else spec.kind):
                kind, needed = _ARTICLES[upload.info.kind], _ARTICLES[spec.kind]
                name = display_name(upload)
                raise invalid_value(
                    f"{name} is {kind}, and {needed} is needed here",
                    "input_reference",
                    "wrong_kind",
                    name=name,
                    kind=upload.info.kind,
                )
        unused = set(uploads) - {spec.file for spec in checked.conditions}
        if unused:
            name = display_name(uploads[min(unused)])
            message = f"{name} is not used: leave it out, or say where it goes"
            raise invalid_value(message, "input_reference", "file_unused", name=name)
        return checked

    def _metadata(self, asked: Any) -> Any:
        """Return how much the result tells. Raises ServiceError (400) for less than the operator requires, or more."""
        settings = self.settings
        if asked == "off" and settings.require_mark:
            message = "metadata=off is not offered here: results say that they were made with AI; ask for minimal"
            raise invalid_value(message, "metadata", "mark_required")
        if asked in METADATA and settings.limit_metadata(asked) != asked:
            message = (
                f"metadata={asked} tells more than this server allows: ask for {settings.metadata}, or leave it out"
            )
            raise invalid_value(message, "metadata", "metadata_limited", asked=asked, allowed=settings.metadata)
        return settings.metadata if asked is None else asked

    def _lora_source(self, name: str) -> str:
        """Replace public names by sources, also in ``NAME@1.2`` and ``high=NAME,low=NAME``."""
        if name in self.loras:
            return self.loras[name]
        try:
            reference = parse_lora(name, exists=self._lora_files.__contains__)
        except ValueError as error:
            raise refused_value(error, "lora") from None
        if unknown := next((file for file in reference.files.values() if file not in self._lora_files), None):
            choices = f"there are {', '.join(self.loras)}" if self.loras else "this server offers none"
            message = f"LoRA {unknown[:60]!r} is not offered: {choices}"
            named = {"name": unknown[:60], "offered": ", ".join(self.loras), "count": len(self.loras)}
            raise ServiceError(400, "lora_not_found", message, "lora", values=named)
        return str(reference.with_files(self._lora_files.__getitem__))

    def _resolve(self, request: GenerationRequest, uploads: Mapping[str, Upload]) -> ResolvedRequest:
        """Fill what a request leaves open. Raises ServiceError (400) for more than the operator's limits allow."""
        first = uploads[request.conditions[0].file].info if request.conditions else None
        try:
            resolved = match_orientation(request, first.size if first else None, self.defaults).resolved(self.defaults)
        except ValueError as error:
            raise refused_value(error, message=str(error).splitlines()[0]) from None
        settings, size = self.settings, f"{resolved.width}x{resolved.height}"
        pixels = resolved.width * resolved.height
        for param, code, text, value, limit in (
            ("size", "too_many_pixels", f"{size}, {pixels} pixels", pixels, settings.max_video_pixels),
            ("seconds", "too_many_frames", f"{resolved.frames} frames", resolved.frames, settings.max_video_frames),
            ("num_inference_steps", "too_many_steps", f"{resolved.steps} steps", resolved.steps, settings.max_steps),
        ):
            if value > limit:
                message = f"{text} are too many: this server makes at most {limit}"
                raise invalid_value(message, param, code, size=size, given=value, limit=limit)
        _check_lengths(resolved, uploads)
        return resolved


def queue_full(full: QueueFull) -> ServiceError:
    """Convert the queue's refusal to an error that says when to come again."""
    wait_ms = round(full.retry_after_seconds * 1000)
    wait = {"retry-after": str(max(1, round(full.retry_after_seconds))), "retry-after-ms": str(wait_ms)}
    values = {"limit": full.limit, "seconds": round(full.retry_after_seconds), "scope": full.scope}
    return ServiceError(429, "queue_full", str(full), headers=wait, values=values)


async def in_thread(function: Callable[..., T], *arguments: Any) -> T:
    """Call a blocking function in a thread. Raises ServiceError (503) if the queue cannot be reached."""
    try:
        return await anyio.to_thread.run_sync(partial(function, *arguments))
    except QueueUnavailable as error:
        logger.error("the queue cannot be reached: %s", error)
        message = DAMAGED if isinstance(error, QueueDamaged) else "the queue cannot be reached at the moment: try again"
        raise ServiceError(503, "queue_unavailable", message, headers={"retry-after": "5"}) from error


def model_name(source: str) -> str:
    """Name a model for clients: by its name in the zoo or on the Hub, or by the last part of a folder."""
    named = zoo.find(source)
    return zoo.public_name(source) if named is None else named.name


def _with_kind(condition: Mapping[str, Any], uploads: Mapping[str, Upload]) -> dict[str, Any]:
    upload = uploads.get(str(condition.get("file")))
    kind = {"kind": upload.info.kind} if upload is not None and upload.info is not None else {}
    return {**kind, **condition}


def _total_seconds(resolved: ResolvedRequest, uploads: Mapping[str, Upload]) -> float:
    """Compute the length of the resulting file: extensions and transitions contain the videos that they join."""
    sides = {"extend": 1, "transition": 2}.get(resolved.task, 0)
    joined = [uploads[spec.file].info for spec in resolved.conditions if spec.kind == "video"] if sides else []
    before = sum((info.seconds for info in joined if info), 0.0)
    return before + (resolved.frames - sides * resolved.overlap) / resolved.fps


def _check_lengths(resolved: ResolvedRequest, uploads: Mapping[str, Upload]) -> None:
    """Raise ServiceError (400) for a video that is shorter than what is taken over from it."""
    if resolved.task not in ("extend", "transition"):
        return
    # A transition's second video begins inside the clip, where no latent frame is the first, of one frame.
    factor = resolved.frames_per_latent
    needed = (resolved.overlap, factor * latent_frames(resolved.overlap, factor))
    videos = [spec for spec in resolved.conditions if spec.kind == "video"]
    for spec, count in zip(videos, needed, strict=False):
        info = uploads[spec.file].info
        assert info is not None
        frames = info.frames if info.fps == resolved.fps else math.ceil(info.seconds * resolved.fps)
        if frames < count:
            name = display_name(uploads[spec.file])
            message = (
                f"{name} has {frames} frames at {resolved.fps:g} fps, {count} are taken over: give a longer video or "
                "a smaller overlap"
            )
            values = {"name": name, "frames": frames, "fps": resolved.fps, "needed": count}
            raise invalid_value(message, "overlap", "video_too_short", **values)


def _fingerprint(request: GenerationRequest, digests: Mapping[str, str]) -> str:
    """Hash a request and its files, to recognise a request that a client repeats."""
    fields = request.model_dump(mode="json")
    for condition in fields["conditions"]:
        condition["file"] = digests[condition["file"]]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
