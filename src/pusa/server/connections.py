"""Limit the number of open connections, and the time for sending a request's head and for reading a response.

uvicorn limits neither time, and accepts connections until the process has no file descriptors left. Here the
connection that has been idle longest is closed for a new one. `pusa.server.http.middleware` limits bodies.
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
"""Connections that wait in the kernel to be accepted; asyncio accepts as many at once before any is counted."""

ON_REFUSED = "pusa.refused"
"""Scope key of a callback, to be called when a request is refused and only the rest of its body is still awaited."""

_RESERVED_FILES = 256  # for the database, results that are sent, child processes
_MAX_FILES = 65_536  # enough; programs that close every possible descriptor are slow with a million
_MIN_CONNECTIONS = 16
_LINGER_SECONDS = 5.0  # for a client to read the last response of a connection that is being closed


def raise_file_limit() -> int:
    """Raise the limit of open files of this process as far as allowed; return the new limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_FILES)
    if soft == resource.RLIM_INFINITY or soft >= limit:
        return _MAX_FILES if soft == resource.RLIM_INFINITY else soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return limit


def connection_limit(requested: int, open_files: int) -> int:
    """Reduce the requested number of connections to what fits into the limit of open files."""
    room = max(_MIN_CONNECTIONS, open_files - BACKLOG - _RESERVED_FILES)
    if room < requested:
        logger.warning(
            "at most %d connections, not %d: this process may open %d files; raise LimitNOFILE, or ulimit -n",
            room,
            requested,
            open_files,
        )
    return min(requested, room)


class Connections:
    """Track the open connections, and which of them are `idle`: without a request, or with half a request's head.

    Args:
        max_connections: limit in total.
        max_per_address: limit for one client; an IPv6 client is its /64 network.
        uncounted: addresses and networks of many clients, such as reverse proxies, which only count in total; "*" for
            all. Loopback addresses always belong to these.
        head_seconds: time limit for the head of a request, from its first byte or the connection's start.
        silent_seconds: time limit for a client to read more of a response.
    """

    def __init__(
        self,
        *,
        max_connections: int,
        max_per_address: int,
        uncounted: Collection[str] = (),
        head_seconds: float,
        silent_seconds: float,
    ) -> None:
        self.max_connections, self.max_per_address = max_connections, max_per_address
        self.head_seconds, self.silent_seconds = head_seconds, silent_seconds
        self._all_uncounted = "*" in uncounted
        self._uncounted = [network for text in uncounted if (network := _network(text)) is not None]
        self._open: dict[Any, str] = {}
        self.idle: dict[Any, None] = {}  # in the order in which they became idle
        self.by_address: dict[str, dict[Any, None]] = {}

    def __len__(self) -> int:
        return len(self._open)

    def add(self, connection: Any, host: str) -> bool:
        """Add a new connection; beyond a limit, close the one that has been idle longest.

        Returns False if there is no room, since no other connection is idle.
        """
        address = self._counted_address(host)
        same_address = self.by_address.get(address, {}) if address else {}
        has_room = len(same_address) < self.max_per_address or self._make_room(same_address)
        has_room = has_room and (len(self._open) < self.max_connections or self._make_room(self.idle))
        if not has_room:
            logger.warning("a connection was refused: %d are open, and all are being answered", len(self._open))
            return False
        self._open[connection] = address
        if address:
            self.by_address.setdefault(address, {})[connection] = None
        self.mark_idle(connection)
        return True

    def mark_idle(self, connection: Any) -> None:
        """Mark a connection as idle from now on, unless it already is."""
        if connection in self._open:
            self.idle.setdefault(connection)

    def mark_busy(self, connection: Any) -> None:
        """Mark a connection as busy: a request is being answered."""
        self.idle.pop(connection, None)

    def remove(self, connection: Any) -> None:
        """Forget a closed connection."""
        address = self._open.pop(connection, None)
        self.idle.pop(connection, None)
        if address:
            same_address = self.by_address[address]
            del same_address[connection]
            if not same_address:
                del self.by_address[address]

    def _make_room(self, among: Collection[Any]) -> bool:
        oldest = next((connection for connection in among if connection in self.idle), None)
        if oldest is None:
            return False
        self.remove(oldest)
        oldest.close_idle()
        logger.warning("too many connections: those that wait longest are closed")
        return True

    def _counted_address(self, host: str) -> str:
        """Return the address or network that a client counts for; "" if it is exempt."""
        try:
            address = _ip_address(host)
        except ValueError:  # a socket file
            return ""
        is_many = any(address in network for network in self._uncounted if network.version == address.version)
        if self._all_uncounted or is_many or address.is_loopback:
            return ""
        return client_network(host)


def client_network(host: str) -> str:
    """Return what counts as one client: an IPv4 address, an IPv6 client's /64 network, or a host that is neither."""
    try:
        address = _ip_address(host)
    except ValueError:
        return host
    return str(address) if address.version == 4 else str(ipaddress.ip_network((address, 64), strict=False))


def _ip_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    address = ipaddress.ip_address(host.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:  # a name, or "*"
        return None


class _LimitedProtocol(_Protocol):
    """Add the limits to either of uvicorn's HTTP protocols."""

    limits: Connections
    _head_timer: asyncio.TimerHandle | None = None
    _response_timer: asyncio.TimerHandle | None = None
    _has_begun = _is_refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self.limits.add(self, self.client[0] if self.client else ""):
            self._head_timer = self.loop.call_later(self.limits.head_seconds, self._head_is_late)
        else:
            self._send_error(503, "too_many_connections", "too many connections are open: try again in a moment")

    def connection_lost(self, exc: Exception | None) -> None:
        self.limits.remove(self)
        self._stop_head_timer()
        self._stop_response_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._has_begun = True
        super().data_received(data)
        self._update()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._has_begun = self._is_refused = False
        self._update(is_new=True)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._response_timer = self._response_timer or self.loop.call_later(
            self.limits.silent_seconds, self._response_is_stuck
        )

    def resume_writing(self) -> None:
        self._stop_response_timer()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self.loop.call_later(_LINGER_SECONDS, self.transport.abort)

    def close_idle(self) -> None:
        """Close an idle connection to make room for another."""
        self.transport.abort()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_response_timer(self) -> None:
        if self._response_timer is not None:
            self._response_timer.cancel()
            self._response_timer = None

    def _update(self, is_new: bool = False) -> None:
        """Update whether the connection is busy with a request or idle."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_head_timer()
            cast(dict[str, Any], self.cycle.scope)[ON_REFUSED] = self._on_refused
            if not self._is_refused:
                self.limits.mark_busy(self)
            return
        self.limits.mark_idle(self)
        if self._head_timer is None and not is_new:  # between requests uvicorn's keep-alive timer runs
            self._head_timer = self.loop.call_later(self.limits.head_seconds, self._head_is_late)

    def _on_refused(self) -> None:
        """Count the connection of a refused request as idle: its body is read only to deliver the response."""
        self._is_refused = True
        self.limits.mark_idle(self)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.transport.is_closing():
            return
        if self._has_begun:
            message = f"the head of the request did not come within {self.limits.head_seconds:g} s: send it again"
            self._send_error(408, "request_timeout", message)
        else:
            self.transport.abort()

    def _response_is_stuck(self) -> None:
        self._response_timer = None
        logger.info("a client has taken nothing of its answer for %g s: let go", self.limits.silent_seconds)
        self.transport.abort()

    def _send_error(self, status: int, code: str, message: str) -> None:
        """Send an error outside of any request and close the connection."""
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
    """Build uvicorn's HTTP protocol with these limits, for its option ``http``."""
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    return type("LimitedProtocol", (_LimitedProtocol, AutoHTTPProtocol), {"limits": limits})


def uvicorn_options(settings: ServerSettings, open_files: int) -> dict[str, Any]:
    """Translate a server's settings to options of `uvicorn.Config`.

    Args:
        open_files: this process' limit, see `raise_file_limit`.
    """
    limits = Connections(
        max_connections=connection_limit(settings.max_connections, open_files),
        max_per_address=settings.max_connections_per_address,
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
