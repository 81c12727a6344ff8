"""Identify clients by API keys, read the file of keys again when it changes, and slow down who guesses."""

import hashlib
import hmac
import logging
import time
from base64 import b64decode
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path

from starlette.datastructures import Headers

from pusa.server.keys_file import read_keys

logger = logging.getLogger(__name__)


class ApiKeys:
    """Identify clients by their API keys. Without keys all clients are one owner, "".

    Args:
        keys: all valid ones, with those of the file.
        file: read again when it has changed; while it cannot be read, or holds no key, the earlier keys stay valid.
        look_seconds: least time between two looks at the file.
    """

    def __init__(self, keys: Iterable[str], file: Path | None = None, *, look_seconds: float = 1.0) -> None:
        self._file, self._look_seconds = file, look_seconds
        self._looked_at, self._stamp = time.monotonic(), _stamp(file)
        from_file = () if file is None else read_keys(file)
        self._fixed = _digests(key for key in keys if key not in from_file)  # a dump of memory shows no key
        self._digests = (*self._fixed, *_digests(from_file))

    def __bool__(self) -> bool:
        return bool(self._digests)

    def owner(self, presented: str | None) -> str | None:
        """Return the owner of a key: its sha256, "" if no keys are set, None for a wrong key.

        All keys are compared, in a time that does not depend on the key presented.
        """
        self._reload()
        if not self._digests:
            return ""
        digest = hashlib.sha256((presented or "").encode("utf-8", "surrogateescape")).digest()
        matches = [hmac.compare_digest(digest, valid) for valid in self._digests]
        return digest.hex() if any(matches) else None

    def owner_of(self, headers: Headers) -> str | None:
        """Return the owner of the key in ``Authorization``: Bearer, or as browsers send it, the password of Basic."""
        scheme, _, rest = headers.get("authorization", "").partition(" ")
        match scheme.lower():
            case "bearer":
                return self.owner(rest.strip())
            case "basic":
                return self.owner(_password(rest))
            case _:
                return self.owner(None)

    def knows(self, owner: str) -> bool:
        """Tell whether an owner that was let in still is: its key may have been removed."""
        self._reload()
        return bytes.fromhex(owner) in self._digests if self._digests else owner == ""

    def _reload(self) -> None:
        now = time.monotonic()
        if self._file is None or now - self._looked_at < self._look_seconds:
            return
        self._looked_at = now
        stamp = _stamp(self._file)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            keys = read_keys(self._file)
        except (OSError, ValueError) as error:
            logger.error("the API keys stay as they were: %s", error)
            return
        self._digests = (*self._fixed, *_digests(keys))
        logger.info("the file of API keys was read again: %d keys are valid", len(self._digests))


def _digests(keys: Iterable[str]) -> tuple[bytes, ...]:
    return tuple(dict.fromkeys(hashlib.sha256(key.encode()).digest() for key in keys))


def _stamp(file: Path | None) -> tuple[int, ...]:
    """Return a value that differs once a file has changed; () for one that is not there."""
    try:
        status = file.stat() if file is not None else None
    except OSError:
        status = None
    return () if status is None else (status.st_mtime_ns, status.st_size, status.st_ino)


def _password(encoded: str) -> str | None:
    try:
        return b64decode(encoded, validate=True).decode().partition(":")[2]
    except ValueError:
        return None


class WrongKeys:
    """Count wrong keys by address, and tell how long to wait before each is refused. A right key never waits.

    Args:
        free: wrong keys of an address that are refused at once; each further one waits twice as long.
        half_life_seconds: time in which the count of an address halves.
        first_seconds, longest_seconds: pauses.
        at_once: refusals of one address that may wait at the same time.
        most_addresses: those seen longest ago are forgotten.
        clock: seconds; a parameter for tests.
    """

    def __init__(
        self,
        *,
        free: int = 5,
        half_life_seconds: float = 60.0,
        first_seconds: float = 0.1,
        longest_seconds: float = 3.0,
        at_once: int = 4,
        most_addresses: int = 10_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._free, self._half_life_seconds = free, half_life_seconds
        self._first_seconds, self._longest_seconds = first_seconds, longest_seconds
        self._at_once, self._most_addresses, self._clock = at_once, most_addresses, clock
        self._seen: OrderedDict[str, tuple[float, float]] = OrderedDict()  # count and time of the last one
        self._waiting: dict[str, int] = {}
        self.total = 0
        """Wrong keys since the start."""

    def __len__(self) -> int:
        """Return how many addresses are remembered."""
        return len(self._seen)

    def count(self, address: str) -> float:
        """Count a wrong key; return the pause (seconds) before it is refused."""
        now = self._clock()
        before, at = self._seen.pop(address, (0.0, now))
        count = before * 0.5 ** ((now - at) / self._half_life_seconds) + 1
        self._seen[address] = count, now
        self.total += 1
        while len(self._seen) > self._most_addresses:
            self._seen.popitem(last=False)
        if count <= self._free:
            return 0.0
        if before <= self._free:
            logger.warning("%s has presented more than %d wrong API keys: it is slowed down", address, self._free)
        return min(self._longest_seconds, self._first_seconds * 2 ** min(count - self._free - 1, 30.0))

    def may_wait(self, address: str) -> bool:
        """Begin a pause; False if too many of this address are waiting."""
        waiting = self._waiting.get(address, 0)
        if waiting >= self._at_once:
            return False
        self._waiting[address] = waiting + 1
        return True

    def end_wait(self, address: str) -> None:
        """End a pause that `may_wait` has allowed."""
        self._waiting[address] -= 1
        if not self._waiting[address]:
            del self._waiting[address]
