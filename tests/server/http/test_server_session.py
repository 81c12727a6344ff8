"""A page signs in with a key and gets a cookie: for its own requests only, and as long as the key is valid."""

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from api_samples import Served, refusal, serving
from server_samples import wait_until
from starlette.datastructures import Headers

from pusa.server.errors import ServiceError
from pusa.server.http.keys import ApiKeys
from pusa.server.http.middleware import AccessMiddleware
from pusa.server.http.session_cookies import SESSION_SECONDS, SessionCookies
from pusa.server.jobs.ended_sessions import EndedSessions
from pusa.server.jobs.queue import JobQueue, QueueUnavailable
from pusa.server.studio.page import PATHS

ANNS, BOBS = "anns-key-0123456789", "bobs-key-0123456789"
DAY = 86_400


class Time:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[JobQueue]:
    queue = JobQueue(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    yield queue
    queue.close()


CookiesOf = Callable[..., SessionCookies]


@pytest.fixture
def cookies_of(queue: JobQueue) -> CookiesOf:
    """Make the cookies of a server that has these keys."""

    def make(*keys: str, clock: Time | None = None) -> SessionCookies:
        clock = clock or Time()
        ended = EndedSessions(queue, read_seconds=0, clock=clock)
        return SessionCookies(ApiKeys(keys), ended, "5f0c4f6c1d0f", clock)

    return make


def owner_of(cookies: SessionCookies, key: str = ANNS) -> str:
    owner = cookies.keys.owner(key)
    assert owner is not None
    return owner


def headers_of(cookies: SessionCookies, value: str, **headers: str) -> Headers:
    names = {name.replace("_", "-"): text for name, text in headers.items()}
    return Headers({"host": "videos:7860", "cookie": f"other=1; {cookies.name}={value}", **names})


def sent(cookies: SessionCookies, value: str, **headers: str) -> str | None:
    """The owner that a request with a cookie counts as."""
    session = asyncio.run(cookies.find(headers_of(cookies, value, **headers)))
    return None if session is None else session.owner


def test_a_cookie_stands_for_a_key_on_every_server_that_has_it(cookies_of: CookiesOf) -> None:
    cookies = cookies_of(ANNS, BOBS)
    owner = owner_of(cookies, BOBS)
    value = cookies.value(owner)
    assert sent(cookies, value) == owner
    assert sent(cookies_of(BOBS), value) == owner
    assert sent(cookies_of(ANNS), value) is None
    assert BOBS not in value
    assert owner not in value


@pytest.mark.parametrize(
    "change", [lambda v: v[:-1], lambda v: "9" + v, lambda v: v[:-1] + "g", lambda v: "", str.upper]
)
def test_a_changed_cookie_is_none(cookies_of: CookiesOf, change: Callable[[str], str]) -> None:
    cookies = cookies_of(ANNS)
    value = cookies.value(owner_of(cookies))
    assert sent(cookies, value)
    assert sent(cookies, change(value)) is None


def test_nobody_signs_with_what_the_database_knows(cookies_of: CookiesOf) -> None:
    cookies = cookies_of(ANNS)
    owner = owner_of(cookies)  # in every row
    guessed = cookies_of(owner)
    assert sent(cookies, guessed.value(owner_of(guessed, owner))) is None


def test_a_cookie_ends_after_thirty_days(cookies_of: CookiesOf) -> None:
    clock = Time()
    cookies = cookies_of(ANNS, clock=clock)
    value = cookies.value(owner_of(cookies))
    clock.now += SESSION_SECONDS
    assert sent(cookies, value)
    clock.now += 1
    assert sent(cookies, value) is None
    clock.now -= SESSION_SECONDS + DAY  # made in the future
    assert sent(cookies, value) is None


def test_pages_of_other_sites_do_not_count_as_signed_in(cookies_of: CookiesOf) -> None:
    cookies = cookies_of(ANNS)
    value = cookies.value(owner_of(cookies))
    assert sent(cookies, value, origin="http://videos:7860", sec_fetch_site="same-origin")
    assert sent(cookies, value, sec_fetch_site="none")
    assert sent(cookies, value, sec_fetch_site="cross-site") is None
    assert sent(cookies, value, sec_fetch_site="same-site") is None
    assert sent(cookies, value, origin="http://videos:3000") is None
    assert sent(cookies, value, origin="null") is None


def test_an_ended_session_has_ended_on_every_server_and_no_other_one_has(cookies_of: CookiesOf) -> None:
    here, there = cookies_of(ANNS), cookies_of(ANNS)
    owner = owner_of(here)
    value, other = here.value(owner), here.value(owner)  # of one second, in two browsers
    assert sent(here, value) == sent(there, value) == sent(here, other) == owner
    asyncio.run(here.end(headers_of(here, value, sec_fetch_site="cross-site")))  # it signs nobody out
    asyncio.run(here.end(headers_of(here, "no cookie")))
    assert sent(here, value) == owner
    for _ in range(2):  # the second time changes nothing
        asyncio.run(here.end(headers_of(here, value)))
        assert sent(here, value) is None
        assert sent(there, value) is None
    assert sent(cookies_of(ANNS), value) is None  # after a restart
    assert sent(here, other) == owner


def test_an_ended_session_stays_ended_while_the_database_is_away(
    queue: JobQueue, cookies_of: CookiesOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    cookies = cookies_of(ANNS)
    ended, going = (cookies.value(owner_of(cookies)) for _ in range(2))
    asyncio.run(cookies.end(headers_of(cookies, ended)))

    def away(*_: object) -> None:
        raise QueueUnavailable("no answer")

    monkeypatch.setattr(EndedSessions, "_read", away)
    monkeypatch.setattr(EndedSessions, "end", away)
    assert sent(cookies, ended) is None
    assert sent(cookies, going)
    with pytest.raises(ServiceError) as refused:
        asyncio.run(cookies.end(headers_of(cookies, going)))
    assert (refused.value.status, refused.value.code) == (503, "queue_unavailable")
    assert sent(cookies, going)  # nobody has been told that it is ended


# ---- over HTTP -------------------------------------------------------------------------------------------------------


def state(server: Served) -> tuple[bool, bool]:
    answer = server.http.get("/v1/session")
    assert answer.headers["cache-control"] == "no-store"
    return answer.json()["keys_required"], answer.json()["signed_in"]


def test_a_page_signs_in_and_out(tmp_path):
    with serving(tmp_path, workers=0, api_keys=(ANNS, BOBS)) as server:
        assert state(server) == (True, False)
        assert refusal(server.http.get("/v1/videos"), 401)["code"] == "invalid_api_key"
        answer = server.http.post("/v1/session", json={"key": f" {ANNS}\n"}, headers={"origin": server.url})
        assert (answer.status_code, answer.content) == (204, b"")
        made = answer.headers["set-cookie"]
        assert {"HttpOnly", "Path=/", "SameSite=strict"} <= set(made.split("; "))
        assert "Secure" not in made
        assert ANNS not in made
        assert state(server) == (True, True)
        video = server.create()
        theirs = server.http.get("/v1/videos", headers={"authorization": f"Bearer {BOBS}"})
        assert theirs.json()["data"] == []  # a key in the request goes before the cookie
        ours = server.http.get("/v1/videos", headers={"authorization": f"Bearer {ANNS}"})
        assert [found["id"] for found in ours.json()["data"]] == [video["id"]]
        copied = dict(server.http.cookies)
        assert server.http.delete("/v1/session").status_code == 204
        assert state(server) == (True, False)
        assert server.http.get("/v1/videos").status_code == 401
        assert httpx.get(f"{server.url}/v1/videos", cookies=copied).status_code == 401
        assert server.http.delete("/v1/session").status_code == 204  # nobody is signed in: nothing to end


def test_a_stream_of_a_session_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path, workers=0, api_keys=(ANNS,)) as server:
        monkeypatch.setattr(server.service.events, "_keep_alive_seconds", 0.05)
        server.http.post("/v1/session", json={"key": ANNS})
        copied = dict(server.http.cookies)
        with httpx.stream("GET", f"{server.url}/v1/events", cookies=copied, timeout=30) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("retry: ")
            assert server.http.delete("/v1/session").status_code == 204
            assert "signed_out" in list(filter(None, lines))[-1]


def test_a_session_outlives_a_restart(tmp_path):
    with serving(tmp_path, workers=0, api_keys=(ANNS,)) as server:
        server.http.post("/v1/session", json={"key": ANNS})
        cookies = dict(server.http.cookies)
    with serving(tmp_path, workers=0, api_keys=(ANNS,)) as server:
        assert httpx.get(f"{server.url}/v1/videos", cookies=cookies).status_code == 200


def test_a_session_ends_with_its_key(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"{ANNS}\n{BOBS}\n")
    with serving(tmp_path, workers=0, api_keys=(ANNS, BOBS), api_keys_file=str(file)) as server:
        server.http.post("/v1/session", json={"key": ANNS})
        assert state(server) == (True, True)
        file.write_text(f"{BOBS}\n")
        os.utime(file, ns=(file.stat().st_mtime_ns + 10**9,) * 2)
        wait_until(lambda: state(server) == (True, False))


def test_wrong_keys_are_slowed_down_here_too(tmp_path):
    with serving(tmp_path, workers=0, api_keys=(ANNS,)) as server:
        assert refusal(server.http.post("/v1/session", json={"key": "wrong"}), 401)["code"] == "invalid_api_key"
        assert server.service.wrong_keys.total == 1
        server.service.wrong_keys._free, server.service.wrong_keys._at_once = 0, 0
        answer = server.http.post("/v1/session", json={"key": "wrong"})
        assert refusal(answer, 429)["code"] == "too_many_wrong_keys"
        assert server.http.post("/v1/session", json={"key": ANNS}).status_code == 204
        server.http.cookies.clear()
        asked = {name: {"authorization": f"Bearer {name}"} for name in ("guessed", ANNS)}
        answer = server.http.get("/v1/session", headers=asked["guessed"])  # tells nobody faster which key is right
        assert refusal(answer, 429)["code"] == "too_many_wrong_keys"
        assert server.service.wrong_keys.total == 3
        assert server.http.get("/v1/session", headers=asked[ANNS]).json()["signed_in"]
        assert not server.http.get("/v1/session").json()["signed_in"]


def test_what_needs_no_key_takes_little_and_nothing_from_other_pages(tmp_path):
    with serving(tmp_path, workers=0, api_keys=(ANNS,)) as server:
        other = {"origin": "https://elsewhere.example"}
        answer = server.http.post("/v1/session", json={"key": ANNS}, headers=other)
        assert refusal(answer, 403)["code"] == "unknown_origin"
        answer = server.http.post("/v1/session", content=b'{"key": "' + b"x" * 70_000)
        assert refusal(answer, 413)["code"] == "too_large"
        for body in ({}, {"key": ""}, {"key": 1}, {"key": ANNS, "more": 1}):
            assert server.http.post("/v1/session", json=body).status_code == 400
        assert server.http.get("/v1/sessions").status_code == 401


def test_without_keys_everybody_is_signed_in(tmp_path):
    with serving(tmp_path, workers=0) as server:
        assert state(server) == (False, True)
        answer = server.http.post("/v1/session", json={"key": "anything"})
        assert (answer.status_code, answer.headers.get("set-cookie")) == (204, None)


def test_behind_https_and_a_prefix_the_cookie_is_secure_and_for_that_path(tmp_path):
    proxied = {"x-forwarded-proto": "https", "x-forwarded-for": "203.0.113.7"}
    with serving(tmp_path, workers=0, api_keys=(ANNS,), root_path="/pusa", trusted_proxies=("127.0.0.1",)) as server:
        made = server.http.post("/v1/session", json={"key": ANNS}, headers=proxied).headers["set-cookie"]
        assert {"Secure", "Path=/pusa", "HttpOnly"} <= set(made.split("; "))


def test_named_paths_need_no_key_and_scripts_are_not_asked_for_a_password(tmp_path):
    seen: dict[str, str] = {}

    async def app(scope, receive, send):
        seen[scope["path"]] = scope["state"]["owner"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"page"})

    guarded = AccessMiddleware(app, keys=ApiKeys([ANNS]), hosts=None, max_body_bytes=1024, open_paths=PATHS)
    transport = httpx.ASGITransport(app=guarded)

    async def ask() -> dict[str, tuple[int, str]]:
        found = {}
        async with httpx.AsyncClient(transport=transport, base_url="http://videos") as client:
            for path in ("/", "/favicon.ico", "/studio/app.js", "/studio", "/other", "/v1/videos", "/faviconXico"):
                answer = await client.get(path, headers={"accept": "text/html"})
                found[path] = answer.status_code, answer.headers.get("www-authenticate", "")
            for name, value in (("sec-fetch-mode", "cors"), ("sec-fetch-mode", "same-origin"), ("x-pusa-page", "1")):
                answer = await client.get("/other", headers={"accept": "text/html", name: value})
                found[f"{name}={value}"] = answer.status_code, answer.headers.get("www-authenticate", "")
        return found

    basic = 'Basic realm="pusa", charset="UTF-8"'
    assert asyncio.run(ask()) == {
        "/": (200, ""),
        "/favicon.ico": (200, ""),
        "/studio/app.js": (200, ""),
        "/studio": (401, basic),
        "/other": (401, basic),
        "/v1/videos": (401, "Bearer"),
        "/faviconXico": (401, basic),
        "sec-fetch-mode=cors": (401, "Bearer"),
        "sec-fetch-mode=same-origin": (401, "Bearer"),
        "x-pusa-page=1": (401, "Bearer"),
    }
    assert set(seen.values()) == {"nobody"}  # whose jobs there are none


def test_files_of_one_machines_servers_have_cookies_of_their_own(tmp_path: Path):
    names = []
    for folder in ("one", "two"):
        with serving(tmp_path / folder, workers=0, api_keys=(ANNS,)) as server:
            server.http.post("/v1/session", json={"key": ANNS})
            names += list(server.http.cookies)
            schemes = server.http.get("/openapi.json").json()["components"]["securitySchemes"]
            assert schemes["session"]["name"] == names[-1]
    assert len(set(names)) == 2
