"""Compare stored files with what was recorded of them."""

import hashlib
import threading
import time
from collections import OrderedDict

from pusa.server.jobs.queue import FileDigest, JobQueue
from pusa.server.jobs.store import FileStore

_FRESH_SECONDS = 600.0  # for which a file that has not been written since counts as intact
_MOST = 10_000


class FileIntegrity:
    """Check stored files against their recorded size and sha256; a file is read again after ten minutes. Thread-safe.

    Files that were stored before sizes and hashes were recorded count as intact.
    """

    def __init__(self, queue: JobQueue, files: FileStore) -> None:
        self._queue, self._files = queue, files
        self._read: OrderedDict[str, tuple[object, float]] = OrderedDict()
        self._lock = threading.Lock()

    def is_intact(self, id: str, key: str, expected: FileDigest | None = None) -> bool:
        """Compare a job's file, or one that is `expected` to have this digest. Raises FileNotFoundError."""
        stamp = self._files.stamp(key)
        with self._lock:
            seen, at = self._read.get(key, (None, 0.0))
        if seen == stamp and time.monotonic() - at < _FRESH_SECONDS:
            return True
        expected = expected or self._queue.digest(id, key)
        if expected is None:
            return True
        size_bytes = self._files.size(key)
        if size_bytes != expected.size_bytes or FileDigest(size_bytes, self._sha256(key)) != expected:
            return False
        with self._lock:
            self._read[key] = (stamp, time.monotonic())
            while len(self._read) > _MOST:
                self._read.popitem(last=False)
        return True

    def _sha256(self, key: str) -> str:
        with self._files.open(key) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
