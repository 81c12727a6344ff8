"""Reserve disk space and memory for the requests that are arriving, so that they do not take what is to stay free."""

import os
import shutil
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import anyio.to_thread

from pusa.server.errors import ServiceError
from pusa.server.jobs.store import StorageUnavailableError, full_disk

_STEP_BYTES = 2**20  # reserved at once for a body of unknown length
_FREE_TEXT_BYTES = 2**16  # of each request, which do not count


class DiskSpace:
    """Count what is reserved on each disk. All methods are thread-safe and touch the disk: call them in a thread.

    Args:
        minimum_bytes: free space that no reservation may take.
    """

    def __init__(self, minimum_bytes: int) -> None:
        self.minimum_bytes = minimum_bytes
        self._reserved: Counter[int] = Counter()  # bytes by device
        self._lock = threading.Lock()

    def take(self, folders: Sequence[Path], size_bytes: int) -> list[int]:
        """Reserve `size_bytes` on the disk of each folder, twice where two share a disk; return the devices.

        Raises:
            StorageFullError: less than `minimum_bytes` would be left.
            StorageUnavailableError: a folder is gone.
        """
        places = [(_device(folder), folder) for folder in folders]
        with self._lock:
            wanted = Counter(device for device, _ in places)
            for device, folder in places:
                free_bytes = shutil.disk_usage(folder).free - self._reserved[device]
                if free_bytes - wanted[device] * size_bytes < self.minimum_bytes:
                    raise full_disk(free_bytes, self.minimum_bytes)
            for device, _ in places:
                self._reserved[device] += size_bytes
        return [device for device, _ in places]

    def give_back(self, device: int, size_bytes: int) -> None:
        with self._lock:
            self._reserved[device] -= size_bytes
            if self._reserved[device] <= 0:
                del self._reserved[device]

    @property
    def reserved_bytes(self) -> int:
        """Sum over all disks."""
        return sum(self._reserved.values())


def _device(folder: Path) -> int:
    try:
        return os.stat(folder).st_dev
    except FileNotFoundError:
        raise StorageUnavailableError() from None


class TextMemory:
    """Count the bytes of bodies that are held in memory, over all requests. Thread-safe."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes, self._held_bytes = limit_bytes, 0
        self._lock = threading.Lock()

    def hold(self, size_bytes: int) -> None:
        """Raises ServiceError (503) beyond the limit."""
        with self._lock:
            if self._held_bytes + size_bytes > self._limit_bytes:
                raise ServiceError(
                    503,
                    "busy",
                    f"requests with {self._limit_bytes / 2**20:g} MiB of base64 are arriving, the limit: send it again "
                    "in a moment, or files as multipart/form-data",
                    headers={"retry-after": "2"},
                )
            self._held_bytes += size_bytes

    def release(self, size_bytes: int) -> None:
        with self._lock:
            self._held_bytes -= size_bytes

    @property
    def held_bytes(self) -> int:
        return self._held_bytes


class Arrival:
    """Hold the reservations of one request, from its head until its files have been stored or dropped.

    Args:
        disk, memory: shared by all requests.
        folders: which the body's files are written to: the spool first, then the store or the visitors' folder.
        length: the request's Content-Length; None for a body in chunks, whose reservation grows with it.
    """

    def __init__(self, disk: DiskSpace, memory: TextMemory, folders: Sequence[Path], length: int | None) -> None:
        self._disk, self._memory, self._folders = disk, memory, folders
        self._has_length = length is not None
        self._expected_bytes = self._spool_bytes = self._text_bytes = 0
        self._held: Counter[int] = Counter()  # bytes by device
        self._spool_device = 0
        self._take(length or 0)

    def _take(self, size_bytes: int) -> None:
        devices = self._disk.take(self._folders, size_bytes)
        for device in devices:
            self._held[device] += size_bytes
        self._spool_device = devices[0]
        self._spool_bytes += size_bytes
        self._expected_bytes += size_bytes

    async def received(self, size_bytes: int) -> None:
        """Count a part of the body before it is written. Raises StorageFullError."""
        self._expected_bytes -= size_bytes
        if not self._has_length and self._expected_bytes < 0:
            await anyio.to_thread.run_sync(self._take, max(_STEP_BYTES, -self._expected_bytes))

    def spooled(self, size_bytes: int) -> None:
        """Give back what has been written to the spool: the disk counts it from now on."""
        size_bytes = min(size_bytes, self._spool_bytes)
        self._spool_bytes -= size_bytes
        self._held[self._spool_device] -= size_bytes
        self._disk.give_back(self._spool_device, size_bytes)

    def hold_text(self, size_bytes: int) -> None:
        """Count bytes of the body that stay in memory; the first ones are free. Raises ServiceError (503)."""
        before, self._text_bytes = self._text_bytes, self._text_bytes + size_bytes
        counted = max(0, self._text_bytes - _FREE_TEXT_BYTES) - max(0, before - _FREE_TEXT_BYTES)
        try:
            self._memory.hold(counted)
        except ServiceError:
            self._text_bytes = before
            raise

    def release(self) -> None:
        """Give everything back; a second call does nothing."""
        for device, size_bytes in self._held.items():
            self._disk.give_back(device, size_bytes)
        self._held.clear()
        self._memory.release(max(0, self._text_bytes - _FREE_TEXT_BYTES))
        self._text_bytes = self._spool_bytes = 0
