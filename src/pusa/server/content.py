"""Find the files of jobs, and describe a stored file that is ready to be sent."""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from pusa.server.errors import ServiceError
from pusa.server.jobs.job import Job
from pusa.server.jobs.store import FileStore

_LONGEST_PROMPT = 60  # characters of a prompt in a file's name
_MEDIA_TYPES = {
    ".avi": "video/x-msvideo",
    ".avif": "image/avif",
    ".bmp": "image/bmp",
    ".gif": "image/gif",
    ".heic": "image/heic",
    ".jpg": "image/jpeg",
    ".mkv": "video/x-matroska",
    ".mp4": "video/mp4",
    ".mpg": "video/mpeg",
    ".ogv": "video/ogg",
    ".png": "image/png",
    ".ts": "video/mp2t",
    ".webp": "image/webp",
}


@dataclass(frozen=True)
class Content:
    """A file of a job or of a client, ready to be sent.

    Attributes:
        path: the file on this machine; None if the store is elsewhere.
        open: opens the file wherever it is.
        size: in bytes.
        name: proposed to whoever downloads it.
    """

    path: Path | None
    open: Callable[[], BinaryIO]
    size: int
    media_type: str
    name: str
    etag: str

    @classmethod
    def of(cls, files: FileStore, key: str, size: int, stem: str) -> "Content":
        """Describe a file of the store, which never changes; `stem` is its name without the suffix."""
        suffix = key[key.rfind(".") :]
        return cls(
            path=files.local(key),
            open=partial(files.open, key),
            size=size,
            media_type=_MEDIA_TYPES.get(suffix, "application/octet-stream"),
            name=f"{stem}{suffix}",
            etag=hashlib.sha256(key.encode()).hexdigest()[:32],
        )


def speaking_name(job: Job) -> str:
    """Return a name for the files of a job, without a suffix: the beginning of its prompt and its seed, or its id."""
    words = re.findall(r"[^\W_]+", job.prompt[:_LONGEST_PROMPT])
    if not words:
        return job.id
    seed = job.request.get("seed")
    return "-".join([*words, *([] if seed is None else ["seed", str(seed)])])


def result_key(job: Job, variant: str = "video") -> str:
    """Return the key of a file of a completed job.

    Raises:
        ServiceError: 409 before the job is completed, 404 if it has no such file.
    """
    if job.status in ("queued", "in_progress"):
        message = f"{job.id} is {job.status}: its {variant} is there once it is completed"
        raise ServiceError(409, "not_ready", message, values={"status": job.status})
    if variant not in job.results:
        message = f"{job.id} has no {variant}: it is {job.status}"
        raise ServiceError(404, "no_result", message, values={"status": job.status})
    return job.results[variant]
