"""Who is let in, with how much, under which name; and what is fetched from elsewhere."""

import asyncio
import base64
import errno
import itertools
import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, Mock

import httpx
import pytest
from api_samples import Served, png, refusal, serving

from pusa.server.errors import ServiceError
from pusa.server.feed import Snapshot
from pusa.server.http import urls
from pusa.server.http.keys import ApiKeys
from pusa.server.http.middleware import HostCheck
from pusa.server.http.sse import events
from pusa.server.jobs.store import FileStore, StorageFullError

ANNS, BOBS = "anns-key-0123456789", "bobs-key-0123456789"
LIMIT_BYTES = 200_000
ADDRESSES = itertools.count(1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """With two keys, small limits, and a name of its own."""
    with serving(
        tmp_path_factory.mktemp("limits"),
        api_keys=[ANNS, BOBS],
        max_body_bytes=LIMIT_BYTES,
        key_queue_limit=2,
        queue_limit=3,
        max_video_pixels=96 * 96,
        max_video_frames=33,
        max_steps=10,
        max_uploads=2,
        allowed_hosts=["videos.example.org"],
        allowed_origins=["https://pages.example.org"],
        trusted_proxies=["127.0.0.1"],
    ) as served:
        yield served


@pytest.fixture
def ann(server: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {ANNS}"}, trust_env=False) as client:
        yield client


@pytest.fixture
def bob(server: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {BOBS}"}, trust_env=False) as client:
        yield client


def create(client: httpx.Client, **fields: Any) -> httpx.Response:
    return client.post("/v1/videos", json={"prompt": "a duck", **fields})


# ---- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["", "Bearer", "Bearer wrong", f"Basic {ANNS}", "Bearer \xff", f"bearer {ANNS[:-1]}"])
def test_nothing_but_health_and_readiness_is_open_without_a_key(server: Served, key: str) -> None:
    given = [(b"authorization", key.encode("latin-1"))] if key else []
    for path in ("/v1/videos", "/v1/models", "/metrics", "/openapi.json", "/docs", "/", "/nowhere"):
        address = f"192.0.2.{next(ADDRESSES)}"  # each another one, as refusals of one address wait
        answer = server.http.get(path, headers=[*given, (b"x-forwarded-for", address.encode())])
        assert refusal(answer, 401)["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
    assert server.http.get("/health").status_code == 200
    assert server.http.get("/ready").status_code == 200


def test_a_browser_gets_a_prompt_for_the_key(server: Served) -> None:
    asked = server.http.get("/", headers={"accept": "text/html"})
    assert asked.headers["www-authenticate"].startswith("Basic")
    assert server.http.get("/", auth=("anyone", ANNS)).status_code == 200


def test_a_key_sees_its_own_jobs_only(ann: httpx.Client, bob: httpx.Client) -> None:
    id = create(ann).json()["id"]
    for answer in (
        bob.get(f"/v1/videos/{id}"),
        bob.get(f"/v1/videos/{id}/content"),
        bob.get(f"/v1/videos/{id}/events"),
        bob.post(f"/v1/videos/{id}/cancel"),
        bob.post(f"/v1/videos/{id}/remix", json={"prompt": "x"}),
        bob.post("/v1/videos/extensions", json={"video": {"id": id}}),
        bob.delete(f"/v1/videos/{id}"),
    ):
        refusal(answer, 404)
    assert id not in [video["id"] for video in bob.get("/v1/videos").json()["data"]]
    assert refusal(bob.get("/v1/videos", params={"after": id}), 400)["param"] == "after"
    assert ann.get(f"/v1/videos/{id}").status_code == 200


def test_with_keys_nobody_goes_before_the_others(ann: httpx.Client) -> None:
    assert refusal(create(ann, priority=1), 400)["param"] == "priority"


def test_every_key_is_compared_and_none_is_kept() -> None:
    keys = ApiKeys([ANNS, BOBS])
    assert keys.owner(ANNS) != keys.owner(BOBS)
    assert keys.owner("") is keys.owner(None) is None
    assert ANNS not in repr(vars(keys))
    assert ApiKeys([]).owner("anything") == ""


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["evil.example.org", "localhost.evil.org", "", "127.0.0.1.evil.org", "[::1].evil"])
def test_a_name_that_is_not_ours_is_not_answered(ann: httpx.Client, host: str) -> None:
    assert refusal(ann.get("/v1/videos", headers={"host": host}), 403)["code"] == "unknown_host"


@pytest.mark.parametrize("host", ["localhost:7860", "127.0.0.1", "[::1]:7860", "videos.example.org", "pusa.localhost"])
def test_addresses_and_allowed_names_are(ann: httpx.Client, host: str) -> None:
    assert ann.get("/v1/videos", headers={"host": host}).status_code == 200


def test_pages_of_others_may_not_use_the_api(ann: httpx.Client) -> None:
    for origin in ("https://evil.example.org", "null", "http://localhost:1", "nonsense"):
        answer = ann.post("/v1/videos", json={"prompt": "x"}, headers={"origin": origin})
        assert refusal(answer, 403)["code"] == "unknown_origin"
        assert "access-control-allow-origin" not in answer.headers
    same = str(ann.base_url).rstrip("/")
    assert ann.get("/v1/videos", headers={"origin": same}).status_code == 200
    allowed = ann.get("/v1/videos", headers={"origin": "https://pages.example.org"})
    assert allowed.headers["access-control-allow-origin"] == "https://pages.example.org"
    preflight = {"origin": "https://pages.example.org", "access-control-request-method": "POST"}
    assert httpx.options(f"{same}/v1/videos", headers=preflight).status_code == 200


def test_without_a_list_a_host_check_knows_this_machine() -> None:
    check = HostCheck()
    check.check(httpx.Headers({"host": "localhost"}), "GET")  # type: ignore[arg-type]
    with pytest.raises(ServiceError) as refused:
        check.check(httpx.Headers({"host": "rebound.example.org"}), "GET")  # type: ignore[arg-type]
    assert refused.value.status == 403


# ---- sizes -----------------------------------------------------------------------------------------------------------


def test_a_body_is_counted_whatever_its_headers_say(ann: httpx.Client, server: Served) -> None:
    large = b"x" * (LIMIT_BYTES + 1)
    kind = {"content-type": "application/json"}
    refusal(ann.post("/v1/videos", content=large, headers=kind), 413)
    refusal(ann.post("/v1/videos", content=iter([large[:1000]] * 500), headers=kind), 413)
    refusal(ann.post("/v1/videos", data={"prompt": "x"}, files={"input_reference": ("a.png", large)}), 413)
    assert not list(server.service.spool.folder.iterdir())


def test_more_files_than_allowed_are_refused(ann: httpx.Client, server: Served) -> None:
    files = [("input_reference[]", (f"{n}.png", png())) for n in range(3)]
    assert refusal(ann.post("/v1/videos", data={"prompt": "x"}, files=files), 400)["code"] == "too_many_files"
    urls = [f"data:image/png;base64,{base64.b64encode(png()).decode()}"] * 3
    assert refusal(create(ann, input_reference=urls), 400)["code"] == "too_many_files"
    assert not list(server.service.spool.folder.iterdir())


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"size": "128x128"}, "size"),
        ({"num_frames": 81}, "seconds"),
        ({"num_inference_steps": 11}, "num_inference_steps"),
    ],
)
def test_videos_beyond_the_operators_limits_are_refused(ann: httpx.Client, fields: dict[str, Any], param: str) -> None:
    error = refusal(create(ann, **fields), 400)
    assert error["param"] == param
    assert "at most" in error["message"]


def test_a_full_queue_says_when_to_come_back(server: Served, ann: httpx.Client, bob: httpx.Client) -> None:
    for client in (ann, bob):
        for video in client.get("/v1/videos").json()["data"]:
            client.delete(f"/v1/videos/{video['id']}")
    ids = [create(ann, prompt="wait").json()["id"] for _ in range(2)]
    full = create(ann)
    assert refusal(full, 429)["code"] == "queue_full"
    assert int(full.headers["retry-after"]) >= 1
    assert int(full.headers["retry-after-ms"]) >= 1
    other = create(bob, prompt="wait").json()["id"]
    refusal(create(bob), 429)  # the limit of all
    for id in ids:
        ann.delete(f"/v1/videos/{id}")
    bob.delete(f"/v1/videos/{other}")
    assert create(ann).status_code == 200


# ---- a full disk -----------------------------------------------------------------------------------------------------


def test_a_full_disk_refuses_new_jobs_and_keeps_the_running_one(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        running = server.create(prompt="wait")["id"]
        with pytest.MonkeyPatch.context() as patch:

            def full(*_: Any) -> None:
                raise StorageFullError(errno.ENOSPC, "no space left on device")

            patch.setattr(FileStore, "put_file", full)
            files = {"input_reference": ("a.png", png())}
            answer = server.http.post("/v1/videos", data={"prompt": "x"}, files=files)
            assert refusal(answer, 507)["code"] == "disk_full"
            assert answer.headers["x-should-retry"] == "false"
            patch.setattr("pusa.server.http.references.MAX_TEXT_BYTES", 10**6)
            patch.setattr(FileStore, "free_bytes", lambda _: 0)
            changed = server.service.settings.model_copy(update={"min_free_bytes": 1})
            patch.setattr(server.service.submitter, "settings", changed)
            refusal(server.http.post("/v1/videos", json={"prompt": "x"}), 507)
        server.executor.gate.set()
        assert server.ended(running)["status"] == "completed"
        assert len(server.http.get("/v1/videos").json()["data"]) == 1


# ---- addresses -------------------------------------------------------------------------------------------------------

ALLOWED = ("pictures.example.org",)


def resolver(*addresses: str) -> Any:
    return lambda host, port: list(addresses)


def test_an_address_is_pinned_to_what_its_name_was_looked_up_as() -> None:
    found = urls.address_of("https://pictures.example.org/a.png", ALLOWED, resolver("93.184.216.34"))
    assert found == ("pictures.example.org", "93.184.216.34", 443)


@pytest.mark.parametrize(
    ("url", "addresses"),
    [
        ("http://pictures.example.org/a.png", ["93.184.216.34"]),
        ("https://evil.example.org/a.png", ["93.184.216.34"]),
        ("https://pictures.example.org:8443/a.png", ["93.184.216.34"]),
        ("https://user:password@pictures.example.org/a.png", ["93.184.216.34"]),
        ("https://pictures.example.org.evil.org/a.png", ["93.184.216.34"]),
        ("ftp://pictures.example.org/a.png", ["93.184.216.34"]),
        ("https://[::1", ["93.184.216.34"]),
        ("https://pictures.example.org/a.png", ["127.0.0.1"]),
        ("https://pictures.example.org/a.png", ["10.0.0.1"]),
        ("https://pictures.example.org/a.png", ["169.254.169.254"]),
        ("https://pictures.example.org/a.png", ["::1"]),
        ("https://pictures.example.org/a.png", ["::ffff:127.0.0.1"]),
        ("https://pictures.example.org/a.png", ["fe80::1%eth0"]),
        ("https://pictures.example.org/a.png", ["93.184.216.34", "192.168.0.1"]),
        ("https://pictures.example.org/a.png", ["224.0.0.1"]),
        ("https://pictures.example.org/a.png", []),
    ],
)
def test_addresses_that_could_reach_something_else_are_not_fetched(url: str, addresses: list[str]) -> None:
    with pytest.raises(ServiceError) as refused:
        urls.address_of(url, ALLOWED, resolver(*addresses))
    assert refused.value.code == "url_not_fetched"


def test_nothing_is_fetched_unless_a_host_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match="fetches nothing"):
        urls.fetch("https://pictures.example.org/a.png", tmp_path / "a", allowed=(), max_bytes=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (httpx.Response(302, headers={"location": "http://127.0.0.1/"}), "status 302"),
        (httpx.Response(404), "status 404"),
        (httpx.Response(200, content=b"x" * 101), "MiB"),
        (httpx.ConnectError("no"), "ConnectError"),
    ],
)
def test_redirects_and_too_much_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: Any, words: str
) -> None:
    asked = _answering(monkeypatch, answer)
    with pytest.raises(ServiceError, match=words):
        urls.fetch("https://pictures.example.org/a", tmp_path / "a", **_fetching())
    assert str(asked[0].url) == "https://93.184.216.34/a"


def test_a_picture_of_an_allowed_host_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = httpx.Response(200, content=b"picture", headers={"content-type": "image/png"})
    asked = _answering(monkeypatch, answer)
    assert urls.fetch("https://pictures.example.org/a?b", tmp_path / "a", **_fetching()) == ("image/png", 7)
    assert (tmp_path / "a").read_bytes() == b"picture"
    assert asked[0].headers["host"] == "pictures.example.org"
    assert asked[0].extensions["sni_hostname"] == "pictures.example.org"


def _fetching() -> dict[str, Any]:
    return {"allowed": ALLOWED, "max_bytes": 100, "resolver": resolver("93.184.216.34")}


def _answering(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[httpx.Request]:
    asked: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        if isinstance(answer, Exception):
            raise answer
        return answer

    real = httpx.Client
    monkeypatch.setattr(httpx, "Client", lambda **options: real(**options, transport=httpx.MockTransport(handle)))
    return asked


def test_a_stream_without_changes_is_kept_alive() -> None:
    async def unchanging() -> AsyncGenerator[Snapshot, None]:
        await asyncio.sleep(3600)
        yield pytest.fail("nothing changed")

    async def first_lines() -> list[str]:
        waiting = Snapshot(Mock(status="queued", ended=False))
        to_json, no_preview = AsyncMock(return_value={}), AsyncMock(return_value=None)
        stream = events(waiting, unchanging(), to_json, no_preview, lambda: False, keep_alive_seconds=0.01)
        lines = [await anext(stream) for _ in range(4)]
        await stream.aclose()
        return lines

    first = ["retry: 2000\n\n", "id: 1\nevent: video\ndata: {}\n\n"]
    assert asyncio.run(first_lines()) == [*first, ": still here\n\n", ": still here\n\n"]


def test_a_stream_ends_when_the_server_does(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        id = server.create(prompt="wait")["id"]
        with server.http.stream("GET", f"/v1/videos/{id}/events") as stream:
            lines = stream.iter_lines()
            while next(lines) != "event: video":
                pass
            began = time.monotonic()
            server.app.state.stop()
            assert 'data: {"reason": "shutdown"}' in list(lines)
            assert time.monotonic() - began < 5
        assert server.job(id).status in ("queued", "in_progress")
