"""Identify clients by API keys, read the file of keys again when it changes, and slow down who guesses."""

import hashlib
import hmac
import logging
import time
from base64 import b64decode
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path

import anyio
from starlette.datastructures import Headers

from pusa.server.errors import ServiceError
from pusa.server.keys_file import read_keys

logger = logging.getLogger(__name__)

_SIGNING = b"pusa session\0"


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
        self._fixed = _known(key for key in keys if key not in from_file)
        self._known = self._fixed | _known(from_file)

    def __bool__(self) -> bool:
        return bool(self._known)

    def owner(self, presented: str | None) -> str | None:
        """Return the owner of a key: its sha256, "" if no keys are set, None for a wrong key.

        All keys are compared, in a time that does not depend on the key presented.
        """
        self._reload()
        if not self._known:
            return ""
        digest = hashlib.sha256((presented or "").encode("utf-8", "surrogateescape")).digest()
        matches = [hmac.compare_digest(digest, valid) for valid in self._known]
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
        return bytes.fromhex(owner) in self._known if self._known else owner == ""

    def sign(self, owner: str, text: str) -> str:
        """Sign a text so that `signer` knows this owner again, on any server that has the same key."""
        return _signature(self._known[bytes.fromhex(owner)], text)

    def signer(self, text: str, signature: str) -> str | None:
        """Return the owner who has signed a text; None if none has whose key is valid."""
        self._reload()
        found = [
            digest for digest, secret in self._known.items() if hmac.compare_digest(_signature(secret, text), signature)
        ]
        return found[0].hex() if found else None

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
        self._known = self._fixed | _known(keys)
        logger.info("the file of API keys was read again: %d keys are valid", len(self._known))


def _known(keys: Iterable[str]) -> dict[bytes, bytes]:
    """Return digests of keys and the secrets that sign for them: a dump of memory shows no key.

    The digests are in the database, as owners; nobody can compute a secret from them.
    """
    return {hashlib.sha256(key.encode()).digest(): hashlib.sha256(_SIGNING + key.encode()).digest() for key in keys}


def _signature(secret: bytes, text: str) -> str:
    return hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()


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

    async def pause(self, address: str) -> None:
        """Count a wrong key and wait before it is refused, the longer the more its address has presented.

        Raises ServiceError (429) if too many of the address are waiting.
        """
        seconds = self.count(address)
        if not seconds:
            return
        if not self.may_wait(address):
            message = "your address has presented many wrong API keys: wait before the next one"
            raise ServiceError(429, "too_many_wrong_keys", message, headers={"retry-after": str(round(seconds) or 1)})
        try:
            await anyio.sleep(seconds)
        finally:
            self.end_wait(address)


def wrong_key() -> ServiceError:
    """Return the error for a key that is missing or wrong."""
    return ServiceError(
        401,
        "invalid_api_key",
        "the API key is missing or wrong: send Authorization: Bearer KEY with a key of this server",
    )
