"""The door: what a request asks for is checked, its files are looked into, and then it is on disk.

Every method that touches the disk or the database does it in a thread: the event loop stays free for all others.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import anyio
import anyio.to_thread
from pydantic import ValidationError

from pusa import zoo
from pusa.fsutil import sha256_of
from pusa.request import GenerationRequest, ResolvedRequest, match_orientation
from pusa.server.errors import ServiceError
from pusa.server.http.to_request import invalid, refusal, shown_number
from pusa.server.jobs.housekeeping import check_space
from pusa.server.jobs.queue import Job, JobQueue, NewJob, QueueFull, QueueUnavailable, new_id
from pusa.server.jobs.store import FileStore
from pusa.server.logs import log_context
from pusa.server.settings import ServerSettings
from pusa.server.uploads import PROBES_AT_ONCE, ProbeLimits, Prober, Spool, Upload, shown_name

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Accepting:
    """Turns requests into jobs of the queue. Refusals are `ServiceError`."""

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

    @cached_property
    def defaults(self) -> zoo.GenerationDefaults:
        """Of the model."""
        return zoo.defaults_of(self.settings.model)

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
        digests = {name: await in_thread(sha256_of, upload.path) for name, upload in uploads.items()}
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
            resolved = match_orientation(request, first.size if first else None, self.defaults).resolved(self.defaults)
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


def _with_kind(condition: Mapping[str, Any], uploads: Mapping[str, Upload]) -> dict[str, Any]:
    upload = uploads.get(str(condition.get("file")))
    kind = {"kind": upload.probed.kind} if upload is not None and upload.probed is not None else {}
    return {**kind, **condition}


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


def _a(kind: str) -> str:
    return "an image" if kind == "image" else "a video"
