"""Files that are on the disk and not only on their way there, and names for what is in them."""

import errno
import hashlib
import os
from pathlib import Path

_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}  # Windows has no quota error


def is_full(error: BaseException) -> bool:
    """Whether an error says that the disk, or the quota on it, has no room left."""
    return isinstance(error, OSError) and error.errno in _FULL


def flush(path: Path) -> None:
    """Make the disk have a file, or the names in a folder (on POSIX; elsewhere the file system does that by itself)."""
    if os.name != "posix" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """Of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
