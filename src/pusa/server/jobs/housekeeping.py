"""Remove expired jobs, orphaned files and leftover scratch; check that the disk has room for a new job."""

import logging
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pusa.server.clock import TrustedClock, steady_seconds
from pusa.server.jobs.client_files import ClientFileTable, expire_files
from pusa.server.jobs.queue import MAX_FAILURES, Job, JobQueue, QueueUnavailable
from pusa.server.jobs.store import FileStore, StorageUnavailableError, full_disk

__all__ = [
    "Housekeeping",
    "HousekeepingCounts",
    "check_space",
    "expire",
    "list_keys",
    "remove_files",
    "sweep_orphans",
    "sweep_scratch",
]

# A bucket may hold other things as well: only keys of this form are ever removed.
_PREFIXES = ("inputs", "results", "checkpoints", "previews")
_CLIENT_FILES = "files"
_OWN_KEY = re.compile(rf"(({'|'.join(_PREFIXES)})/video|{_CLIENT_FILES}/file)_[0-9a-f]{{32}}[/.].*")
_OWNER_KEY = "queue-identity"
_SILENT_WORKER_SECONDS = 86_400.0
_CURSOR_SECONDS = 86_400.0  # for which a page may begin after a deleted job
_BATCH = 500  # rows or files that are held in memory

logger = logging.getLogger(__name__)


def check_space(files: FileStore, minimum_bytes: int, *folders: Path) -> None:
    """Raise StorageFullError unless `minimum_bytes` are free in the store and in each of `folders`.

    Raises StorageUnavailableError if the store's folder is gone.
    """
    try:
        free_bytes = [shutil.disk_usage(folder).free for folder in folders]
        if (in_store := files.free_bytes()) is not None:
            free_bytes.append(in_store)
    except FileNotFoundError:
        raise StorageUnavailableError from None
    if free_bytes and min(free_bytes) < minimum_bytes:
        raise full_disk(min(free_bytes), minimum_bytes)


def expire(
    queue: JobQueue, files: FileStore, *, now: float, keep_seconds: float | None, limit: int | None = None
) -> int:
    """Remove expired jobs with their files, and those whose removal cannot be undone any more; return how many.

    Completed jobs have an `expires_at`; failed and cancelled ones expire after `keep_seconds` (None: never).

    Args:
        limit: of the jobs that are removed now; None removes all.
    """
    count = 0
    unfinished_before = None if keep_seconds is None else now - keep_seconds
    while limit is None or count < limit:
        batch = _BATCH if limit is None else min(_BATCH, limit - count)
        jobs = queue.expired(now, unfinished_before=unfinished_before, limit=batch)
        if not jobs:
            break
        for job in jobs:
            with suppress(KeyError):  # another server has deleted it, or somebody has it made once more or restored
                queue.delete(job.id, unchanged=job)
                remove_files(queue, files, [job])
        count += len(jobs)
    return count


def remove_files(queue: JobQueue, files: FileStore, jobs: Iterable[Job]) -> None:
    """Remove the files of deleted jobs, except those that other jobs use as inputs."""
    for job in jobs:
        keys = [key for prefix in _PREFIXES for key, _ in files.keys(f"{prefix}/{job.id}")]
        used = queue.keys_in_use(keys)
        for key in (*keys, f"previews/{job.id}.webp"):
            if key not in used:
                files.delete(key)


def sweep_orphans(
    queue: JobQueue,
    files: FileStore,
    *,
    now: float,
    older_than_seconds: float,
    listing: Iterator[tuple[str, float]] | None = None,
    limit: int | None = None,
) -> int:
    """Remove files that no job and no client's file names; return how many.

    A file is written before the row that names it is committed, so only files older than `older_than_seconds` count as
    orphans. A server that was started with the URL of another database would take every file for an orphan: the store
    holds the identity of its database, and nothing is removed if it differs.

    Args:
        listing: continues an earlier sweep; None lists the store from its beginning.
        limit: of the files that are looked at now; None looks at all.
    """
    if not _belongs_to(files, queue):
        return 0
    before = now - older_than_seconds
    listing = list_keys(files) if listing is None else listing
    if limit is not None:
        listing = islice(listing, limit)
    count = 0
    while batch := list(islice(listing, _BATCH)):
        old = [key for key, written_at in batch if written_at < before and _OWN_KEY.fullmatch(key)]
        used = queue.keys_in_use(old) if old else set()  # read after the list, which has no file written from here on
        for key in old:
            if key not in used:
                files.delete(key)
                count += 1
    return count if limit is not None else count + files.remove_unfinished(before)


def list_keys(files: FileStore) -> Iterator[tuple[str, float]]:
    """List the keys of jobs and clients' files, with the times at which they were written (unix seconds)."""
    for prefix in (*_PREFIXES, _CLIENT_FILES):
        yield from files.keys(prefix)


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


class _Counted(Iterator[tuple[str, float]]):
    """Count what is taken from an iterator."""

    def __init__(self, items: Iterator[tuple[str, float]]) -> None:
        self._items, self.count = items, 0

    def __next__(self) -> tuple[str, float]:
        item = next(self._items)
        self.count += 1
        return item


@dataclass(frozen=True)
class HousekeepingCounts:
    """Count what one round has removed, and the jobs it has returned to the queue."""

    expired: int
    orphans: int
    scratch: int
    recovered: int
    files: int = 0
    """Clients' files that were not used for long."""


class Housekeeping:
    """Run a round at once and then every `every_seconds` in a thread; several servers may each run one.

    A round removes little, and none removes anything in the first minutes, so that an operator can stop what a wrong
    clock or setting has begun.
    """

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
        first_seconds: float = 300.0,
        most_expired: int = 200,
        most_listed: int = 10_000,
        clock: Callable[[], float] | None = None,
        steady: Callable[[], float] = steady_seconds,
    ) -> None:
        """
        Args:
            keep_seconds: time to keep jobs that failed or were cancelled, and clients' files after their last use;
                None: for ever.
            orphan_seconds: minimum age of a file that is removed because no job names it.
            scratch: this machine's folder for unfinished work.
            scratch_seconds: minimum age of scratch files that are removed; longer than any job may run.
            max_failures: the workers' limit, see `JobQueue.recover_overdue`.
            first_seconds: time since the start in which nothing is removed.
            most_expired: jobs, and clients' files, that a round removes at most.
            most_listed: files of the store that a round looks at; the next round goes on after them.
            clock: unix seconds; a `TrustedClock` by default.
            steady: seconds without jumps, for `first_seconds`.
        """
        self._queue, self._files, self._clock = queue, files, clock or TrustedClock()
        self._client_files = ClientFileTable(queue)
        self._every_seconds, self._keep_seconds, self._orphan_seconds = every_seconds, keep_seconds, orphan_seconds
        self._scratch, self._scratch_seconds, self._max_failures = scratch, scratch_seconds, max_failures
        self._most_expired, self._most_listed = most_expired, most_listed
        self._steady, self._remove_from = steady, steady() + first_seconds
        self._listing: Iterator[tuple[str, float]] | None = None
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
        recovered = self._queue.recover_overdue(max_failures=self._max_failures)
        if self._steady() < self._remove_from:
            return HousekeepingCounts(expired=0, orphans=0, scratch=0, recovered=recovered)
        self._queue.forget_deleted(now - _CURSOR_SECONDS)
        return HousekeepingCounts(
            recovered=recovered,
            expired=expire(
                self._queue, self._files, now=now, keep_seconds=self._keep_seconds, limit=self._most_expired
            ),
            files=self._expire_files(now),
            orphans=self._sweep_orphans(now),
            scratch=sweep_scratch(self._scratch, now=now, older_than_seconds=self._scratch_seconds)
            if self._scratch
            else 0,
        )

    def _expire_files(self, now: float) -> int:
        if self._keep_seconds is None:
            return 0
        before = now - self._keep_seconds
        return expire_files(self._client_files, self._files, used_before=before, limit=self._most_expired)

    def _sweep_orphans(self, now: float) -> int:
        """Look at the next files of the store; after the last ones begin anew."""
        if self._listing is None:
            self._listing = list_keys(self._files)
            removed = self._files.remove_unfinished(now - self._orphan_seconds)
        else:
            removed = 0
        listing = _Counted(self._listing)
        removed += sweep_orphans(
            self._queue,
            self._files,
            now=now,
            older_than_seconds=self._orphan_seconds,
            listing=listing,
            limit=self._most_listed,
        )
        if listing.count < self._most_listed:
            self._listing = None
        return removed

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
                        "housekeeping: %d jobs and %d clients' files expired, %d orphaned files and %d scratch files "
                        "removed, %d jobs taken back from workers that are gone",
                        counts.expired,
                        counts.files,
                        counts.orphans,
                        counts.scratch,
                        counts.recovered,
                    )
            self._ended.wait(self._every_seconds)
