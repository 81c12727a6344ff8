"""Measure requests that are made to cost much: large bodies, connections that say nothing or little.

    python benchmarks/hostile_load.py                     # all cases; --case NAME for one, --list for their names

A server with the fake engine, with an API key and 1,024 open files as its limit at the start, as most systems have it.
For each case a fresh one: while the case runs, ``/health`` is asked once every 50 ms on connections of its own, with a
limit of 20 s. Printed are the slowest answer and how many failed, the time of the hostile requests and what they were
answered, the CPU time of the process, its memory before, at most and 2 s after, and the lines of its log. Everything is
on loopback; connections are held for `--seconds`, and the cases come to an end by themselves. The exit status is 1 if
``/health`` has failed or took longer than 0.5 s.
"""

import argparse
import contextlib
import http.client
import json
import multiprocessing
import os
import resource
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
from _support import ServerProcess

GOAL_SECONDS = 0.5
KEY = "a-key-for-the-benchmark"
HEALTH_TIMEOUT_SECONDS = 20.0
OPEN_FILES = 1024
MIB = 2**20
_HEAD = b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
Case = Callable[[str, float], Counter[str]]
_HEADERS = {"authorization": f"Bearer {KEY}"}


class Health:
    """Ask for /health all the while, from a process of its own: the requests of a case would hold up a thread here."""

    def __init__(self, url: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.took_seconds: list[float] = []
        self.failed = 0
        self._stop, self._begun = context.Event(), context.Event()
        self._answers, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=ask_for_health, args=(url, self._begun, self._stop, theirs), daemon=True)

    def __enter__(self) -> "Health":
        self._process.start()
        if not self._begun.wait(60):
            raise RuntimeError("/health was not asked")
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self.took_seconds, self.failed = self._answers.recv()
        self._process.join()


def ask_for_health(url: str, begun: Event, stop: Event, answers: Connection) -> None:
    """Ask every 50 ms until told to stop; then send the seconds that each answer took, and how many failed."""
    address = urlsplit(url)
    took_seconds, failed = [], 0
    while not stop.wait(0.05):
        begun.set()
        start = time.perf_counter()
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=HEALTH_TIMEOUT_SECONDS)
        try:
            connection.request("GET", "/health")
            failed += connection.getresponse().status != 200
        except (OSError, http.client.HTTPException):
            failed += 1
        finally:
            connection.close()
        took_seconds.append(time.perf_counter() - start)
    answers.send((took_seconds, failed))


class Memory:
    """The most that a process holds."""

    def __init__(self, server: ServerProcess) -> None:
        self.server, self.most_mb = server, server.rss_mb()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._stop.wait(0.02):
            with contextlib.suppress(psutil.NoSuchProcess):
                self.most_mb = max(self.most_mb, self.server.rss_mb())

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


# ---- the cases -------------------------------------------------------------------------------------------------------


def post(url: str, path: str = "/v1/videos", **arguments: Any) -> str:
    headers = {**_HEADERS, **arguments.pop("headers", {})}
    try:
        with httpx.Client(base_url=url, timeout=120.0, trust_env=False) as client:
            return str(client.post(path, headers=headers, **arguments).status_code)
    except httpx.TransportError:
        return "closed"


def json_body(body: Callable[[], bytes], path: str = "/v1/videos") -> Case:
    headers = {"content-type": "application/json"}
    return lambda url, _: Counter([post(url, path, content=body(), headers=headers)])


def form_body(body: Callable[[], bytes], fields: int = 1) -> Case:
    return lambda url, _: Counter([post(url, files=[(f"a{n}", (None, body())) for n in range(fields)])])


def file_body(body: Callable[[], bytes]) -> Case:
    return lambda url, _: Counter([post(url, files={"input_reference": ("a.png", body())})])


def several(case: Case, count: int) -> Case:
    def run(url: str, seconds: float) -> Counter[str]:
        found: list[Counter[str]] = []
        threads = [threading.Thread(target=lambda: found.append(case(url, seconds))) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(found, Counter())

    return run


@contextlib.contextmanager
def opened(url: str, count: int, sends: bytes = b"") -> Iterator[list[socket.socket]]:
    """So many connections, as far as the server takes them."""
    port = int(url.rpartition(":")[2])
    with contextlib.ExitStack() as stack:
        made = []
        for _ in range(count):
            with contextlib.suppress(OSError):
                one = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=2))
                one.sendall(sends)
                made.append(one)
        yield made


def held(count: int, sends: bytes = b"", drips: bytes = b"") -> Case:
    """Connections that send this, then a byte of `drips` a second; afterwards, how many are still open."""

    def run(url: str, seconds: float) -> Counter[str]:
        with opened(url, count, sends) as made:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                time.sleep(1.0)
                for one in made if drips else ():
                    with contextlib.suppress(OSError):
                        one.sendall(drips)
            return Counter(_state(one) for one in made)

    return run


def _state(one: socket.socket) -> str:
    one.setblocking(False)
    try:
        answer = one.recv(65_536)
    except BlockingIOError:
        return "open"
    except OSError:
        return "closed"
    return answer[9:12].decode() if answer.startswith(b"HTTP/1.1 ") else "closed"


def half_uploads(count: int, size: int) -> Case:
    """Uploads whose first MiB comes, and the rest never: what they say, and how many are refused at once."""
    head = (
        "POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
        f"Authorization: Bearer {KEY}\r\nContent-Length: {size}\r\n\r\n"
        '--b\r\nContent-Disposition: form-data; name="input_reference"; filename="a"\r\n\r\n'
    )
    return held(count, head.encode() + bytes(MIB))


def wrong_keys(count: int) -> Case:
    """Guess keys, and ask with the right one in between, which must never be refused."""

    def run(url: str, _: float) -> Counter[str]:
        found: Counter[str] = Counter()
        with httpx.Client(base_url=url, timeout=60.0, trust_env=False) as client:
            for number in range(count):
                key = KEY if number % 10 == 9 else f"wrong-{number}"
                answer = client.get("/v1/videos", headers={"authorization": f"Bearer {key}"})
                found[f"{'right' if key == KEY else 'wrong'} key: {answer.status_code}"] += 1
        return found

    return run


def lists(size: int) -> bytes:
    return b"[" + b"[]," * (size // 3) + b"[]]"


def names(size: int) -> bytes:
    return b"{" + b",".join(b'"%07d":1' % number for number in range(size // 12)) + b"}"


def text(piece: bytes, size: int, name: bytes = b"prompt", begins: bytes = b"") -> bytes:
    return b'{"%s": "%s' % (name, begins) + piece * (size // len(piece)) + b'"}'


CASES: dict[str, Case] = {
    "nothing": held(0),
    "8 MiB of [] as JSON": json_body(lambda: lists(8 * MIB)),
    "47 MiB of [] as JSON": json_body(lambda: lists(47 * MIB)),
    "8 MiB of [] in a form": form_body(lambda: lists(8 * MIB)),
    "100 fields of 80 KiB of [] in a form": form_body(lambda: lists(80 * 1024), 100),
    "8 MiB of names as JSON": json_body(lambda: names(8 * MIB)),
    "47 MiB of base64 as JSON": json_body(
        lambda: text(b"QUJD", 47 * MIB, b"input_reference", b"data:image/png;base64,")
    ),
    "12 requests of 47 MiB of base64 at once": several(
        json_body(lambda: text(b"QUJD", 47 * MIB, b"input_reference", b"data:image/png;base64,")), 12
    ),
    "47 MiB of escapes as JSON": json_body(lambda: text(b"\\u4e00", 47 * MIB)),
    "8 requests of 8 MiB of [] at once": several(json_body(lambda: lists(8 * MIB)), 8),
    "64 MiB of line breaks in a file": file_body(lambda: b"\r\n" * (32 * MIB)),
    "200 halves of uploads of 120 MiB": half_uploads(200, 120 * MIB),
    "40 wrong keys": wrong_keys(40),
    "1,300 idle connections": held(1300),
    "900 halves of a head": held(900, _HEAD),
    "300 heads, byte by byte": held(300, _HEAD, b"X"),
    "300 bodies, byte by byte": held(
        300, _HEAD + f"Authorization: Bearer {KEY}\r\nContent-Length: 100000\r\n\r\n".encode(), b" "
    ),
}


def measured(name: str, folder: Path, seconds: float) -> dict[str, Any]:
    server = ServerProcess(folder / "data", fake=True, model="mini", studio="false", api_keys=KEY, min_free_bytes="0")
    with soft_limit(OPEN_FILES):
        server.start()
    server.wait_until_alive()
    try:
        before_mb, before_cpu = server.rss_mb(), server.cpu_seconds()
        began = time.perf_counter()
        with Memory(server) as memory, Health(server.url) as health:
            answers = CASES[name](server.url, seconds)
            took = time.perf_counter() - began
            cpu = server.cpu_seconds() - before_cpu
            time.sleep(2.0)
        return {
            "case": name,
            "health_slowest_seconds": round(max(health.took_seconds), 3),
            "health_failed": health.failed,
            "health_asked": len(health.took_seconds),
            "seconds": round(took, 2),
            "answers": dict(answers),
            "cpu_seconds": round(cpu, 2),
            "rss_mb_before": round(before_mb),
            "rss_mb_most": round(memory.most_mb),
            "rss_mb_after": round(server.rss_mb()),
            "log_lines": len(server.log.read_bytes().splitlines()),
        }
    finally:
        server.__exit__()


@contextlib.contextmanager
def soft_limit(files: int) -> Iterator[None]:
    """Let a child start with this limit of open files; this process has all it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(files, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard) if hard != resource.RLIM_INFINITY else (soft, hard))


def is_good(found: dict[str, Any]) -> bool:
    return found["health_slowest_seconds"] <= GOAL_SECONDS and not found["health_failed"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=list(CASES), help="one case; may be repeated")
    parser.add_argument("--list", action="store_true", help="print the cases' names")
    parser.add_argument("--seconds", type=float, default=40.0, help="for which connections are held")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(CASES))
        return
    results = []
    print(
        f"{'case':<38}{'health, slowest':>16}{'failed':>8}{'CPU':>8}{'MB before, most, after':>24}{'lines':>8}  answers"
    )
    for name in options.case or CASES:
        with tempfile.TemporaryDirectory() as folder:
            found = measured(name, Path(folder), options.seconds)
        results.append(found)
        memory = f"{found['rss_mb_before']}, {found['rss_mb_most']}, {found['rss_mb_after']}"
        print(
            f"{name:<38}{found['health_slowest_seconds']:>14.2f} s{found['health_failed']:>8}"
            f"{found['cpu_seconds']:>6.1f} s{memory:>24}{found['log_lines']:>8}  {found['answers']}",
            flush=True,
        )
    print(json.dumps({"benchmark": "hostile_load", "cores": os.cpu_count(), "results": results}))
    sys.exit(0 if all(map(is_good, results)) else 1)


if __name__ == "__main__":
    main()
