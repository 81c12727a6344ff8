"""Store the visitors' files in a folder of their own, and check the paths that a page names.

Gradio keeps uploads of all visitors in one folder, by their content, and believes a page that names a file there. Here
each API key has a folder, and each file in it a folder whose name nobody guesses. The path tells the owner, also after
a restart.
"""

import hashlib
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pusa.server.clock import TrustedClock
from pusa.server.errors import ServiceError

KEEP_SECONDS = 86_400.0
"""Files older than this are removed."""

_SWEEP_SECONDS = 3600.0
_NAME_LENGTH = 100
_NOT_IN_NAMES = re.compile(r"[^\w.() -]|[\x00-\x1f]")
_FOLDER = re.compile(r"[0-9a-f]{32}")


class VisitorFiles:
    """Manage the visitors' files below one folder. All methods touch the disk: call them in a thread.

    An `owner` stands for an API key; "" for everyone on a server without keys.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] | None = None) -> None:
        self.folder = folder.absolute() / "visitors"
        self._clock = clock or TrustedClock()
        self._swept_at = float("-inf")

    def new(self, owner: str, name: str) -> Path:
        """Return a new path for a file of this name. Removes old files from time to time."""
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
        """Move a file to this owner's."""
        target = self.new(owner, name)
        shutil.move(source, target)
        return target

    def copy(self, owner: str, source: Path) -> Path:
        """Copy a file to this owner's."""
        target = self.new(owner, source.name)
        shutil.copyfile(source, target)
        return target

    def is_own(self, owner: str, path: str) -> bool:
        """Tell whether `new` has made a path for this owner. The file itself may be gone."""
        if not isinstance(path, str) or len(path) > 4096 or "\0" in path:
            return False
        file, folder = Path(path), self._of(owner)
        parts = file.parts[len(folder.parts) :]
        is_below = file.parts[: len(folder.parts)] == folder.parts and len(parts) == 2
        if not is_below or not _FOLDER.fullmatch(parts[0]) or safe_name(parts[1]) != parts[1]:
            return False
        return file.resolve() == folder.resolve() / parts[0] / parts[1]  # no link leads elsewhere

    def check(self, owner: str, path: str) -> None:
        """Raise ServiceError (400) for a path that is not this owner's."""
        if not self.is_own(owner, path):
            raise ServiceError(
                400, "invalid_file", "the page names a file that was not sent from it: choose the file again"
            )

    def remove_old(self, seconds: float) -> None:
        """Remove files older than `seconds`."""
        before = self._clock() - seconds
        for folder in self._each():
            with suppress(FileNotFoundError):
                if folder.stat().st_mtime < before:
                    shutil.rmtree(folder)

    @property
    def disk(self) -> Path:
        """Return an existing folder on the disk that holds the files."""
        return next(folder for folder in (self.folder, *self.folder.parents) if folder.is_dir())

    def _each(self) -> Iterator[Path]:
        with suppress(FileNotFoundError):
            for owner in list(self.folder.iterdir()):
                yield from list(owner.iterdir())

    def _of(self, owner: str) -> Path:
        return self.folder / hashlib.sha256(f"visitor {owner}".encode()).hexdigest()[:32]


def safe_name(name: str) -> str:
    """Make a client's file name safe: without folders, not hidden, short."""
    name = _NOT_IN_NAMES.sub("_", name.replace("\\", "/").rpartition("/")[2]).strip(". ")
    stem, dot, suffix = name.rpartition(".")
    short = f"{stem[: _NAME_LENGTH - 12]}{dot}{suffix[:10]}" if dot else name[:_NAME_LENGTH]
    while len(short.encode()) > 2 * _NAME_LENGTH:
        short = short[1:]
    return short.strip(". ") or "file"


@dataclass
class Arriving:
    """Count the bytes of an upload that the page has not been sent yet."""

    name: str = ""
    new_bytes: int = 0
    is_done: bool = False


class Progress:
    """Keep the progress of uploads for the page that waits for them, by sender and the id that the page drew."""

    _MOST = 1000

    def __init__(self) -> None:
        self._arriving: dict[tuple[str, str], Arriving] = {}

    def of(self, owner: str, id: str) -> Arriving:
        """Return the progress of an upload, new on the first call; the oldest are dropped."""
        key = (owner, id[:64])
        while len(self._arriving) >= self._MOST and key not in self._arriving:
            del self._arriving[next(iter(self._arriving))]
        return self._arriving.setdefault(key, Arriving())

    def forget(self, owner: str, id: str) -> None:
        self._arriving.pop((owner, id[:64]), None)
