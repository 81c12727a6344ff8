"""The verbs of `pusa.client`, each written once: as a flow that yields what it wants and is told what came.

A `Flow[T]` yields a `Send`, and is sent the response or the error of the connection, or a `Pause`; it ends with a T.
"""

import os
import random
import time
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

import httpx

from pusa.client.wire import (
    File,
    JobFailedError,
    Keyframe,
    Page,
    PusaError,
    Readiness,
    ServerUnreachableError,
    Variant,
    Video,
    WaitTimeoutError,
    body_of,
    error_of,
    key_header,
    number_of,
    references,
    size_text,
    source_videos,
    typed,
    video_of,
)

RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
LONGEST_PAUSE_SECONDS = 30.0  # a server that asks for more is busy for so long that the caller should know


@dataclass(frozen=True)
class Send:
    """Wanted: the response to this request, or the error that came instead; a body goes into `to` if it is given."""

    method: str
    path: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    to: BinaryIO | None = None


@dataclass(frozen=True)
class Pause:
    seconds: float


T = TypeVar("T")
Flow = Generator[Send | Pause, "httpx.Response | httpx.TransportError | None", T]
Progress = Callable[[Video], object]


def _is_away(error: PusaError) -> bool:
    """Whether a server is being restarted: it does not answer, or a proxy before it says so."""
    return isinstance(error, ServerUnreachableError) or error.status in (502, 503, 504)


class Verbs:
    """All verbs, as flows."""

    def __init__(self, max_retries: int) -> None:
        self.max_retries = max_retries

    def create(
        self,
        prompt: str = "",
        *,
        image: File | None = None,
        keyframes: Sequence[Keyframe] = (),
        video: File | None = None,
        model: str | None = None,
        seconds: float | str | None = None,
        size: str | tuple[int, int] | None = None,
        idempotency_key: str | None = None,
        **knobs: Any,
    ) -> Flow[Video]:
        """Ask for a video; the job is on the server's disk when this returns.

        Args:
            image: the first frame.
            keyframes: images at places of their own, with `image` or without.
            video: a piece of video to keep; `cond_positions` and `noise_multipliers` say what of it.
            size: ``"832x480"``, or (width, height).
            idempotency_key: two calls with the same key make one job; drawn for each call unless given, so that trying
                again after a lost answer makes no second one.
            knobs: as the server's documentation lists them (``num_frames``, ``num_inference_steps``, ``seed``...).

        Raises:
            PusaError: refused; `param` names the field.
            ServerUnreachableError: no answer.
        """
        asked = {"prompt": prompt, "model": model, "seconds": seconds, "size": size_text(size), **knobs}
        with ExitStack() as files:
            parts = references(files, asked, image, keyframes, video)
            response = yield from self._ask(
                "POST", "/v1/videos", **body_of(asked, parts), **key_header(idempotency_key)
            )
        return video_of(response)

    def create_and_wait(
        self,
        prompt: str = "",
        *,
        on_progress: Progress | None = None,
        timeout_seconds: float | None = None,
        **options: Any,
    ) -> Flow[Video]:
        """`create` with its options, then `wait`."""
        video = yield from self.create(prompt, **options)
        return (yield from self.wait(video.id, on_progress=on_progress, timeout_seconds=timeout_seconds))

    def retrieve(self, video_id: str) -> Flow[Video]:
        """The job as it is now."""
        return video_of((yield from self._ask("GET", f"/v1/videos/{video_id}")))

    def wait(
        self,
        video_id: str,
        *,
        on_progress: Progress | None = None,
        timeout_seconds: float | None = None,
        outage_seconds: float = 300.0,
    ) -> Flow[Video]:
        """Poll until the video is there, as often as the server asks for.

        Jobs outlast a restart of the server, so that one that is away for `outage_seconds` is waited for.

        Args:
            on_progress: called with the job whenever its status or progress changed.

        Raises:
            JobFailedError: it ended without a video; also if it was cancelled.
            WaitTimeoutError: after `timeout_seconds`; the job goes on.
        """
        start = seen = time.monotonic()
        last: tuple[str, int] | None = None
        while True:
            pause = 1.0
            try:
                response = yield from self._ask("GET", f"/v1/videos/{video_id}")
            except PusaError as error:
                if not _is_away(error) or time.monotonic() - seen > outage_seconds:
                    raise
            else:
                seen = time.monotonic()
                video = video_of(response)
                pause = number_of(response.headers.get("openai-poll-after-ms"), 1000) / 1000
                if on_progress is not None and (video.status, video.progress) != last:
                    on_progress(video)
                last = (video.status, video.progress)
                if video.ended:
                    if video.status != "completed":
                        raise JobFailedError(video)
                    return video
            if timeout_seconds is not None and time.monotonic() - start > timeout_seconds:
                raise WaitTimeoutError(f"{video_id} has not ended after {timeout_seconds:g} seconds; it goes on")
            yield Pause(min(max(pause, 0.05), LONGEST_PAUSE_SECONDS))

    def page(self, *, after: str | None = None, limit: int = 20, order: Literal["asc", "desc"] = "desc") -> Flow[Page]:
        """At most `limit` videos, newest first unless `order` is ``asc``, from behind the id `after`."""
        query = {"limit": limit, "order": order} | ({"after": after} if after else {})
        answer = (yield from self._ask("GET", "/v1/videos", params=query)).json()
        data = tuple(typed(Video, item) for item in answer["data"])
        last = answer.get("last_id") or (data[-1].id if data else None)
        return Page(data=data, has_more=bool(answer.get("has_more")) and last is not None, last_id=last)

    def remix(self, video_id: str, prompt: str, *, idempotency_key: str | None = None) -> Flow[Video]:
        """The same request with another prompt."""
        path = f"/v1/videos/{video_id}/remix"
        return video_of((yield from self._ask("POST", path, json={"prompt": prompt}, **key_header(idempotency_key))))

    def extend(
        self,
        video: File,
        prompt: str,
        seconds: float | str | None = None,
        *,
        idempotency_key: str | None = None,
        **knobs: Any,
    ) -> Flow[Video]:
        """A video that begins with this one and goes on for `seconds`. `video`: the id of a job, or a file."""
        asked = {"prompt": prompt, "seconds": seconds, **knobs}
        return (yield from self._from_video("/v1/videos/extensions", video, asked, idempotency_key))

    def edit(self, video: str | File, prompt: str, *, idempotency_key: str | None = None, **knobs: Any) -> Flow[Video]:
        """A video of which parts are kept from this one. `video`: the id of a job, or a file."""
        asked = {"prompt": prompt, **knobs}
        return (yield from self._from_video("/v1/videos/edits", video, asked, idempotency_key))

    def cancel(self, video_id: str) -> Flow[Video]:
        """Stop a job that waits or runs; one that ended stays as it is."""
        return video_of((yield from self._ask("POST", f"/v1/videos/{video_id}/cancel")))

    def delete(self, video_id: str) -> Flow[None]:
        """Remove a job and its files; one that runs is cancelled."""
        yield from self._ask("DELETE", f"/v1/videos/{video_id}")

    def download(
        self, video_id: str, variant: Variant = "video", *, to: str | os.PathLike[str] | None = None
    ) -> Flow[Any]:
        """The video, or a picture of it: ``thumbnail`` or ``spritesheet``.

        Args:
            to: a file, which is there only when it is whole, or a folder, in which it is named after the video.

        Returns:
            the bytes, or the path of `to`.
        """
        path, query = f"/v1/videos/{video_id}/content", {"variant": variant}
        if to is None:
            return (yield from self._ask("GET", path, params=query)).content
        target = Path(to)
        if target.is_dir():
            target /= f"{video_id}.mp4" if variant == "video" else f"{video_id}_{variant}.webp"
        part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
        try:
            with part.open("xb") as file:
                yield from self._ask("GET", path, params=query, to=file)
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)
        return target

    def models(self) -> Flow[Sequence[Mapping[str, Any]]]:
        """What the server offers."""
        return tuple((yield from self._ask("GET", "/v1/models")).json()["data"])

    def ready(self) -> Flow[Readiness]:
        """Whether the model is loaded, and how far it is."""
        return typed(Readiness, (yield from self._ask("GET", "/ready", fine=(503,))).json())

    def wait_until_ready(
        self, *, timeout_seconds: float = 600.0, on_progress: Callable[[Readiness], object] | None = None
    ) -> Flow[Readiness]:
        """Wait for the server to answer and for its model to be loaded.

        Raises:
            WaitTimeoutError: after `timeout_seconds`.
        """
        start = time.monotonic()
        state: Readiness | None = None
        while True:
            try:
                found = yield from self.ready()
            except PusaError as error:
                if not _is_away(error):
                    raise
                said = str(error)
            else:
                said = f"{found.stage} {found.percent:.0f} %"
                if on_progress is not None and found != state:
                    on_progress(found)
                state = found
                if found.ready:
                    return found
            if time.monotonic() - start > timeout_seconds:
                raise WaitTimeoutError(f"the server is not ready after {timeout_seconds:g} seconds: {said}")
            yield Pause(0.5)

    def _from_video(
        self, path: str, video: File | Sequence[File], asked: dict[str, Any], key: str | None
    ) -> Flow[Video]:
        videos = [video] if isinstance(video, str | bytes | os.PathLike) else list(video)
        with ExitStack() as files:
            body = source_videos(files, asked, videos)
            return video_of((yield from self._ask("POST", path, **body, **key_header(key))))

    def _ask(
        self, method: str, path: str, *, to: BinaryIO | None = None, fine: Sequence[int] = (), **arguments: Any
    ) -> Flow[httpx.Response]:
        """A response that is no error. Every request may be sent again: those that make jobs carry a key."""
        for attempt in range(self.max_retries + 1):
            answer = yield Send(method, path, arguments, to)
            if isinstance(answer, httpx.Response):
                if answer.is_success or answer.status_code in fine:
                    return answer
                error = error_of(answer)
                again = {"true": True, "false": False}.get(answer.headers.get("x-should-retry", ""))
                if not (answer.status_code in RETRIED if again is None else again):
                    raise error
            else:
                error = ServerUnreachableError(f"no answer from the server: {answer or type(answer).__name__}")
            pause = error.retry_after_seconds
            if attempt == self.max_retries or (pause or 0) > LONGEST_PAUSE_SECONDS:
                raise error
            yield Pause(min(0.5 * 2**attempt, 8) * random.uniform(0.75, 1) if pause is None else pause)
        raise AssertionError("the last attempt returns or raises")
