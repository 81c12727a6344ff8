"""Keep the files that clients send, each content of an owner once, and take them, or parts of them, as inputs of jobs.

Every call that touches the disk or the database runs in a thread, so that the event loop stays free for other clients.
"""

import asyncio
import hashlib
import io
import json
import os
import shutil
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakValueDictionary

from pusa.fsutil import sha256_of
from pusa.server.content import Content, result_key
from pusa.server.errors import ServiceError
from pusa.server.http.reference_schemas import StoredReference
from pusa.server.http.validation import invalid_value, refused_value
from pusa.server.jobs.client_files import ClientFile, ClientFileTable, FilesFull, NewClientFile, new_file_id
from pusa.server.jobs.job import FileDigest, Job
from pusa.server.submit import in_thread
from pusa.server.transfers.parts import FoundPart, Part, exact_rate, rate_of
from pusa.server.transfers.reservations import Arrival
from pusa.server.transfers.turns import Turns
from pusa.server.transfers.uploads import PROBES_AT_ONCE, Upload, UploadInfo

if TYPE_CHECKING:
    from pusa.server.service import VideoService

MAX_FRAME_WIDTH, MAX_STRIP_FRAMES, MAX_STRIP_HEIGHT = 1024, 64, 512
_ROUNDING_SECONDS = 0.001  # of a time that a player tells
_USE_SECONDS = 3600.0  # between two records of a file's use
_LONGEST_NAME = 200  # characters
_CACHE_BYTES = 64 * 2**20
_LARGEST_CACHED_BYTES = 8 * 2**20
_MOST_INFOS = 10_000


@dataclass(frozen=True)
class Located:
    """A stored file that a reference names.

    Attributes:
        key: in the FileStore.
        name: for people.
        digest: what the file must be; None for those stored before digests were recorded.
        info: what the prober has found.
        owner: whose it is.
        job: id of the job it belongs to; empty for a client's file.
        is_result: True for the video of that job.
    """

    key: str
    name: str
    digest: FileDigest | None
    info: UploadInfo
    owner: str
    job: str = ""
    is_result: bool = False


class FileLibrary:
    """The files of clients, and the files of jobs as far as requests may name them.

    A file is named only by its owner: the digest of an API key, or "" where no keys are set. Every refusal is a
    `ServiceError`: 404 for what does not exist or belongs to another owner, 400 for what cannot be read.
    """

    def __init__(self, service: "VideoService") -> None:
        self._service, self._settings, self._files = service, service.settings, service.files
        self._table = ClientFileTable(service.queue)
        self._turns = Turns(PROBES_AT_ONCE)
        self._made = _Cache(_CACHE_BYTES)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # each is made once at a time
        self._infos: OrderedDict[str, UploadInfo] = OrderedDict()  # of the files of jobs, by key

    # ---- keeping files -----------------------------------------------------------------------------------------------

    async def add(self, upload: Upload, owner: str, name: str = "") -> ClientFile:
        """Keep a copy of a file, which is on disk when this returns; the same content is the same file.

        Args:
            name: the client's; by default it follows from the content.
        """
        if upload.parent:  # a result may be longer than files may be
            upload = replace(upload, info=None, parent="")
        upload = (await self._service.submitter.probe({"file": upload}))["file"]
        assert upload.info is not None
        digest = await in_thread(FileDigest.of, upload.path)
        same = await in_thread(self._table.use_same, owner, digest.sha256)
        if same is not None:
            if not await in_thread(self._is_intact, same):
                await in_thread(self._files.put_file, same.key, upload.path)
            return same
        id = new_file_id()
        new = NewClientFile(
            id=id,
            owner=owner,
            digest=digest,
            key=f"files/{id}{upload.info.suffix}",
            name=_clean_name(name) or f"{upload.info.kind}{upload.info.suffix}",
            info=asdict(upload.info),
        )
        return await in_thread(self._store, new, upload.path)

    def _store(self, new: NewClientFile, path: Path) -> ClientFile:
        """Copy the content, then add the row; without a new row the copy is removed."""
        limit = self._settings.key_file_bytes
        key = ""
        try:
            self._files.put_file(new.key, path)
            kept = self._table.add(new, limit_bytes=limit or None)
            key = kept.key
        except FilesFull as full:
            raise ServiceError(
                507,
                "files_full",
                f"your files take {full.used_bytes / 2**20:.1f} MiB and this one {new.digest.size_bytes / 2**20:.1f}, "
                f"the limit is {limit / 2**20:g} MiB: delete some that you do not need",
                "file",
                values={"used": full.used_bytes / 2**20, "size": new.digest.size_bytes / 2**20, "limit": limit / 2**20},
            ) from None
        finally:
            if key != new.key:
                self._files.delete(new.key)
        return kept

    async def adopt(self, reference: StoredReference, owner: str, name: str = "") -> ClientFile:
        """Keep a copy of a job's result or input, or of a part of a file."""
        upload = await self.take(reference, owner, param="video_id")
        try:
            return await self.add(upload, owner, name or upload.name)
        finally:
            upload.path.unlink(missing_ok=True)

    async def get(self, id: str, owner: str) -> ClientFile:
        return _found(await in_thread(self._table.get, id, owner), id)

    async def list(
        self, owner: str, *, after: str | None = None, limit: int = 20, order: Literal["asc", "desc"] = "desc"
    ) -> tuple[list[ClientFile], bool]:
        """Read a page of files, by default the newest first, and whether more follow.

        Raises ServiceError (400) for an unknown `after`.
        """
        try:
            return await in_thread(partial(self._table.page, owner, after=after, limit=limit, order=order))
        except KeyError:
            message = f"after={str(after)[:60]!r} is no file: take last_id of a page before"
            raise invalid_value(message, "after") from None

    async def find(self, sha256: str, owner: str) -> str | None:
        """Return the id of the owner's file of this content; None without one."""
        same = await in_thread(self._table.use_same, owner, sha256)
        return None if same is None else same.id

    async def delete(self, id: str, owner: str) -> ClientFile:
        """Remove a file. Jobs keep their own copies."""
        removed = _found(await in_thread(self._table.delete, id, owner), id)
        await in_thread(self._files.delete, removed.key)
        return removed

    async def content(self, id: str, owner: str) -> Content:
        """Find the content of a file."""
        located = await self.locate(StoredReference.model_construct(file_id=id), owner)
        assert located.digest is not None
        stem = located.name.rpartition(".")[0] or located.name
        return Content.of(self._files, located.key, located.digest.size_bytes, _ascii(stem))

    def reserve(self, size_bytes: int) -> Arrival:
        """Reserve space for a file that does not come with a body; in a thread. Raises StorageFullError."""
        return self._service.arrival(size_bytes)

    def expires_at(self, file: ClientFile) -> float | None:
        """Return when a file is removed unless it is used before (unix seconds); None: never."""
        keep_seconds = self._settings.keep_seconds
        return None if keep_seconds is None else file.used_at + keep_seconds

    # ---- finding what a reference names ------------------------------------------------------------------------------

    async def locate(self, reference: StoredReference, owner: str) -> Located:
        """Find the file that a reference names, which counts as used, and check that it is what was stored."""
        if reference.file_id is not None:
            return await self._locate_file(reference.file_id, owner)
        job = await self._service.get(str(reference.video_id), owner)
        if reference.input is None:
            located = partial(Located, key=result_key(job), name=f"{job.id}.mp4", is_result=True)
        elif reference.input < len(job.inputs):
            located = partial(Located, key=job.inputs[reference.input], name=f"input {reference.input} of {job.id}")
        else:
            message = f"input={reference.input}: {job.id} was made from {len(job.inputs)} files, counted from 0"
            raise invalid_value(message, "input")
        key = located.keywords["key"]
        try:
            if not await in_thread(self._service.integrity.is_intact, job.id, key):
                raise await self._service.damaged(job.id, key)
            digest = await in_thread(self._service.queue.digest, job.id, key)
            return located(digest=digest, info=await self._info_of(job, key), owner=owner, job=job.id)
        except FileNotFoundError:
            raise ServiceError(404, "file_gone", f"a file of {job.id} is not kept any more: send it anew") from None

    async def _locate_file(self, id: str, owner: str) -> Located:
        keep_seconds = self._settings.keep_seconds
        seconds = _USE_SECONDS if keep_seconds is None else min(_USE_SECONDS, keep_seconds / 10)
        file = _found(await in_thread(partial(self._table.use, id, owner, at_most_every_seconds=seconds)), id)
        if not await in_thread(self._is_intact, file):
            raise ServiceError(409, "file_damaged", f"{id} is damaged or gone on the server's disk: send it anew")
        return Located(file.key, file.name, file.digest, UploadInfo(**file.info), owner)

    def _is_intact(self, file: ClientFile) -> bool:
        try:
            return self._service.integrity.is_intact(file.id, file.key, file.digest)
        except FileNotFoundError:
            return False

    async def _info_of(self, job: Job, key: str) -> UploadInfo:
        """Read what a job's file is, as the job uses it."""
        if (known := self._infos.get(key)) is not None:
            return known
        kinds = {spec["file"]: spec["kind"] for spec in job.request.get("conditions") or []}
        expected: Literal["image", "video"] | None = "image" if kinds.get(key) == "image" else None
        path = await in_thread(self._bring, key)
        try:
            parent = job.id if key in job.results.values() else ""
            upload = Upload(name=f"a file of {job.id}", path=path, expected_kind=expected, parent=parent)
            info = (await self._service.submitter.probe({"file": upload}))["file"].info
        finally:
            path.unlink(missing_ok=True)
        assert info is not None
        self._infos[key] = info
        while len(self._infos) > _MOST_INFOS:
            self._infos.popitem(last=False)
        return info

    def _bring(self, key: str) -> Path:
        """Return a path in the spool with a file of the store, which stays there whatever becomes of the original.

        Raises FileNotFoundError.
        """
        path = self._service.spool.new()
        if (local := self._files.local(key)) is not None:
            try:
                os.link(local, path)
                return path
            except FileNotFoundError:
                raise
            except OSError:  # the spool is on another disk, or this one has no links
                pass
        try:
            with self._files.open(key) as source, path.open("wb") as target:
                shutil.copyfileobj(source, target, 2**20)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return path

    # ---- taking files as inputs --------------------------------------------------------------------------------------

    async def take(self, reference: StoredReference, owner: str, *, param: str, makes_parts: bool = True) -> Upload:
        """Bring what a reference names to the spool as an input; the caller removes it.

        Args:
            param: the field at fault in errors.
            makes_parts: False leaves the whole file in place of a part, for callers that need its `info` alone.
        """
        located = await self.locate(reference, owner)
        parent = located.job if located.is_result else ""
        upload = Upload(name=located.name, path=await self._brought(located), info=located.info, parent=parent)
        if not reference.is_part:
            return upload
        try:
            found = Part(reference.frame, reference.start, reference.end, reference.crop).of(located.info)
            if found.is_whole:
                return upload
            name = _name_of_part(reference, located.name)
            if not makes_parts:
                return replace(upload, name=name, info=found.made)
            path, info = await self._make_part(located, upload, found)
            upload.path.unlink(missing_ok=True)
            return Upload(name=name, path=path, size=path.stat().st_size, info=info, parent=parent)
        except ValueError as error:
            upload.path.unlink(missing_ok=True)
            raise refused_value(error, param, message=f"{located.name}: {error}", name=located.name) from None
        except BaseException:
            upload.path.unlink(missing_ok=True)
            raise

    async def _brought(self, located: Located) -> Path:
        try:
            return await in_thread(self._bring, located.key)
        except FileNotFoundError:
            raise ServiceError(404, "file_gone", f"{located.name} is not kept any more: send it anew") from None

    async def _make_part(self, located: Located, upload: Upload, found: FoundPart) -> tuple[Path, UploadInfo]:
        """Make a part of a file in a new file of the spool."""
        source, made = found.source, found.made
        sha256 = located.digest.sha256 if located.digest else await in_thread(sha256_of, upload.path)
        task: dict[str, Any] = {"box": found.box, "sha256": sha256}
        if made.kind == "image":
            task |= {"make": "picture", "kind": source.kind, "seconds": _seconds_of(source, found.first)}
        else:
            fps = exact_rate(rate_of(source)).as_integer_ratio()
            most_bytes = self._settings.probe_memory_bytes // 2
            task |= {"make": "piece", "first": found.first, "frames": made.frames, "fps": fps, "max_bytes": most_bytes}
        path = self._service.spool.new()
        try:
            facts = await self._make_file(located, upload, task, path, 3 * made.width * made.height * made.frames)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        frames = int(facts.get("frames", made.frames))
        return path, replace(made, frames=frames, seconds=frames / rate_of(made)) if made.kind == "video" else made

    async def _make_file(
        self, located: Located, upload: Upload, task: Mapping[str, Any], path: Path, most_bytes: int
    ) -> dict[str, Any]:
        """Write what a task makes of a file, at most `most_bytes`, to a new file; return facts about it."""
        identity = _identity(located, task)
        async with self._locks.setdefault(identity, asyncio.Lock()):
            if (known := self._made.get(identity)) is not None:
                await in_thread(path.write_bytes, known[0])
                return known[1]
            arrival = await in_thread(self.reserve, min(most_bytes, int(task.get("max_bytes", most_bytes))))
            try:
                facts = await self._run(located.owner, upload, task, path, self._settings.cut_seconds)
                if path.stat().st_size <= _LARGEST_CACHED_BYTES:
                    self._made.put(identity, await in_thread(path.read_bytes), facts)
                return facts
            finally:
                arrival.release()

    async def _run(
        self,
        owner: str,
        upload: Upload,
        task: Mapping[str, Any],
        target: Path | io.BytesIO,
        wall_seconds: float | None = None,
    ) -> dict[str, Any]:
        """Let a reader do a task when it is its owner's turn."""

        def make() -> dict[str, Any]:
            prober = self._service.submitter.prober
            if isinstance(target, io.BytesIO):
                return prober.make(upload, task, target, wall_seconds=wall_seconds)
            with target.open("wb") as file:
                return prober.make(upload, task, file, wall_seconds=wall_seconds)

        return await self._turns.run(owner, make)

    # ---- drawing files -----------------------------------------------------------------------------------------------

    async def frame(
        self,
        reference: StoredReference,
        owner: str,
        *,
        index: int | None = None,
        time: float | None = None,
        width: int = MAX_FRAME_WIDTH,
    ) -> tuple[bytes, str]:
        """Draw a frame of a file as WebP, at most `width` pixels wide; return it and an entity tag.

        Args:
            index, time: which frame of a clip, by number or seconds; neither takes the first.
        """
        located = await self.locate(reference, owner)
        info = located.info
        if index is not None and time is not None:
            raise invalid_value("index and time name a frame both: give one of them", "time")
        if info.kind == "image":
            if index not in (None, 0) or time not in (None, 0):
                raise invalid_value(
                    f"{located.name} is a picture, which has one frame: leave index and time out", "index"
                )
            seconds: float | None = None
        elif time is not None:
            if time > info.seconds + 1 / rate_of(info):
                raise invalid_value(f"time={time:g} is after the end, {info.seconds:.4g} s", "time")
            seconds = time + _ROUNDING_SECONDS
        else:
            try:
                seconds = _seconds_of(info, Part(frame=index or 0).of(info).first)
            except ValueError as error:
                raise invalid_value(str(error).replace("frame=", "index="), "index") from None
        task = {"make": "frame", "kind": info.kind, "seconds": seconds, "width": width, "size": info.size()}
        return await self._drawn(located, task)

    async def strip(self, reference: StoredReference, owner: str, *, count: int, height: int) -> tuple[bytes, str]:
        """Draw `count` frames of a file side by side as WebP, at most `height` pixels high; return as `frame`."""
        located = await self.locate(reference, owner)
        info = located.info
        whole = {"kind": info.kind, "seconds": info.seconds, "size": info.size()}
        task = {"make": "strip", **whole, "count": count, "height": height}
        return await self._drawn(located, task, self._settings.cut_seconds)

    async def stored_request(self, id: str, owner: str) -> bytes:
        """Read the request that pusa has stored in a file, with its inputs in base64 by sha256, as JSON."""
        located = await self.locate(StoredReference.model_construct(file_id=id), owner)
        if not located.info.has_request:
            message = f"{located.name} holds no request: only videos that pusa made with metadata=full do"
            raise ServiceError(404, "no_request", message)
        content, _ = await self._drawn(located, {"make": "request"})
        return content

    async def _drawn(
        self, located: Located, task: Mapping[str, Any], wall_seconds: float | None = None
    ) -> tuple[bytes, str]:
        """Draw something of a file; return it and an entity tag."""
        identity = _identity(located, task)
        async with self._locks.setdefault(identity, asyncio.Lock()):
            if (known := self._made.get(identity)) is not None:
                return known[0], identity
            parent = located.job if located.is_result else ""
            upload = Upload(name=located.name, path=await self._brought(located), parent=parent)
            target = io.BytesIO()
            try:
                await self._run(located.owner, upload, task, target, wall_seconds)
            finally:
                upload.path.unlink(missing_ok=True)
            content = target.getvalue()
            if len(content) <= _LARGEST_CACHED_BYTES:
                self._made.put(identity, content, {})
            return content, identity


class _Cache:
    """Hold what was made last, with facts about it, up to so many bytes."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes, self._held_bytes = most_bytes, 0
        self._made: OrderedDict[str, tuple[bytes, dict[str, Any]]] = OrderedDict()

    def get(self, identity: str) -> tuple[bytes, dict[str, Any]] | None:
        if identity in self._made:
            self._made.move_to_end(identity)
        return self._made.get(identity)

    def put(self, identity: str, content: bytes, facts: dict[str, Any]) -> None:
        if identity in self._made:
            return
        self._made[identity] = content, facts
        self._held_bytes += len(content)
        while self._held_bytes > self._most_bytes:
            _, (removed, _) = self._made.popitem(last=False)
            self._held_bytes -= len(removed)


def _identity(located: Located, task: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps([located.key, task], sort_keys=True).encode()).hexdigest()[:32]


def _seconds_of(info: UploadInfo, number: int) -> float | None:
    """Return a time at which a frame of a clip is shown, the middle of it; None for a picture."""
    return None if info.kind == "image" else (number + 0.5) / rate_of(info)


def _found(file: ClientFile | None, id: str) -> ClientFile:
    if file is None:
        raise ServiceError(404, "file_not_found", f"there is no file {id[:60]!r}: see GET /v1/files", "file_id")
    return file


def _name_of_part(reference: StoredReference, name: str) -> str:
    if reference.frame is not None:
        return f"frame {reference.frame} of {name}"
    return f"a piece of {name}" if reference.start is not None or reference.end is not None else f"a region of {name}"


def _clean_name(name: str) -> str:
    """Reduce a client's name for a file to one line without folders."""
    line = "".join(character for character in name if character.isprintable())
    return line.replace("\\", "/").rpartition("/")[2].strip()[-_LONGEST_NAME:]


def _ascii(text: str) -> str:
    return "".join(c if c.isascii() and (c.isalnum() or c in " ._-") else "_" for c in text)
