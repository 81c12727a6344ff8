"""Sign a page in by a cookie that stands for an API key: valid across restarts and servers, as long as the key is.

The cookie holds when it was made and a signature by a secret that is computed from the key, so that no server keeps
sessions, and all that have the key know the cookie.
"""

import re
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import cookie_parser

from pusa.numerals import parse_whole
from pusa.server.http.keys import ApiKeys

SESSION_SECONDS = 30 * 86_400
_EARLY_SECONDS = 300  # by which the clock of another server may be ahead
_VALUE = re.compile(r"([0-9]{1,12})\.([0-9a-f]{64})")
_OTHER_SITES = ("cross-site", "same-site")


class SessionCookies:
    """Make and read the cookies of one server.

    Args:
        keys: valid API keys.
        identity: of the database: servers of one machine share their cookies, so each has a name of its own.
        clock: unix seconds; a parameter for tests.
    """

    def __init__(self, keys: ApiKeys, identity: str, clock: Callable[[], float] = time.time) -> None:
        self.keys, self.name, self._clock = keys, f"pusa_session_{identity[:8]}", clock

    def value(self, owner: str) -> str:
        """Return the value of a new cookie that stands for an owner's key."""
        made_at = str(int(self._clock()))
        return f"{made_at}.{self.keys.sign(owner, made_at)}"

    def owner_of(self, headers: Headers) -> str | None:
        """Return the owner of a request's cookie; None without a valid one, and for requests of other sites' pages."""
        origin = headers.get("origin")
        if headers.get("sec-fetch-site") in _OTHER_SITES:
            return None
        if origin is not None and netloc_of(origin) != headers.get("host", "").lower():
            return None
        found = _VALUE.fullmatch(cookie_parser(headers.get("cookie", "")).get(self.name, ""))
        if found is None:
            return None
        age_seconds = self._clock() - parse_whole(found[1])
        if not -_EARLY_SECONDS <= age_seconds <= SESSION_SECONDS:
            return None
        return self.keys.signer(found[1], found[2])


def netloc_of(origin: str) -> str:
    """Return host and port of an origin in lower case; an invalid origin becomes ""."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""
