"""The visitors' own files: what somebody has sent to the page, or was given by it, and may name again.

Gradio keeps uploads of all visitors in one folder, by their content, and believes a page that names a file there. Here
everybody who shows the same API key has a folder, and every file in it one of its own with a name that nobody guesses.
The path says whose it is, so that it is known after a restart.
"""

import hashlib
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pusa.server.errors import ServiceError

KEEP_SECONDS = 86_400.0
"""The time for which a file is kept."""

_SWEEP_SECONDS = 3600.0
_NAME_LENGTH = 100
_NOT_IN_NAMES = re.compile(r"[^\w.() -]|[\x00-\x1f]")
_FOLDER = re.compile(r"[0-9a-f]{32}")


class VisitorFiles:
    """Files below one folder. All methods touch the disk: call them in a thread.

    An `owner` is who shows an API key; "" is everyone where no keys are set.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute() / "visitors"
        self._swept_at = float("-inf")

    def new(self, owner: str, name: str) -> Path:
        """Give the path at which a file of this name may be written; old files are removed meanwhile."""
        if time.monotonic() - self._swept_at > _SWEEP_SECONDS:
            self._swept_at = time.monotonic()
            self.remove_old(KEEP_SECONDS)
        folder = self._of(owner)
        for made in (self.folder, folder):
            made.mkdir(mode=0o700, parents=True, exist_ok=True)
        here = folder / secrets.token_hex(16)
        here.mkdir(mode=0o700)
        return here / safe_name(name)

    def move(self, owner: str, source: Path, name: str) -> Path:
        """A file becomes this owner's."""
        target = self.new(owner, name)
        shutil.move(source, target)
        return target

    def copy(self, owner: str, source: Path) -> Path:
        """A copy of a file becomes this owner's."""
        target = self.new(owner, source.name)
        shutil.copyfile(source, target)
        return target

    def is_own(self, owner: str, path: str) -> bool:
        """Tell whether a path that a visitor names is one of those that `new` has made for them. It need not be there
        any more."""
        if not isinstance(path, str) or len(path) > 4096 or "\0" in path:
            return False
        named, folder = Path(path), self._of(owner)
        parts = named.parts[len(folder.parts) :]
        is_below = named.parts[: len(folder.parts)] == folder.parts and len(parts) == 2
        if not is_below or not _FOLDER.fullmatch(parts[0]) or safe_name(parts[1]) != parts[1]:
            return False
        return named.resolve() == folder.resolve() / parts[0] / parts[1]  # no link leads elsewhere

    def check(self, owner: str, path: str) -> None:
        """Raise ServiceError (400) for a path that is not this owner's."""
        if not self.is_own(owner, path):
            raise ServiceError(
                400, "invalid_file", "the page names a file that was not sent from it: choose the file again"
            )

    def remove_old(self, seconds: float) -> None:
        """Remove what was written longer ago."""
        before = time.time() - seconds
        for folder in self._each():
            with suppress(FileNotFoundError):
                if folder.stat().st_mtime < before:
                    shutil.rmtree(folder)

    @property
    def disk(self) -> Path:
        """A folder that is there, on the disk where the files lie."""
        return next(folder for folder in (self.folder, *self.folder.parents) if folder.is_dir())

    def _each(self) -> Iterator[Path]:
        with suppress(FileNotFoundError):
            for owner in list(self.folder.iterdir()):
                yield from list(owner.iterdir())

    def _of(self, owner: str) -> Path:
        return self.folder / hashlib.sha256(f"visitor {owner}".encode()).hexdigest()[:32]


def safe_name(name: str) -> str:
    """A client's name for a file as the name of one: no folders, not hidden, not long."""
    name = _NOT_IN_NAMES.sub("_", name.replace("\\", "/").rpartition("/")[2]).strip(". ")
    stem, dot, suffix = name.rpartition(".")
    short = f"{stem[: _NAME_LENGTH - 12]}{dot}{suffix[:10]}" if dot else name[:_NAME_LENGTH]
    while len(short.encode()) > 2 * _NAME_LENGTH:
        short = short[1:]
    return short.strip(". ") or "file"


@dataclass
class Arriving:
    """Hold the part of an upload that has come and not been reported yet."""

    name: str = ""
    new_bytes: int = 0
    is_done: bool = False


class Progress:
    """Keep the progress of uploads for the page that waits for them, by sender and the id that the page drew."""

    _MOST = 1000

    def __init__(self) -> None:
        self._arriving: dict[tuple[str, str], Arriving] = {}

    def of(self, owner: str, id: str) -> Arriving:
        """Begun at the first question or the first bytes, whichever comes first; the oldest are forgotten."""
        key = (owner, id[:64])
        while len(self._arriving) >= self._MOST and key not in self._arriving:
            del self._arriving[next(iter(self._arriving))]
        return self._arriving.setdefault(key, Arriving())

    def forget(self, owner: str, id: str) -> None:
        self._arriving.pop((owner, id[:64]), None)
