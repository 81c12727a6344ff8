"""Store inputs, results, checkpoints and previews in a local folder, or in any store that fsspec opens by URL.

Only the server makes keys, never a client: ``inputs/<job>/0.png``, ``results/<job>/<attempt>/video.mp4``,
``checkpoints/<job>/<attempt>.safetensors``, ``previews/<job>.webp``, ``previews/<job>/<attempt>-000000.mp4``, the first
bytes of a video that can be watched while it is made, and ``files/<id>.png``, what a client keeps here.
"""

import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any, BinaryIO

from pusa.fsutil import flush, is_full, private_opener

__all__ = ["FileStore", "StorageFullError", "StorageUnavailableError", "fragment_key", "full_disk"]

_KEY = re.compile(r"[a-z0-9_-][a-z0-9_.-]*(/[a-z0-9_-][a-z0-9_.-]*)*")  # no part begins with a dot
_PARTIAL = ".part-"  # prefix of files being written; no key begins so
_ATOMIC_UPLOADS = {
    "s3",
    "s3a",
    "gs",
    "gcs",
    "az",
    "abfs",
    "abfss",
    "oss",
    "oci",
}  # object stores show complete files only
_CHUNK_BYTES = 1 << 20


def fragment_key(job: str, attempt: int, number: int) -> str:
    """Name a part, from 0 on, of a video that an attempt of a job makes piece by piece."""
    return f"previews/{job}/{attempt}-{number:06d}.mp4"


class StorageFullError(OSError):
    """Report that the disk, or the quota on it, is full; no partial file is left."""


def full_disk(free_bytes: int, minimum_bytes: int) -> StorageFullError:
    """Build the error for a disk that has too little space left."""
    return StorageFullError(
        errno.ENOSPC,
        f"{max(0, free_bytes) >> 20} MiB of disk are free and {minimum_bytes >> 20} MiB are to stay so: "
        "delete videos, or add space",
    )


class StorageUnavailableError(OSError):
    """Report that the folder of the files has vanished, as with a disk that is no longer mounted."""

    def __init__(self) -> None:
        super().__init__(errno.ENOENT, "the folder of the server's files is gone: mount its disk again, or restore it")


class FileStore:
    """Store files by key. A file is complete or absent, and survives a power cut once `put_*` has returned."""

    def __init__(self, url: str) -> None:
        """Open the store and create its folder if there is none.

        Args:
            url: a local folder (a path or ``file:///...``), or a URL for fsspec: ``s3://bucket/folder``. That needs
                fsspec's package for it (s3fs), which reads its own settings.

        Raises:
            ValueError: no installed package opens this kind of URL.
        """
        self._fs: Any = None
        self._root = url.removeprefix("file://")
        if "://" not in self._root:
            self._folder: Path | None = Path(self._root).expanduser().resolve()
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            return
        self._folder = None
        from fsspec.core import url_to_fs

        try:
            self._fs, self._root = url_to_fs(url.rstrip("/"))
        except (ImportError, ValueError) as error:
            raise ValueError(f"the store {url.partition('://')[0]}://... cannot be used: {error}") from error
        self._root = self._root.rstrip("/")
        names = {self._fs.protocol} if isinstance(self._fs.protocol, str) else set(self._fs.protocol)
        self._renames = not names & _ATOMIC_UPLOADS

    def put_file(self, key: str, path: Path) -> None:
        """Copy a local file to `key`, durably, replacing an older one.

        Raises:
            StorageFullError: the disk is full; `key` is unchanged.
            ValueError: `key` is malformed.
        """
        with self._full_disk_errors(key):
            if not self._folder:
                self._put_remote(key, lambda target: self._fs.put_file(str(path), target))
                return
            with path.open("rb") as source:
                self._put_local(self._path(key), lambda target: shutil.copyfileobj(source, target, _CHUNK_BYTES))

    def put_bytes(self, key: str, data: bytes) -> None:
        """Write bytes to `key`, like `put_file`."""
        with self._full_disk_errors(key):
            if self._folder:
                self._put_local(self._path(key), lambda target: target.write(data))
            else:
                self._put_remote(key, lambda target: self._fs.pipe_file(target, data))

    def get_bytes(self, key: str) -> bytes:
        """Read a whole file. Raises FileNotFoundError."""
        with self.open(key) as file:
            return file.read()

    def open(self, key: str) -> BinaryIO:
        """Open a file for reading and seeking. Raises FileNotFoundError."""
        return self._path(key).open("rb") if self._folder else self._fs.open(self._remote(key), "rb")

    def size(self, key: str) -> int:
        """Return a file's size in bytes. Raises FileNotFoundError."""
        return self._path(key).stat().st_size if self._folder else int(self._fs.info(self._remote(key))["size"])

    def stamp(self, key: str) -> object:
        """Return a value that differs once a file has been written anew. Raises FileNotFoundError."""
        if not self._folder:
            info = self._fs.info(self._remote(key))
            return info["size"], _modified_at(info), info.get("ETag")
        status = self._path(key).stat()
        return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino

    def exists(self, key: str) -> bool:
        return self._path(key).is_file() if self._folder else bool(self._fs.isfile(self._remote(key)))

    def local(self, key: str) -> Path | None:
        """Return the path of a file that is or would be in a local folder; None in a remote store."""
        return self._path(key) if self._folder else None

    def fetch(self, key: str, folder: Path) -> Path:
        """Return a local file with the content of `key`: the store's own (read only), or a download in `folder`.

        Raises FileNotFoundError.
        """
        if self._folder:
            path = self._path(key)
            if not path.is_file():
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
            return path
        target = folder / key.replace("/", "-")
        self._fs.get_file(self._remote(key), str(target))
        return target

    def delete(self, key: str) -> None:
        """Remove a file if it exists."""
        if not self._folder:
            with suppress(FileNotFoundError):
                self._fs.rm_file(self._remote(key))
            return
        path = self._path(key)
        path.unlink(missing_ok=True)
        with suppress(OSError):  # remove emptied folders, up to the first that is not empty
            for folder in path.parents[: key.count("/")]:
                folder.rmdir()

    def delete_prefix(self, prefix: str) -> None:
        """Remove every file below a prefix of whole parts: ``results/<job>``."""
        if self._folder:
            for key, _ in list(self.keys(_checked(prefix))):
                self.delete(key)
            return
        with suppress(FileNotFoundError):
            self._fs.rm(self._remote(prefix), recursive=True)

    def keys(self, prefix: str = "") -> Iterator[tuple[str, float]]:
        """List the keys below a prefix of whole parts ("": all) with their modification times (unix seconds)."""
        files = self._local_files(prefix) if self._folder else self._remote_files(prefix)
        return ((name, modified_at) for name, modified_at in files if _KEY.fullmatch(name))

    def remove_unfinished(self, before: float) -> int:
        """Remove partial files of killed processes, last written before a time (unix seconds); return how many."""
        found = self._local_files("") if self._folder else self._remote_files("")
        partial = [name for name, at in found if name.rpartition("/")[2].startswith(_PARTIAL) and at < before]
        for name in partial:
            with suppress(FileNotFoundError):
                if self._folder:
                    (self._folder / name).unlink()
                else:
                    self._fs.rm_file(f"{self._root}/{name}")
        return len(partial)

    @property
    def folder(self) -> Path | None:
        """The folder of a local store; None for a remote one."""
        return self._folder

    def free_bytes(self) -> int | None:
        """Return the free bytes of the disk; None for a remote store."""
        return shutil.disk_usage(self._folder).free if self._folder else None

    # ---- Helpers -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _full_disk_errors(self, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not is_full(error):
                raise
            raise StorageFullError(
                error.errno, f"{error.strerror}: {key} was not stored; delete results or add space"
            ) from error

    def _put_local(self, path: Path, write: Callable[[IO[bytes]], Any]) -> None:
        part = path.with_name(_PARTIAL + secrets.token_hex(8))
        file = self._create(part)
        try:
            with file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        flush(path.parent)

    def _create(self, path: Path) -> IO[bytes]:
        """Create a file; retry, as `delete` may remove its still empty folder at the same moment."""
        for left in range(9, -1, -1):
            self._make_folder(path.parent)
            try:
                return open(path, "xb", opener=private_opener)
            except FileNotFoundError:
                if not left:
                    raise
        raise AssertionError("unreachable")

    def _make_folder(self, folder: Path) -> None:
        """Create a folder and its parents durably: flush each one's parent."""
        if folder.is_dir():
            return
        if folder == self._folder:  # made at the start: what is written now would hide the disk that is to return
            raise StorageUnavailableError
        self._make_folder(folder.parent)
        with suppress(FileNotFoundError):  # see `_create`
            folder.mkdir(mode=0o700, exist_ok=True)
            flush(folder.parent)

    def _put_remote(self, key: str, upload: Callable[[str], Any]) -> None:
        path = self._remote(key)
        if not self._renames:
            upload(path)
            return
        folder = path.rpartition("/")[0]
        part = f"{folder}/{_PARTIAL}{secrets.token_hex(8)}"
        try:
            self._fs.makedirs(folder, exist_ok=True)
            upload(part)
            self._fs.mv(part, path)
        except BaseException:
            with suppress(FileNotFoundError):
                self._fs.rm_file(part)
            raise

    def _local_files(self, prefix: str) -> Iterator[tuple[str, float]]:
        assert self._folder
        start = len(self._folder.as_posix().rstrip("/")) + 1
        for entry in _files_below(self._path(prefix) if prefix else self._folder):
            with suppress(FileNotFoundError):
                yield Path(entry.path).as_posix()[start:], entry.stat(follow_symlinks=False).st_mtime

    def _remote_files(self, prefix: str) -> Iterator[tuple[str, float]]:
        try:
            found = self._fs.find(self._remote(prefix) if prefix else self._root, detail=True)
        except FileNotFoundError:
            return
        finally:
            self._fs.invalidate_cache()  # other machines write to the store too
        for path, info in found.items():
            yield path[len(self._root) :].lstrip("/"), _modified_at(info)

    def _path(self, key: str) -> Path:
        assert self._folder
        return self._folder / _checked(key)

    def _remote(self, key: str) -> str:
        return f"{self._root}/{_checked(key)}"


def _files_below(folder: str | Path) -> Iterator["os.DirEntry[str]"]:
    """List the files below a folder one by one: a store may have millions."""
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _files_below(entry.path)
            elif entry.is_file(follow_symlinks=False):
                yield entry


def _checked(key: str) -> str:
    if not _KEY.fullmatch(key) or ".." in key or len(key) > 255:
        raise ValueError(f"{key[:80]!r} is not a key: small letters, digits and _.- in parts with / between them")
    return key


def _modified_at(info: dict[str, Any]) -> float:
    """Return the modification time of an fsspec entry (unix seconds), which stores name differently.

    An entry without a time counts as new (infinity), so that housekeeping keeps it.
    """
    when = next(
        (info[name] for name in ("LastModified", "last_modified", "mtime", "updated", "created") if info.get(name)),
        None,
    )
    if isinstance(when, str):
        when = datetime.fromisoformat(when)
    if isinstance(when, datetime):
        return when.timestamp()
    return float(when) if when is not None else float("inf")
