"""Claim items, so that no two workers make the same one, on one machine or on several that share the folder.

A claim is a file ``claims/ID.lock`` that only one process can create. Its worker touches it while it works. A claim
that has not been touched for the lease's time is dead, and so is one whose process has ended on this machine; another
worker takes it. Ages are differences of times that the file system of the folder wrote, so that clocks of machines
need not agree.
"""

import logging
import os
import secrets
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from pusa.evaluation.runs.files import write_new
from pusa.worker_names import is_dead, worker_name

logger = logging.getLogger(__name__)

LEASE_SECONDS = 60.0
_BEATS_PER_LEASE = 6


class Claim:
    """Hold a claim on one item, until `release`.

    Attributes:
        is_lost: another worker has taken the item, as this one was silent for too long.
        took_over: the worker that had it before has died.
    """

    def __init__(self, path: Path, text: str, took_over: bool) -> None:
        self.path, self.took_over, self.is_lost = path, took_over, False
        self._text = text

    def renew(self) -> None:
        """Touch the file, or find that it is another worker's."""
        try:
            self.is_lost = self.is_lost or not self._is_own()
            if not self.is_lost:
                os.utime(self.path)
        except FileNotFoundError:
            self.is_lost = True
        except OSError as error:  # of a network for a moment; the lease is longer
            logger.warning("%s cannot be renewed: %s", self.path, error)

    def release(self) -> None:
        """Remove the file, if it is still this worker's."""
        with suppress(OSError):
            if self._is_own():
                self.path.unlink()

    def _is_own(self) -> bool:
        return self.path.read_bytes() == self._text.encode()


class Claims:
    """Claim items for this process, and keep the claims alive in a thread while the context lasts.

    Args:
        folder: of the claims.
        lease_seconds: silence after which a claim is dead. It must be well above the pauses of a machine or of a
            network disk.
    """

    def __init__(self, folder: Path, lease_seconds: float = LEASE_SECONDS) -> None:
        if lease_seconds <= 0:
            raise ValueError(f"lease_seconds={lease_seconds:g} must be above 0")
        self._folder, self._lease_seconds = folder, lease_seconds
        self._name = worker_name()
        self._lock = threading.Lock()
        self._held: dict[Path, Claim] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pusa-claims", daemon=True)

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        for claim in list(self._held.values()):
            self.release(claim)

    def take(self, item_id: str) -> Claim | None:
        """Claim an item; None if a living worker has it."""
        path = self._folder / f"{item_id}.lock"
        took_over = False
        if path.exists():
            if not self._take_away(path):
                return None
            took_over = True
        text = f"{self._name} {secrets.token_hex(8)}\n"
        if not write_new(path, text):
            return None
        claim = Claim(path, text, took_over)
        with self._lock:
            self._held[path] = claim
        return claim

    def release(self, claim: Claim) -> None:
        """Give an item free."""
        with self._lock:
            self._held.pop(claim.path, None)
        claim.release()

    def _take_away(self, path: Path) -> bool:
        """Remove the claim of a dead worker; False if it lives, or another one has just removed it."""
        try:
            with path.open("rb") as file:  # opened first: a network disk keeps the times of files for a while
                text, touched = file.read(), os.fstat(file.fileno()).st_mtime
            worker = text.decode(errors="replace").partition(" ")[0]
            if not is_dead(worker) and self._now() - touched < self._lease_seconds:
                return False
            taken = path.with_name(f".{path.name}.{secrets.token_hex(6)}.dead")
            path.rename(taken)
            is_dead_one = taken.read_bytes() == text
        except OSError:
            return False
        with suppress(OSError):
            if not is_dead_one:  # meanwhile another worker had taken it: give it back
                os.link(taken, path)
        taken.unlink(missing_ok=True)
        return is_dead_one

    def _now(self) -> float:
        """Return the time of the folder's file system (unix seconds)."""
        probe = self._folder / f".{secrets.token_hex(8)}.now"
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink()

    def _beat(self) -> None:
        while not self._ended.wait(self._lease_seconds / _BEATS_PER_LEASE):
            with self._lock:
                held = list(self._held.values())
            for claim in held:
                claim.renew()
