"""Limits on open connections, and on the time for the head of a request and for taking its answer.

uvicorn has no time limit for the head of a request and none for an answer that nobody takes, and accepts connections
until the process has no file descriptors left. Here those that wait longest make room for new ones, so that idle
connections keep nobody out; bodies have their limits in `pusa.server.http.middleware`.
"""

import asyncio
import ipaddress
import json
import logging
import resource
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, cast

from pusa.server.errors import envelope
from pusa.server.settings import ServerSettings

if TYPE_CHECKING:
    from uvicorn.protocols.http.h11_impl import H11Protocol as _Protocol
else:
    _Protocol = object

logger = logging.getLogger(__name__)

BACKLOG = 128
"""Connections that the system holds until they are accepted; asyncio accepts as many before any is seen here."""

REFUSED = "pusa.refused"
"""In the scope of a request: to be called when it is refused and no more than the rest of its body is waited for."""

_OWN_FILES = 256  # of the database, of results that are sent, of child processes
_MOST_FILES = 65_536  # more are not needed, and programs that close all they might have take long over a million
_LEAST_CONNECTIONS = 16
_LINGER_SECONDS = 5.0  # for a client to take the last words of a connection that is being closed


def raise_file_limit() -> int:
    """Let this process open as many files as it may; how many that are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return _MOST_FILES if soft == resource.RLIM_INFINITY else soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def most_connections(asked: int, open_files: int) -> int:
    """Connections that fit beside the files that the server needs itself."""
    room = max(_LEAST_CONNECTIONS, open_files - BACKLOG - _OWN_FILES)
    if room < asked:
        logger.warning(
            "at most %d connections, not %d: this process may open %d files; raise LimitNOFILE, or ulimit -n",
            room,
            asked,
            open_files,
        )
    return min(asked, room)


class Connections:
    """All open connections, and which of them wait: for a request to begin, or for the rest of its head.

    Args:
        most: of all.
        most_per_address: of one client; an IPv6 client is its network of 64 bits.
        uncounted: addresses and networks that stand for many clients, such as reverse proxies; "*" is every one. Those
            of this machine are never counted.
        head_seconds: for the head of a request to come, from its first byte or from the connection's beginning.
        silent_seconds: for a client to take more of an answer.
    """

    def __init__(
        self,
        *,
        most: int,
        most_per_address: int,
        uncounted: Collection[str] = (),
        head_seconds: float,
        silent_seconds: float,
    ) -> None:
        self.most, self.most_per_address = most, most_per_address
        self.head_seconds, self.silent_seconds = head_seconds, silent_seconds
        self._all_uncounted = "*" in uncounted
        self._uncounted = [network for text in uncounted if (network := _network(text)) is not None]
        self._open: dict[Any, str] = {}
        self._waiting: dict[Any, None] = {}  # in the order in which they began to wait
        self._by_address: dict[str, dict[Any, None]] = {}

    def __len__(self) -> int:
        return len(self._open)

    def add(self, connection: Any, host: str) -> bool:
        """Take in a new connection; another that has waited longest is closed where there are too many.

        Returns False for one that there is no room for: all others are being answered.
        """
        address = self._counted(host)
        ours = self._by_address.get(address, {}) if address else {}
        has_room = len(ours) < self.most_per_address or self._make_room(ours)
        has_room = has_room and (len(self._open) < self.most or self._make_room(self._waiting))
        if not has_room:
            logger.warning("a connection was refused: %d are open, and all are being answered", len(self._open))
            return False
        self._open[connection] = address
        if address:
            self._by_address.setdefault(address, {})[connection] = None
        self.waits(connection)
        return True

    def waits(self, connection: Any) -> None:
        """Note that a connection waits from now on, if it does not already."""
        if connection in self._open:
            self._waiting.setdefault(connection)

    def works(self, connection: Any) -> None:
        """Note that a request is being answered."""
        self._waiting.pop(connection, None)

    def remove(self, connection: Any) -> None:
        address = self._open.pop(connection, None)
        self._waiting.pop(connection, None)
        if address:
            ours = self._by_address[address]
            del ours[connection]
            if not ours:
                del self._by_address[address]

    def _make_room(self, among: Collection[Any]) -> bool:
        oldest = next((one for one in among if one in self._waiting), None)
        if oldest is None:
            return False
        self.remove(oldest)
        oldest.give_up()
        logger.warning("too many connections: those that wait longest are closed")
        return True

    def _counted(self, host: str) -> str:
        """Name the address that a client is counted under; empty for one that is not counted."""
        try:
            address = ipaddress.ip_address(host.partition("%")[0])
        except ValueError:  # a socket file
            return ""
        address = getattr(address, "ipv4_mapped", None) or address
        is_many = any(address in network for network in self._uncounted if network.version == address.version)
        if self._all_uncounted or is_many or address.is_loopback:
            return ""
        return str(address) if address.version == 4 else str(ipaddress.ip_network((address, 64), strict=False))


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:  # a name, or "*"
        return None


class _Limited(_Protocol):
    """Add the limits to uvicorn's protocol, whichever parser that has."""

    limits: Connections
    _head_timer: asyncio.TimerHandle | None = None
    _answer_timer: asyncio.TimerHandle | None = None
    _has_begun = _is_refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self.limits.add(self, self.client[0] if self.client else ""):
            self._head_timer = self.loop.call_later(self.limits.head_seconds, self._head_is_late)
        else:
            self._say(503, "too_many_connections", "too many connections are open: try again in a moment")

    def connection_lost(self, exc: Exception | None) -> None:
        self.limits.remove(self)
        self._stop_head_timer()
        self._stop_answer_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._has_begun = True
        super().data_received(data)
        self._note()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._has_begun = self._is_refused = False
        self._note(is_new=True)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._answer_timer = self._answer_timer or self.loop.call_later(self.limits.silent_seconds, self._stuck)

    def resume_writing(self) -> None:
        self._stop_answer_timer()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self.loop.call_later(_LINGER_SECONDS, self.transport.abort)

    def give_up(self) -> None:
        """Close a connection that waits, for another to have its place."""
        self.transport.abort()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_answer_timer(self) -> None:
        if self._answer_timer is not None:
            self._answer_timer.cancel()
            self._answer_timer = None

    def _note(self, is_new: bool = False) -> None:
        """Note whether a request is being answered, or what there is waits for the rest of a head."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_head_timer()
            cast(dict[str, Any], self.cycle.scope)[REFUSED] = self._refused
            if not self._is_refused:
                self.limits.works(self)
            return
        self.limits.waits(self)
        if self._head_timer is None and not is_new:  # between two requests uvicorn's own keep-alive timer runs
            self._head_timer = self.loop.call_later(self.limits.head_seconds, self._head_is_late)

    def _refused(self) -> None:
        """Let others have the place of a request that is refused: it is read on only to be answered."""
        self._is_refused = True
        self.limits.waits(self)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.transport.is_closing():
            return
        if self._has_begun:
            told = f"the head of the request did not come within {self.limits.head_seconds:g} s: send it again"
            self._say(408, "request_timeout", told)
        else:
            self.transport.abort()

    def _stuck(self) -> None:
        self._answer_timer = None
        logger.info("a client has taken nothing of its answer for %g s: let go", self.limits.silent_seconds)
        self.transport.abort()

    def _say(self, status: int, code: str, message: str) -> None:
        """The last words of a connection on which no request is being answered."""
        body = json.dumps(envelope(message, status=status, code=code)).encode()
        reason = {408: "Request Timeout", 503: "Service Unavailable"}[status]
        head = (
            f"HTTP/1.1 {status} {reason}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            "retry-after: 1\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
        self.loop.call_later(_LINGER_SECONDS, self.transport.abort)


def limited_protocol(limits: Connections) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol with these limits, for its option ``http``."""
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    return type("LimitedProtocol", (_Limited, AutoHTTPProtocol), {"limits": limits})


def uvicorn_options(settings: ServerSettings, open_files: int) -> dict[str, Any]:
    """Translate a server's settings to options of `uvicorn.Config`.

    Args:
        open_files: how many this process may open, see `raise_file_limit`.
    """
    limits = Connections(
        most=most_connections(settings.max_connections, open_files),
        most_per_address=settings.max_connections_per_address,
        uncounted=settings.trusted_proxies,
        head_seconds=settings.head_seconds,
        silent_seconds=settings.silent_seconds,
    )
    return {
        "log_config": None,
        "access_log": settings.log_level == "debug",
        "root_path": settings.root_path,
        "proxy_headers": bool(settings.trusted_proxies),
        "forwarded_allow_ips": list(settings.trusted_proxies) or None,
        "server_header": False,
        "timeout_graceful_shutdown": round(settings.shutdown_seconds),
        "timeout_keep_alive": 75,
        "backlog": BACKLOG,
        "http": limited_protocol(limits),
        "ws": "none",
    }
