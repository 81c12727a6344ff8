"""Build requests and parse responses for `pusa.client`, without a connection."""

import io
import json
import os
import re
import uuid
from base64 import b64decode
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import httpx

from pusa.numerals import parse_number

T = TypeVar("T")

Variant = Literal["video", "thumbnail", "spritesheet"]
File = str | os.PathLike[str] | bytes | Any
"""An image or a video: a path, the bytes of a file, or a PIL image, which becomes a PNG; or one that is on the server:
the id of a file, a `StoredFile`, or a reference to a part, ``{"file_id": file.id, "start": 1, "end": 2.5}``."""

_ID = re.compile(r"(file|video)_[0-9a-f]{32}")

# -- what comes back


@dataclass(frozen=True, kw_only=True)
class Video:
    """A job and its video.

    `status` is ``queued``, ``in_progress``, ``completed`` or ``failed``; `progress` is 0..100; times are unix seconds.
    `plan` says in one line how the model runs, once it does. `details` holds the whole answer of the server, including
    what has no field here.
    """

    id: str
    status: str
    progress: int = 0
    model: str = ""
    prompt: str | None = None
    seconds: str = ""
    size: str = ""
    created_at: int = 0
    completed_at: int | None = None
    expires_at: int | None = None
    remixed_from_video_id: str | None = None
    error: Mapping[str, Any] | None = None
    stage: str = ""
    step: int = 0
    steps: int = 0
    seconds_left: float | None = None
    queue_position: int | None = None
    seed: int | None = None
    notes: Sequence[str] = ()
    plan: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def ended(self) -> bool:
        return self.status not in ("queued", "in_progress")

    @property
    def cancelled(self) -> bool:
        """Return True for a cancelled job: the OpenAI API has no such status, so it is a failed one with this code."""
        return bool(self.error) and self.error.get("code") == "cancelled"  # type: ignore[union-attr]


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A picture or a video that the server keeps; `seconds`, `frames` and `fps` are those of a clip.

    `has_request` is True for a video that holds the request that made it. Times are unix seconds.
    """

    id: str
    filename: str = ""
    bytes: int = 0
    kind: str = ""
    width: int = 0
    height: int = 0
    seconds: float = 0.0
    frames: int = 1
    fps: float | None = None
    has_request: bool = False
    created_at: int = 0
    expires_at: int | None = None
    details: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Hold what a request would need.

    `plan` says in one line how the model runs (None: no worker has reported its machine), `gpu_peak_bytes` the most
    that a card holds by stage, `seconds` the time that earlier videos of as many tokens took (None before the first),
    `problem` why `create` would refuse it.
    """

    model: str = ""
    size: str = ""
    num_frames: int = 0
    num_inference_steps: int = 0
    windows: int = 1
    tokens: int = 0
    plan: str | None = None
    gpu_peak_bytes: Mapping[str, int] = field(default_factory=dict)
    ram_peak_bytes: int | None = None
    seconds: float | None = None
    problem: str | None = None
    notes: Sequence[str] = ()
    details: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, kw_only=True)
class Page:
    """Some videos; `has_more` if there are others after `last_id`."""

    data: Sequence[Video]
    has_more: bool
    last_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class Event:
    """A change of a job.

    `name` is ``video`` (it changed), ``preview`` (there is a picture of it so far, `preview`, a WebP file) or ``end``,
    the last one. `video` is the job as of the latest ``video`` event.
    """

    name: str
    video: Video | None
    data: Mapping[str, Any]
    preview: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class Readiness:
    """The state of loading the model. The server accepts jobs before it is ready; they wait."""

    ready: bool
    stage: str = ""
    percent: float = 0.0
    message: str = ""
    details: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Keyframe:
    """An image and its position: a latent frame (3), a frame (``"80f"``), a time (``"1.5s"``) or ``"last"``.

    `noise` is how far the model may depart from it, 0 (kept exactly) to 1 (ignored); the server's default if None.
    """

    image: File
    at: int | str = 0
    noise: float | None = None


# -- what goes wrong


class PusaError(Exception):
    """The server refuses a request. `status` is HTTP's, `code` is for programs, `param` names the wrong field."""

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str | None = None,
        param: str | None = None,
        request_id: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.code, self.param = message, status, code, param
        self.request_id, self.retry_after_seconds = request_id, retry_after_seconds


class ServerUnreachableError(PusaError):
    """The server does not answer, after all retries."""


def is_away(error: PusaError) -> bool:
    """Return True while a server restarts: it does not answer, or a proxy in front of it says so."""
    return isinstance(error, ServerUnreachableError) or error.status in (502, 503, 504)


class WaitTimeoutError(PusaError):
    """`wait` or `wait_until_ready` took longer than its `timeout_seconds`; the job goes on."""


class JobFailedError(PusaError):
    """A job ended without a video: `code` and `message` say why, `video` is the job."""

    def __init__(self, video: Video) -> None:
        error = video.error or {}
        super().__init__(str(error.get("message") or f"{video.id} failed"), code=error.get("code"))
        self.video = video


# -- what is sent


def size_text(size: str | tuple[int, int] | None) -> str | None:
    return f"{size[0]}x{size[1]}" if isinstance(size, tuple) else size


def key_header(key: str | None) -> dict[str, Any]:
    return {"headers": {"Idempotency-Key": key or uuid.uuid4().hex}}


def body_of(request_fields: Mapping[str, Any], parts: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return the arguments of httpx for a body: JSON, or a form if there are files."""
    request_fields = {name: value for name, value in request_fields.items() if value is not None}
    if "seconds" in request_fields:
        request_fields["seconds"] = str(request_fields["seconds"])
    if not parts:
        return {"json": request_fields}
    if not isinstance(prompts := request_fields.get("prompts", ""), str):
        request_fields["prompts"] = json.dumps(list(prompts))  # they may hold commas and line breaks
    return {"data": {name: text_of(value) for name, value in request_fields.items()}, "files": parts}


def text_of(value: Any) -> str:
    """Format a field of a form: a list of plain values as ``0,20``, nested values as JSON."""
    if isinstance(value, bool | Mapping):
        return json.dumps(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        nested = any(isinstance(item, Mapping | list | tuple) for item in value)
        return json.dumps(value) if nested else ",".join(map(str, value))
    return str(value)


def references(
    files: ExitStack,
    request_fields: dict[str, Any],
    image: File | None,
    keyframes: Sequence[Keyframe],
    video: File | None,
) -> Sequence[tuple[str, Any]]:
    """Return the parts of a form for all conditions; add those on the server, and keyframes, to `request_fields`."""
    if image is not None and not keyframes and video is None:
        return parts_of(files, request_fields, "input_reference", image, "image.png")
    if image is not None:
        keyframes = [Keyframe(image), *keyframes]
    parts: list[tuple[str, Any]] = []
    places = []
    for k in keyframes:
        stored = stored_reference(k.image)
        source = {"file": len(parts)} if stored is None else {"reference": stored}
        if stored is None:
            parts.append(("input_reference[]", part_of(files, k.image, f"{len(parts)}.png")))
        places.append({**place_of(k.at), **source} | ({} if k.noise is None else {"noise": k.noise}))
    if places:
        request_fields["keyframes"] = places
    return parts if video is None else [*parts, *parts_of(files, request_fields, "video_reference", video, "video.mp4")]


def parts_of(
    files: ExitStack, request_fields: dict[str, Any], name: str, file: File, filename: str
) -> list[tuple[str, Any]]:
    """Return the part of a form for a file; one on the server is added to `request_fields` instead."""
    stored = stored_reference(file)
    if stored is None:
        return [(name, part_of(files, file, filename))]
    request_fields[name] = stored
    return []


def stored_reference(file: File) -> dict[str, Any] | None:
    """Return the reference to a file on the server; None for any other file."""
    if isinstance(file, StoredFile):
        return {"file_id": file.id}
    if isinstance(file, Mapping):
        return dict(file)
    if isinstance(file, str) and _ID.fullmatch(file):
        return {f"{file.partition('_')[0]}_id": file}
    return None


def creation_of(
    files: ExitStack,
    prompt: str,
    *,
    image: File | None = None,
    keyframes: Sequence[Keyframe] = (),
    video: File | None = None,
    size: str | tuple[int, int] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Return the arguments of httpx for a new video."""
    request_fields = {"prompt": prompt, "size": size_text(size), **options}
    return body_of(request_fields, references(files, request_fields, image, keyframes, video))


def upload_of(files: ExitStack, file: File, filename: str | None) -> dict[str, Any]:
    """Return the arguments of httpx for a file that the server is to keep."""
    stored = stored_reference(file)
    parts = [("file", part_of(files, file, "file"))] if stored is None else []
    return body_of({**(stored or {}), "filename": filename}, parts)


def source_videos(files: ExitStack, request_fields: dict[str, Any], videos: Sequence[File]) -> dict[str, Any]:
    """Return the arguments of httpx for a request that starts from videos, named by their ids or sent as files."""
    ids = [stored for video in videos if (stored := _stored_video(video)) is not None]
    if ids and len(ids) < len(videos):
        raise ValueError("an id and a file cannot be sent together: upload the file first, then send both ids")
    if ids:
        return body_of({**request_fields, "video": ids if len(ids) > 1 else ids[0]}, [])
    name = "video[]" if len(videos) > 1 else "video"
    return body_of(request_fields, [(name, part_of(files, video, "video.mp4")) for video in videos])


def _stored_video(video: File) -> dict[str, Any] | None:
    """Return the reference to a video on the server, of a whole one as servers of any version read it."""
    if isinstance(video, str) and video.startswith("video_"):
        return {"id": video}
    return stored_reference(video)


def place_of(at: int | str) -> dict[str, Any]:
    text = str(at).strip().lower()
    try:
        if text == "last":
            return {"latent": "last"}
        if text.endswith("f"):
            return {"frame": int(text[:-1])}
        return {"time": float(text[:-1])} if text.endswith("s") else {"latent": int(text)}
    except ValueError:
        raise ValueError(
            f"position {at!r} is not understood: write a latent frame (3), a frame ('80f'), seconds ('1.5s') or 'last'"
        ) from None


def part_of(files: ExitStack, file: File, name: str) -> tuple[str, Any]:
    """Return name and content of a file for httpx, which reads it from its beginning at each attempt."""
    if isinstance(file, bytes):
        return name, io.BytesIO(file)
    if isinstance(file, str | os.PathLike):
        path = Path(file)
        return path.name, files.enter_context(path.open("rb"))
    buffer = io.BytesIO()
    file.save(buffer, format="PNG")
    return name, buffer


def typed(kind: Callable[..., T], values: Mapping[str, Any]) -> T:
    """Build one of the classes above from an answer, which stays whole in `details`."""
    names = {f.name for f in fields(kind)} - {"details"}  # type: ignore[arg-type]
    return kind(**{name: values[name] for name in names if values.get(name) is not None}, details=values)


def video_of(response: httpx.Response) -> Video:
    return typed(Video, response.json())


def error_of(response: httpx.Response) -> PusaError:
    try:
        found = response.json()["error"]
        message, code, param = str(found["message"]), found.get("code"), found.get("param")
    except (ValueError, KeyError, TypeError, AttributeError):  # a proxy in between answers with a page of its own
        message, code, param = f"{response.status_code} {response.reason_phrase}", None, None
    after = response.headers.get("retry-after-ms")
    seconds = number_of(response.headers.get("retry-after"), -1) if after is None else number_of(after, -1000) / 1000
    return PusaError(
        message,
        status=response.status_code,
        code=code,
        param=param,
        request_id=response.headers.get("x-request-id"),
        retry_after_seconds=seconds if seconds >= 0 else None,
    )


def number_of(text: str | None, default: float) -> float:
    try:
        return parse_number(text or "")
    except ValueError:
        return default


# -- events


class EventReader:
    """Parse the lines of a stream of server-sent events; decide when to connect again and when all is read.

    Raises, from `opened` and `lost`:
        PusaError: the server has no such job.
        ServerUnreachableError: after more than `max_retries` connections in a row that brought nothing.
    """

    def __init__(self, max_retries: int) -> None:
        self.done = False
        self.pause_seconds = 0.5
        self._max_retries, self._failures = max_retries, 0
        self._video: Video | None = None
        self._name = ""
        self._data: list[str] = []

    def request(self, video_id: str) -> tuple[str, dict[str, Any]]:
        """Return path and arguments of the next connection."""
        return f"/v1/videos/{video_id}/events", {"headers": {"Accept": "text/event-stream"}}

    def opened(self, response: httpx.Response) -> None:
        self._name, self._data = "", []
        if response.is_success:
            self._fail(None)
        elif response.status_code == 404 and self._video is not None:
            self.done = True  # deleted while nobody was connected
        elif response.status_code < 500:
            raise error_of(response)
        else:
            self._fail(error_of(response))

    def lost(self, error: httpx.TransportError) -> None:
        self._fail(ServerUnreachableError(f"no answer from the server: {error or type(error).__name__}"))

    def _fail(self, error: PusaError | None) -> None:
        self._failures += 1
        self.pause_seconds = min(0.25 * 2**self._failures, 8)
        if self._failures > self._max_retries:
            raise error or ServerUnreachableError("the server closed the stream of events again and again")

    def feed(self, line: str) -> Event | None:
        """Return the event that this line ends, or None."""
        if line:
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if name == "event":
                self._name = value
            elif name == "data":
                self._data.append(value)
            return None
        if not self._data:
            return None
        name, values = self._name or "message", json.loads("\n".join(self._data))
        self._name, self._data, self._failures = "", [], 0
        preview = None
        if name == "video":
            self._video = typed(Video, values)
        elif name == "preview":
            preview = b64decode(values["image"].partition(",")[2])
        elif name == "end":
            if values.get("reason") == "shutdown":
                return None  # the job goes on when the server is there again
            self.done = True
        return Event(name=name, video=self._video, data=values, preview=preview)
