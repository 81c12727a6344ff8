"""Tell the time to what removes old files: no faster than time has passed since the start."""

import logging
import threading
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)


def steady_seconds() -> float:
    """Return seconds since the machine's start, without jumps; on Linux they count while it sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class TrustedClock:
    """Return unix seconds by two witnesses: the wall clock and the time since the start.

    A wall clock that jumps ahead is not followed at once, since everything would be old then: only after it has kept
    its new time for `confirm_seconds`. One that is set back is followed at once.

    Args:
        wall: unix seconds.
        steady: seconds without jumps.
        tolerance_seconds: jumps up to this are no jumps.
        confirm_seconds: time after which a jump ahead counts as a correction.
    """

    def __init__(
        self,
        wall: Callable[[], float] = time.time,
        steady: Callable[[], float] = steady_seconds,
        *,
        tolerance_seconds: float = 60.0,
        confirm_seconds: float = 86_400.0,
    ) -> None:
        self._wall, self._steady = wall, steady
        self._tolerance_seconds, self._confirm_seconds = tolerance_seconds, confirm_seconds
        self._offset = wall() - steady()
        self._jump: tuple[float, float] | None = None  # the offset after it, and when it was first seen
        self._lock = threading.Lock()

    def __call__(self) -> float:
        with self._lock:
            steady = self._steady()
            offset = self._wall() - steady
            if offset <= self._offset + self._tolerance_seconds:
                self._offset, self._jump = min(self._offset, offset), None
            elif self._jump is None or abs(offset - self._jump[0]) > self._tolerance_seconds:
                self._jump = offset, steady
                logger.warning(
                    "the clock jumped %.0f s ahead: what has expired by it is kept for %.1f hours more, or until a "
                    "restart; correct the clock if it is wrong",
                    offset - self._offset,
                    self._confirm_seconds / 3600,
                )
            elif steady - self._jump[1] >= self._confirm_seconds:
                self._offset, self._jump = self._jump[0], None
            return self._offset + steady
