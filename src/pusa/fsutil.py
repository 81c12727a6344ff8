"""Flush, replace and hash files, and recognise a full disk."""

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}  # Windows has no quota error


def is_full(error: BaseException) -> bool:
    """Tell if an error means that the disk, or the quota on it, is full."""
    return isinstance(error, OSError) and error.errno in _FULL


def flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk (folders on POSIX only: other file systems do it themselves)."""
    if os.name != "posix" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a hidden path beside `path` to write to, and rename it in the end: `path` never holds half a file."""
    part = path.with_name(f".{path.name}.part")
    yield part
    part.replace(path)


def private_folder(path: Path) -> Path:
    """Create a folder that only this user may enter, with its parents, and close an existing one of this user."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.stat()
    if os.name == "posix" and status.st_uid == os.geteuid() and status.st_mode & 0o077:
        with suppress(PermissionError):  # file systems without modes
            path.chmod(status.st_mode & 0o700)
    return path


def private_opener(path: str, flags: int) -> int:
    """Open a file for `open(..., opener=private_opener)`; a new one may be read by this user alone."""
    return os.open(path, flags, 0o600)


def sha256_of(path: Path) -> str:
    """Hash a file's content; return hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
