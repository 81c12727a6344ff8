"""Remove expired jobs, orphaned files and leftover scratch; check that the disk has room for a new job."""

import errno
import logging
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pusa.server.jobs.queue import MAX_FAILURES, Job, JobQueue, QueueUnavailable
from pusa.server.jobs.store import FileStore, StorageFullError

__all__ = [
    "Housekeeping",
    "HousekeepingCounts",
    "check_space",
    "expire",
    "remove_files",
    "sweep_orphans",
    "sweep_scratch",
]

# A bucket may hold other things as well: only keys of this form are ever removed.
_PREFIXES = ("inputs", "results", "checkpoints", "previews")
_JOB_KEY = re.compile(rf"({'|'.join(_PREFIXES)})/video_[0-9a-f]{{32}}[/.].*")
_OWNER_KEY = "queue-identity"
_SILENT_WORKER_SECONDS = 86_400.0

logger = logging.getLogger(__name__)


def check_space(files: FileStore, minimum_bytes: int, *folders: Path) -> None:
    """Raise StorageFullError unless `minimum_bytes` are free in the store and in each of `folders`."""
    free_bytes = [shutil.disk_usage(folder).free for folder in folders]
    if (in_store := files.free_bytes()) is not None:
        free_bytes.append(in_store)
    if free_bytes and min(free_bytes) < minimum_bytes:
        raise StorageFullError(
            errno.ENOSPC,
            f"{min(free_bytes) >> 20} MiB of disk are free and {minimum_bytes >> 20} MiB are to stay so: "
            "delete videos, or add space",
        )


def expire(queue: JobQueue, files: FileStore, *, now: float, keep_seconds: float | None) -> int:
    """Remove expired jobs with their files; return how many.

    Completed jobs have an `expires_at`; failed and cancelled ones expire after `keep_seconds` (None: never).
    """
    count = 0
    unfinished_before = None if keep_seconds is None else now - keep_seconds
    while jobs := queue.expired(now, unfinished_before=unfinished_before):
        for job in jobs:
            try:
                queue.delete(job.id)
            except KeyError:
                continue  # another server has deleted it
        remove_files(queue, files, jobs)
        count += len(jobs)
    return count


def remove_files(queue: JobQueue, files: FileStore, jobs: Iterable[Job]) -> None:
    """Remove the files of deleted jobs, except those that other jobs use as inputs."""
    used = queue.keys_in_use()
    for job in jobs:
        for prefix in _PREFIXES[:-1]:
            for key, _ in list(files.keys(f"{prefix}/{job.id}")):
                if key not in used:
                    files.delete(key)
        files.delete(f"previews/{job.id}.webp")


def sweep_orphans(queue: JobQueue, files: FileStore, *, now: float, older_than_seconds: float) -> int:
    """Remove files that no job names; return how many.

    A file is written before the row that names it is committed, so only files older than `older_than_seconds` count as
    orphans. A server that was started with the URL of another database would take every file for an orphan: the store
    holds the identity of its database, and nothing is removed if it differs.
    """
    if not _belongs_to(files, queue):
        return 0
    before = now - older_than_seconds
    old = [
        key
        for prefix in _PREFIXES
        for key, written_at in files.keys(prefix)
        if written_at < before and _JOB_KEY.fullmatch(key)
    ]
    used = queue.keys_in_use() if old else set()  # read after the list, which has no file written from here on
    orphans = [key for key in old if key not in used]
    for key in orphans:
        files.delete(key)
    return len(orphans) + files.remove_unfinished(before)


def _belongs_to(files: FileStore, queue: JobQueue) -> bool:
    """Compare the identity in the store with the queue's; a store without one now belongs to the queue."""
    try:
        owner = files.get_bytes(_OWNER_KEY).decode(errors="replace")
    except FileNotFoundError:
        files.put_bytes(_OWNER_KEY, queue.identity.encode())
        return True
    if owner != queue.identity:
        logger.warning(
            "the files belong to another job database: orphans are left alone; if they are meant for this one from now "
            "on, remove %s from their folder",
            _OWNER_KEY,
        )
    return owner == queue.identity


def sweep_scratch(folder: Path, *, now: float, older_than_seconds: float) -> int:
    """Remove files that killed processes have left in a machine's scratch folder; return how many.

    Its direct subfolders stay; empty folders below them are removed.
    """
    before, count = now - older_than_seconds, 0
    for path in sorted(folder.rglob("*"), reverse=True):  # the content of a folder before the folder
        with suppress(OSError):  # a file in use may vanish meanwhile; a folder may not be empty
            if path.lstat().st_mtime >= before:
                continue
            if path.is_dir() and not path.is_symlink():
                if path.parent != folder:
                    path.rmdir()
            else:
                path.unlink()
                count += 1
    return count


@dataclass(frozen=True)
class HousekeepingCounts:
    """Count what one round has removed, and the jobs it has returned to the queue."""

    expired: int
    orphans: int
    scratch: int
    recovered: int


class Housekeeping:
    """Run a round at once and then every `every_seconds` in a thread; several servers may each run one."""

    def __init__(
        self,
        queue: JobQueue,
        files: FileStore,
        *,
        every_seconds: float = 600.0,
        keep_seconds: float | None = 604_800.0,
        orphan_seconds: float = 3600.0,
        scratch: Path | None = None,
        scratch_seconds: float = 90_000.0,
        max_failures: int = MAX_FAILURES,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """
        Args:
            keep_seconds: time to keep jobs that failed or were cancelled; None: for ever.
            orphan_seconds: minimum age of a file that is removed because no job names it.
            scratch: this machine's folder for unfinished work.
            scratch_seconds: minimum age of scratch files that are removed; longer than any job may run.
            max_failures: the workers' limit, see `JobQueue.recover_overdue`.
        """
        self._queue, self._files, self._clock = queue, files, clock
        self._every_seconds, self._keep_seconds, self._orphan_seconds = every_seconds, keep_seconds, orphan_seconds
        self._scratch, self._scratch_seconds, self._max_failures = scratch, scratch_seconds, max_failures
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="housekeeping", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop the thread, after the current round if there is one."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(timeout=30)

    def round(self) -> HousekeepingCounts:
        """Do every task once."""
        now = self._clock()
        for worker in self._queue.workers():
            if worker.seen_at < now - _SILENT_WORKER_SECONDS:
                self._queue.forget_worker(worker.name)
        return HousekeepingCounts(
            recovered=self._queue.recover_overdue(max_failures=self._max_failures),
            expired=expire(self._queue, self._files, now=now, keep_seconds=self._keep_seconds),
            orphans=sweep_orphans(self._queue, self._files, now=now, older_than_seconds=self._orphan_seconds),
            scratch=sweep_scratch(self._scratch, now=now, older_than_seconds=self._scratch_seconds)
            if self._scratch
            else 0,
        )

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                counts = self.round()
            except (QueueUnavailable, OSError) as error:
                logger.warning("housekeeping could not be done: %s", error)
            except Exception:  # stores raise errors of any type; the next round may succeed
                logger.exception("housekeeping failed")
            else:
                if counts != HousekeepingCounts(0, 0, 0, 0):
                    logger.info(
                        "housekeeping: %d jobs expired, %d orphaned files and %d scratch files removed, "
                        "%d jobs taken back from workers that are gone",
                        counts.expired,
                        counts.orphans,
                        counts.scratch,
                        counts.recovered,
                    )
            self._ended.wait(self._every_seconds)
