"""Sign a page in by a cookie that stands for an API key: valid across restarts and servers, as long as the key is.

The cookie holds when it was made, a random id and a signature by a secret that is computed from the key, so that all
servers that have the key know the cookie. The ids of sessions that were ended are in the database.
"""

import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

import anyio
from starlette.datastructures import Headers
from starlette.requests import cookie_parser

from pusa.numerals import parse_whole
from pusa.server.http.keys import ApiKeys
from pusa.server.jobs.ended_sessions import EndedSessions
from pusa.server.submit import in_thread

SESSION_SECONDS = 30 * 86_400
_EARLY_SECONDS = 300  # by which the clock of another server may be ahead
_VALUE = re.compile(r"(([0-9]{1,12})\.([0-9a-f]{32}))\.([0-9a-f]{64})")
_OTHER_SITES = ("cross-site", "same-site")


@dataclass(frozen=True)
class Session:
    """Hold whose session it is, its random id, and when it ends by itself (unix seconds)."""

    owner: str
    id: str
    expires_at: float


class SessionCookies:
    """Make and read the cookies of one server.

    Args:
        keys: valid API keys.
        ended: the sessions that were ended.
        identity: of the database: servers of one machine share their cookies, so each has a name of its own.
        clock: unix seconds; a parameter for tests.
    """

    def __init__(
        self, keys: ApiKeys, ended: EndedSessions, identity: str, clock: Callable[[], float] = time.time
    ) -> None:
        self.keys, self.name, self._ended, self._clock = keys, f"pusa_session_{identity[:8]}", ended, clock

    def value(self, owner: str) -> str:
        """Return the value of a new cookie that stands for an owner's key."""
        session = f"{int(self._clock())}.{secrets.token_hex(16)}"
        return f"{session}.{self.keys.sign(owner, session)}"

    async def find(self, headers: Headers) -> Session | None:
        """Return the session of a request; None without a valid cookie, and for requests of other sites' pages."""
        session = self._signed(headers)
        return None if session is None or await self.has_ended(session) else session

    async def has_ended(self, session: Session) -> bool:
        """Tell whether a session was ended: on this server, or more than a second ago on another one."""
        if self._ended.is_due():
            await anyio.to_thread.run_sync(self._ended.refresh)
        return self._ended.has(session.id)

    async def end(self, headers: Headers) -> None:
        """End the session of a request's cookie, if there is one. Raises ServiceError (503) if that is not possible."""
        session = self._signed(headers)
        if session is not None:
            await in_thread(self._ended.end, session.id, session.expires_at)

    def _signed(self, headers: Headers) -> Session | None:
        """Return what a request's cookie says, if a valid key has signed it and a page of this server has sent it."""
        origin = headers.get("origin")
        if headers.get("sec-fetch-site") in _OTHER_SITES:
            return None
        if origin is not None and netloc_of(origin) != headers.get("host", "").lower():
            return None
        found = _VALUE.fullmatch(cookie_parser(headers.get("cookie", "")).get(self.name, ""))
        if found is None:
            return None
        signed, made_at, id, signature = found.groups()
        age_seconds = self._clock() - parse_whole(made_at)
        if not -_EARLY_SECONDS <= age_seconds <= SESSION_SECONDS:
            return None
        owner = self.keys.signer(signed, signature)
        return None if owner is None else Session(owner, id, parse_whole(made_at) + SESSION_SECONDS)


def netloc_of(origin: str) -> str:
    """Return host and port of an origin in lower case; an invalid origin becomes ""."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""
