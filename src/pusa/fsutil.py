"""Flush, replace and hash files, and recognise a full disk."""

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
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


def sha256_of(path: Path) -> str:
    """Hash a file's content; return hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
