"""Fetch images by URL, from hosts that the operator allows and without reaching internal networks (SSRF).

Without `image_url_hosts` nothing is fetched. The host name is resolved once and that address is connected to, so that
a second look-up cannot differ; private and loopback addresses are refused, and a redirect is an error.
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


def _resolve(host: str, port: int) -> list[str]:
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def address_of(url: str, allowed: Collection[str], resolver: Resolver = _resolve) -> tuple[str, str, int]:
    """Return the host of a URL, the IP address to connect to and the port.

    Raises:
        ServiceError: 400 for anything but https to an allowed host with public addresses.
    """
    if not allowed:
        raise _not_fetched("this server fetches nothing from addresses: send the file, or a data URL")
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").lower(), parts.port or 443
    except ValueError:
        raise _not_fetched(f"{url[:60]!r} is no address") from None
    if parts.scheme != "https" or parts.username is not None or parts.password is not None:
        raise _not_fetched(f"{url[:60]!r}: only https addresses without a login are fetched")
    if host not in {name.lower() for name in allowed} or port != 443:
        raise _not_fetched(f"nothing is fetched from {host[:60]!r}: allowed are {', '.join(allowed)}")
    try:
        addresses = resolver(host, port)
    except OSError:
        addresses = []
    if not addresses or not all(_is_public(address) for address in addresses):
        raise _not_fetched(f"{host[:60]!r} has no public address")
    return host, addresses[0], port


def _is_public(text: str) -> bool:
    address = ipaddress.ip_address(text.partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    address = mapped or address
    return address.is_global and not address.is_multicast


def fetch(
    url: str, target: Path, *, allowed: Collection[str], max_bytes: int, resolver: Resolver = _resolve
) -> tuple[str, int]:
    """Download a URL to `target`; return its content type and size in bytes.

    Raises:
        ServiceError: 400 for a URL that is not allowed, does not answer with 200, or has more than `max_bytes`.
    """
    host, address, _ = address_of(url, allowed, resolver)
    import httpx  # takes a third of the server's import time, and few servers allow URLs

    pinned = httpx.URL(url).copy_with(host=address)
    try:
        with (
            httpx.Client(trust_env=False, follow_redirects=False, timeout=TIMEOUT_SECONDS) as client,
            client.stream("GET", pinned, headers={"host": host}, extensions={"sni_hostname": host}) as response,
        ):
            if response.status_code != 200:
                raise _not_fetched(f"{host[:60]!r} answered with status {response.status_code}, not with a file")
            size = 0
            with target.open("wb") as file:
                for chunk in response.iter_bytes(_CHUNK_BYTES):
                    size += len(chunk)
                    if size > max_bytes:
                        raise _not_fetched(f"the file has more than {max_bytes / 2**20:g} MiB, the limit")
                    file.write(chunk)
            return response.headers.get("content-type", ""), size
    except httpx.HTTPError as error:
        raise _not_fetched(f"{host[:60]!r} could not be read ({type(error).__name__})") from None


def _not_fetched(message: str) -> ServiceError:
    return ServiceError(400, "url_not_fetched", message, "image_url")
