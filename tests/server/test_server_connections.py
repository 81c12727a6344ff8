"""Connections: how many, from where, and for how long one may say nothing."""

import asyncio
import contextlib
import json
import resource
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_samples import Served, serving

from pusa.server import connections
from pusa.server.connections import Connections, connection_limit, raise_file_limit

PATIENCE_SECONDS = 30.0
BEGINNING = b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


class Waiting:
    """A connection as `Connections` sees it."""

    is_closed = False

    def close_idle(self) -> None:
        self.is_closed = True


def limits(max_connections: int = 4, max_per_address: int = 2, **changes: Any) -> Connections:
    return Connections(
        max_connections=max_connections,
        max_per_address=max_per_address,
        head_seconds=1.0,
        silent_seconds=1.0,
        **changes,
    )


# ---- which of them ---------------------------------------------------------------------------------------------------


def test_those_that_wait_longest_make_room() -> None:
    open_, old, working = limits(max_connections=3), Waiting(), Waiting()
    assert open_.add(working, "192.0.2.1")
    open_.mark_busy(working)
    assert open_.add(old, "192.0.2.2")
    assert open_.add(Waiting(), "192.0.2.3")
    assert open_.add(Waiting(), "192.0.2.4")
    assert old.is_closed
    assert not working.is_closed
    assert len(open_) == 3


def test_a_connection_that_never_sent_a_request_is_closed_first() -> None:
    open_, asked, silent = limits(max_connections=2), Waiting(), Waiting()
    open_.add(asked, "192.0.2.1")
    open_.add(silent, "192.0.2.2")
    open_.mark_busy(asked)
    open_.mark_idle(asked)
    open_.add(Waiting(), "192.0.2.3")
    assert silent.is_closed
    assert not asked.is_closed


def test_where_all_are_answered_a_new_one_is_refused() -> None:
    open_, busy = limits(max_connections=2), [Waiting(), Waiting()]
    for number, one in enumerate(busy):
        open_.add(one, f"192.0.2.{number}")
        open_.mark_busy(one)
    assert not open_.add(Waiting(), "192.0.2.9")
    assert not any(one.is_closed for one in busy)
    open_.remove(busy[0])
    assert open_.add(Waiting(), "192.0.2.9")


@pytest.mark.parametrize(
    ("hosts", "is_one"),
    [
        (("192.0.2.1", "192.0.2.1", "::ffff:192.0.2.1"), True),
        (("2001:db8::1", "2001:db8::2", "2001:db8::ffff:3"), True),
        (("192.0.2.1", "192.0.2.2", "192.0.2.3"), False),
        (("2001:db8:0:1::1", "2001:db8:0:2::1", "2001:db8:0:3::1"), False),
        (("127.0.0.1", "127.0.0.1", "127.0.0.1"), False),
        (("::1", "::1", "::1"), False),
        (("10.0.0.1", "10.0.0.2", "10.0.0.2"), False),
        (("", "", ""), False),
    ],
)
def test_one_address_has_its_share(hosts: tuple[str, ...], is_one: bool) -> None:
    open_ = limits(max_connections=10, max_per_address=2, uncounted=["10.0.0.0/8", "proxy.internal"])
    ones = [Waiting() for _ in hosts]
    for one, host in zip(ones, hosts, strict=True):
        assert open_.add(one, host)
    assert [one.is_closed for one in ones] == [is_one, False, False]
    for one in ones:
        open_.remove(one)
    assert len(open_) == 0
    assert open_.by_address == {}


def test_behind_any_proxy_addresses_are_not_counted() -> None:
    open_ = limits(max_connections=10, max_per_address=1, uncounted=["*"])
    ones = [Waiting(), Waiting()]
    for one in ones:
        open_.add(one, "192.0.2.1")
    assert not any(one.is_closed for one in ones)


# ---- descriptors -----------------------------------------------------------------------------------------------------


@pytest.fixture
def file_limit() -> Iterator[tuple[int, int]]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield before
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_limit_of_open_files_is_raised(file_limit: tuple[int, int]) -> None:
    hard = file_limit[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    raised = raise_file_limit()
    assert raised == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert raised == (65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536))
    assert raise_file_limit() == raised


def test_connections_leave_files_for_the_server(caplog: pytest.LogCaptureFixture) -> None:
    assert connection_limit(2000, 65_536) == 2000
    assert caplog.text == ""
    assert connection_limit(2000, 1024) == 1024 - connections.BACKLOG - connections._RESERVED_FILES
    assert "LimitNOFILE" in caplog.text
    assert connection_limit(2000, 64) == 16


# ---- over sockets ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(
        tmp_path_factory.mktemp("connections"), max_connections=20, head_seconds=0.5, silent_seconds=0.5
    ) as served:
        yield served


@contextlib.contextmanager
def connected(server: Served, count: int = 1, sends: bytes = b"") -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        made = []
        for _ in range(count):
            one = stack.enter_context(socket.create_connection(address_of(server), timeout=PATIENCE_SECONDS))
            one.sendall(sends)
            made.append(one)
        yield made


def address_of(server: Served) -> tuple[str, int]:
    url = httpx.URL(server.url)
    assert url.port is not None
    return url.host, url.port


def rest_of(connection: socket.socket) -> bytes:
    """Read the rest until the server closes."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65_536):
            data += piece
    return data


def refused_with(answer: bytes, status: int) -> str:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), answer
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code", "values"}
    return error["code"]


def test_more_idle_connections_than_there_may_be_keep_nobody_out(server: Served) -> None:
    with connected(server, 60) as idle:
        for _ in range(3):
            assert httpx.get(f"{server.url}/health", trust_env=False, timeout=PATIENCE_SECONDS).status_code == 200
        assert rest_of(idle[0]) == b""  # closed: the one that waited longest
        with connected(server, 60, BEGINNING):
            assert httpx.get(f"{server.url}/health", trust_env=False, timeout=PATIENCE_SECONDS).status_code == 200


def test_a_head_that_does_not_come_is_not_waited_for(server: Served) -> None:
    for beginning in (BEGINNING, b"G", BEGINNING + b"X: y"):
        with connected(server, 1, beginning) as [one]:
            assert refused_with(rest_of(one), 408) == "request_timeout"
    with connected(server) as [one]:
        assert rest_of(one) == b""


def test_a_head_that_comes_byte_by_byte_has_no_more_time(server: Served) -> None:
    with connected(server) as [one]:
        answer = b""
        end = time.monotonic() + PATIENCE_SECONDS
        one.settimeout(0.05)
        while not answer:
            assert time.monotonic() < end, "it is waited for"
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                one.sendall(b"X")
            with contextlib.suppress(TimeoutError):
                answer = one.recv(65_536)
        assert refused_with(answer, 408) == "request_timeout"


def test_a_second_head_has_no_more_time_than_the_first(server: Served) -> None:
    with connected(server, 1, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n") as [one]:
        answer = b""
        while not answer.endswith(b"}"):
            answer += one.recv(65_536)
        one.sendall(b"GET /health HT")
        assert b"408 Request Timeout" in rest_of(one)


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=x"])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_does_not_come_is_not_waited_for(server: Served, kind: str, chunked: bool) -> None:
    size = b"Transfer-Encoding: chunked\r\n" if chunked else b"Content-Length: 1000\r\n"
    head = b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Type: " + kind.encode() + b"\r\n" + size
    body = b"3\r\n--x\r\n" if chunked else b"--x\r"
    with connected(server, 1, head + b"\r\n" + body) as [one]:
        assert refused_with(rest_of(one), 408) == "request_timeout"
    assert not list(server.service.spool.folder.iterdir())


def test_a_body_that_comes_byte_by_byte_is_too_slow(server: Served) -> None:
    with connected(server, 1, BEGINNING + b"Content-Length: 100000\r\n\r\n") as [one]:
        answer = b""
        end = time.monotonic() + PATIENCE_SECONDS
        one.settimeout(0.05)
        while not answer.endswith(b"}"):
            assert time.monotonic() < end, "it is waited for"
            if not answer:  # its head and its body may come one after the other
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    one.sendall(b" ")
            with contextlib.suppress(TimeoutError):
                answer += one.recv(65_536)
        assert refused_with(answer, 408) == "request_timeout"


def test_a_body_in_pieces_is_taken(server: Served) -> None:
    body = json.dumps({"prompt": "a duck"}).encode()
    with connected(server, 1, BEGINNING + b"Content-Length: %d\r\n\r\n" % len(body)) as [one]:
        for start in range(0, len(body), 5):
            one.sendall(body[start : start + 5])
        assert one.recv(65_536).startswith(b"HTTP/1.1 200")


def test_an_answer_that_nobody_takes_is_let_go(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    id = server.create()["id"]
    job = server.ended(id)
    assert job["status"] == "completed"
    key = server.job(id).results["video"]
    server.service.files.put_bytes(key, b"x" * 30 * 2**20)  # more than sockets hold
    monkeypatch.setattr(server.service.integrity, "is_intact", lambda *_: True)
    request = f"GET /v1/videos/{id}/content HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    with connected(server, 1, request) as [one]:
        for is_answered in (True, False):  # it is begun, and then let go
            end = time.monotonic() + PATIENCE_SECONDS
            while (len(server.limits) > len(server.limits.idle)) != is_answered:
                assert time.monotonic() < end, "it is not begun" if is_answered else "it is waited for"
                time.sleep(0.05)
        assert len(rest_of(one)) < 30 * 2**20


def test_a_client_that_follows_a_job_is_not_disconnected(server: Served) -> None:
    """Longer than for a head, a body or an answer: nothing is sent, and nothing has to be."""
    id = server.create(prompt="wait")["id"]
    with server.http.stream("GET", f"/v1/videos/{id}/events") as stream:
        lines = stream.iter_lines()
        next(lines)
        time.sleep(1.2)
        server.executor.gate.set()
        assert any('"completed"' in line for line in lines)


def test_a_connection_that_is_kept_may_wait_for_its_next_request(server: Served) -> None:
    with connected(server) as [one]:
        for _ in range(2):
            one.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                answer += one.recv(65_536)
            assert answer.startswith(b"HTTP/1.1 200")
            time.sleep(1.2)


def use_parser(parser: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from uvicorn.protocols.http import auto

    if parser == "httptools":
        pytest.importorskip("httptools")
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol as Protocol
    else:
        from uvicorn.protocols.http.h11_impl import H11Protocol as Protocol
    monkeypatch.setattr(auto, "AutoHTTPProtocol", Protocol)


@pytest.mark.parametrize("parser", ["h11", "httptools"])
def test_both_of_uvicorns_parsers_take_the_limits(parser: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_parser(parser, monkeypatch)
    with serving(tmp_path, max_connections=16, head_seconds=0.3, silent_seconds=0.3) as server:
        with connected(server, 1, BEGINNING) as [one]:
            assert refused_with(rest_of(one), 408) == "request_timeout"
        with connected(server, 40):
            assert httpx.get(f"{server.url}/health", trust_env=False, timeout=PATIENCE_SECONDS).status_code == 200


def test_without_idle_connections_a_new_one_is_refused_with_503(tmp_path: Path) -> None:
    with serving(tmp_path, max_connections=16) as server:
        id = server.create(prompt="wait")["id"]
        request = f"GET /v1/videos/{id}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        server.http.close()
        with connected(server, 16, request) as following:
            for one in following:
                assert one.recv(100).startswith(b"HTTP/1.1 200")
            with connected(server) as [late]:
                assert refused_with(rest_of(late), 503) == "too_many_connections"


@pytest.mark.parametrize("kind", ["no key", "another host", "too large"])
@pytest.mark.parametrize("parser", ["h11", "httptools"])
def test_refused_clients_take_no_place_from_others(
    parser: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest of their bodies is waited for as long as the test runs, and some of it comes."""
    use_parser(parser, monkeypatch)
    keys = ("a-key-of-somebody",) if kind == "no key" else ()
    head = BEGINNING.replace(b"localhost", b"elsewhere.example") if kind == "another host" else BEGINNING
    length = b"Content-Length: %d\r\n\r\n" % (10**12 if kind == "too large" else 1000)
    limits = {"max_connections": 16, "silent_seconds": PATIENCE_SECONDS, "drain_seconds": 2 * PATIENCE_SECONDS}
    with serving(tmp_path, api_keys=keys, **limits) as server:
        server.http.close()
        with connected(server, 16, head + length) as refused:
            wait_until(lambda: len(server.limits) == 16 and len(server.limits.idle) == 16)
            for one in refused:
                one.sendall(b"{")
            for _ in range(20):
                answer = httpx.get(f"{server.url}/health", trust_env=False, timeout=PATIENCE_SECONDS)
                assert answer.status_code == 200


def wait_until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not is_so():
        assert time.monotonic() < end, "it is waited for"
        time.sleep(0.01)


def test_a_transport_that_is_gone_before_it_is_made_is_no_error() -> None:
    async def run() -> None:
        open_ = limits()
        open_.remove(Waiting())
        open_.mark_busy(Waiting())
        open_.mark_idle(Waiting())
        assert len(open_) == 0
        assert not open_.idle

    asyncio.run(run())
