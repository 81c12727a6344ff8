"""Make other files of finished videos on demand: a GIF, a WebP, the last frame, and films of several videos.

They are made in the confined child process of `pusa.server.transfers.probe` and carry the marks of their videos. Those
of one video stay in the store beside it until they have not been asked for lately: housekeeping takes them for orphans.
"""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakValueDictionary

from pusa.fsutil import sha256_of
from pusa.server.content import Content, result_key, speaking_name
from pusa.server.http.reference_schemas import StoredReference
from pusa.server.http.validation import invalid_value
from pusa.server.jobs.client_files import ClientFile
from pusa.server.jobs.housekeeping import check_space
from pusa.server.submit import in_thread
from pusa.server.transfers.parts import exact_rate, rate_of
from pusa.server.transfers.turns import Turns
from pusa.server.transfers.uploads import Upload, UploadInfo

if TYPE_CHECKING:
    from pusa.server.service import VideoService

Export = Literal["gif", "webp", "last_frame"]
MAX_FILM_VIDEOS = 32

_SUFFIXES: Mapping[Export, str] = {"gif": ".gif", "webp": ".webp", "last_frame": ".png"}
_LONGEST_SIDES = {"gif": 480, "webp": 1280}  # pixels: larger ones are too heavy for what they are used for
_MAKING_AT_ONCE = 2


class VideoExports:
    """Make and keep the exports of a service's videos. Every refusal is a `ServiceError`."""

    def __init__(self, service: "VideoService") -> None:
        self._service, self._turns = service, Turns(_MAKING_AT_ONCE)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # each is made once at a time

    async def content(self, id: str, export: Export, owner: str | None = "") -> Content:
        """Find an export of a completed job, or make it.

        Raises:
            ServiceError: 404 if there is no such job, 409 if it is not completed yet, 400 if the export takes too long
                or too much memory, 507 if the disk is full.
        """
        job = await self._service.get(id, owner)
        key = f"{result_key(job).rpartition('/')[0]}/{export}{_SUFFIXES[export]}"
        lock = self._locks.setdefault(key, asyncio.Lock())
        async with lock:
            size = await in_thread(self._size, key)
            if size is None:
                await self._make(id, export, job.owner, key)
                size = await in_thread(self._service.files.size, key)
        what = "_last_frame" if export == "last_frame" else ""  # the suffix says what the others are
        return Content.of(self._service.files, key, size, speaking_name(job) + what)

    def _size(self, key: str) -> int | None:
        try:
            return self._service.files.size(key)
        except FileNotFoundError:
            return None

    async def _make(self, id: str, export: Export, owner: str, key: str) -> None:
        settings, files = self._service.settings, self._service.files
        await in_thread(check_space, files, settings.min_free_bytes)
        upload = await self._take(id, owner)
        try:
            assert upload.info is not None
            path = await self._write(owner, upload, _task_of(export, upload.info))
            try:
                await in_thread(files.put_file, key, path)
            finally:
                path.unlink(missing_ok=True)
        finally:
            upload.path.unlink(missing_ok=True)

    async def film(self, ids: Sequence[str], owner: str) -> ClientFile:
        """Join videos, one after another, to one MP4 in the size and at the rate of the first; keep it as a file.

        Raises:
            ServiceError: 404 if there is no such job, 409 if one is not completed yet, 400 for fewer than two videos
                or a film that is too long, 507 if the disk is full.
        """
        if len(ids) < 2:
            message = f"{len(ids)} video is given: a film needs at least two"
            raise invalid_value(message, "videos", "film_too_short", given=len(ids))
        async with AsyncExitStack() as stack:
            uploads: dict[str, Upload] = {}
            for id in dict.fromkeys(ids):
                uploads[id] = await self._take(id, owner)
                stack.callback(uploads[id].path.unlink, missing_ok=True)
            task = await in_thread(_film_task, [uploads[id] for id in ids], self._service.settings.max_upload_seconds)
            path = await self._write(owner, uploads[ids[0]], task)
            stack.callback(path.unlink, missing_ok=True)
            job = await self._service.get(ids[0], owner)
            film = Upload(name="film", path=path, size=path.stat().st_size, expected_kind="video")
            return await self._service.library.add(film, owner, f"{speaking_name(job)}_film.mp4")

    async def _take(self, id: str, owner: str) -> Upload:
        return await self._service.library.take(StoredReference.model_construct(video_id=id), owner, param="videos")

    async def _write(self, owner: str, upload: Upload, task: Mapping[str, Any]) -> Path:
        """Have a child do a task when it is its owner's turn; return a new file of the spool."""
        service = self._service
        path = service.spool.new()
        try:
            with path.open("w+b") as target:
                seconds = service.settings.cut_seconds
                make = partial(service.submitter.prober.make, upload, task, target, wall_seconds=seconds)
                await self._turns.run(owner, make)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return path


def _task_of(export: Export, info: UploadInfo) -> dict[str, Any]:
    if export == "last_frame":
        return {"make": "last_frame", "seconds": info.seconds}
    fps = exact_rate(rate_of(info)).as_integer_ratio()
    return {"make": "animation", "kind": export, "fps": fps, "longest_side": _LONGEST_SIDES[export]}


def _film_task(uploads: Sequence[Upload], longest_seconds: float) -> dict[str, Any]:
    """Describe a film to the child. Raises ServiceError (400) for one that is too long."""
    infos = [upload.info for upload in uploads]
    first = infos[0]
    assert first is not None
    seconds = sum(info.seconds for info in infos if info is not None)
    if seconds > longest_seconds:
        message = f"the film would last {seconds:.4g} s, the limit is {longest_seconds:g} s: choose fewer videos"
        raise invalid_value(message, "videos", "film_too_long", seconds=seconds, limit=longest_seconds)
    return {
        "make": "film",
        "paths": [str(upload.path) for upload in uploads],
        "sha256": [sha256_of(upload.path) for upload in uploads],
        "size": [first.width, first.height],
        "fps": exact_rate(rate_of(first)).as_integer_ratio(),
    }
