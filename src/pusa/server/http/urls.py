"""Pictures by address: only from hosts that the operator has named, and only the way that cannot reach anything else.

Without `image_url_hosts` nothing is ever fetched. The address that a name stands for is looked up once and connected
to, so that a second look-up cannot answer differently; addresses of private networks and of this machine are refused,
and a redirect is an error.
"""

import ipaddress
import socket
from collections.abc import Callable, Collection
from pathlib import Path
from urllib.parse import urlsplit

from pusa.server.errors import ServiceError

TIMEOUT_SECONDS = 10.0
_CHUNK_BYTES = 2**16

Resolver = Callable[[str, int], list[str]]


def _resolved(host: str, port: int) -> list[str]:
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def address_of(url: str, allowed: Collection[str], resolver: Resolver = _resolved) -> tuple[str, str, int]:
    """The host of a URL, the address to connect to and the port.

    Raises:
        ServiceError: 400 for anything but https to an allowed host with a public address.
    """
    if not allowed:
        raise _refused("this server fetches nothing from addresses: send the file, or a data URL")
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").lower(), parts.port or 443
    except ValueError:
        raise _refused(f"{url[:60]!r} is no address") from None
    if parts.scheme != "https" or parts.username is not None or parts.password is not None:
        raise _refused(f"{url[:60]!r}: only https addresses without a login are fetched")
    if host not in {name.lower() for name in allowed} or port != 443:
        raise _refused(f"nothing is fetched from {host[:60]!r}: allowed are {', '.join(allowed)}")
    try:
        addresses = resolver(host, port)
    except OSError:
        addresses = []
    if not addresses or not all(_is_public(address) for address in addresses):
        raise _refused(f"{host[:60]!r} has no public address")
    return host, addresses[0], port


def _is_public(text: str) -> bool:
    address = ipaddress.ip_address(text.partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    address = mapped or address
    return address.is_global and not address.is_multicast


def fetch(
    url: str, target: Path, *, allowed: Collection[str], max_bytes: int, resolver: Resolver = _resolved
) -> tuple[str, int]:
    """Write what an address holds into `target`; its content type and size.

    Raises:
        ServiceError: 400 for an address that may not be fetched, does not answer well, or holds more than `max_bytes`.
    """
    host, address, _ = address_of(url, allowed, resolver)
    import httpx  # half as slow to import as all the rest of the server, for what few servers allow

    pinned = httpx.URL(url).copy_with(host=address)
    try:
        with (
            httpx.Client(trust_env=False, follow_redirects=False, timeout=TIMEOUT_SECONDS) as client,
            client.stream("GET", pinned, headers={"host": host}, extensions={"sni_hostname": host}) as answer,
        ):
            if answer.status_code != 200:
                raise _refused(f"{host[:60]!r} answered with status {answer.status_code}, not with a file")
            size = 0
            with target.open("wb") as file:
                for chunk in answer.iter_bytes(_CHUNK_BYTES):
                    size += len(chunk)
                    if size > max_bytes:
                        raise _refused(f"the file has more than {max_bytes / 2**20:g} MiB, the limit")
                    file.write(chunk)
            return answer.headers.get("content-type", ""), size
    except httpx.HTTPError as error:
        raise _refused(f"{host[:60]!r} could not be read ({type(error).__name__})") from None


def _refused(message: str) -> ServiceError:
    return ServiceError(400, "url_not_fetched", message, "image_url")
