"""Reserved space stays free while uploads arrive, and text in memory has a limit over all requests."""

import asyncio
import base64
import os
import select
import shutil
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from api_samples import Served, png, refusal, serving
from server_samples import wait_until

from pusa.server.errors import ServiceError
from pusa.server.jobs.store import StorageFullError, StorageUnavailableError
from pusa.server.transfers.reservations import Arrival, DiskSpace, TextMemory

MIB = 2**20
FREE = 400 * MIB


def used_bytes(folder: Path) -> int:
    """Sum the bytes of the spool below a folder, whose files come and go."""
    total = 0
    for path in folder.rglob("uploads/*"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A disk of `free` bytes, less what lies in the spool."""
    disk = SimpleNamespace(free=FREE)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=disk.free - used_bytes(tmp_path)))
    return disk


# ---- the accounts ----


def test_what_is_reserved_counts_as_taken_until_it_is_given_back(tmp_path, disk):
    space = DiskSpace(150 * MIB)
    first = Arrival(space, TextMemory(0), [tmp_path, tmp_path], 100 * MIB)  # spool and store on one disk: twice
    with pytest.raises(StorageFullError, match="200 MiB of disk are free and 150 MiB are to stay so"):
        Arrival(space, TextMemory(0), [tmp_path, tmp_path], 30 * MIB)
    second = Arrival(space, TextMemory(0), [tmp_path], 50 * MIB)
    first.release()
    first.release()
    assert space.reserved_bytes == 50 * MIB
    second.release()
    assert space.reserved_bytes == 0


def test_what_is_written_is_no_longer_reserved_in_the_spool(tmp_path, disk):
    space = DiskSpace(0)
    arrival = Arrival(space, TextMemory(0), [tmp_path, tmp_path], 100)
    arrival.spooled(60)
    assert space.reserved_bytes == 140
    arrival.spooled(60)  # more than was said: the store's part stays
    assert space.reserved_bytes == 100
    arrival.release()
    assert space.reserved_bytes == 0


async def _in_chunks(arrival: Arrival, chunks: int) -> None:
    for _ in range(chunks):
        await arrival.received(MIB // 2)


def test_a_body_without_a_length_reserves_as_it_grows(tmp_path, disk):
    space = DiskSpace(390 * MIB)
    arrival = Arrival(space, TextMemory(0), [tmp_path], None)
    asyncio.run(_in_chunks(arrival, 8))
    assert space.reserved_bytes == 4 * MIB
    with pytest.raises(StorageFullError):
        asyncio.run(_in_chunks(arrival, 40))
    arrival.release()
    assert space.reserved_bytes == 0


def test_a_folder_that_is_gone_is_no_full_disk(tmp_path):
    with pytest.raises(StorageUnavailableError, match="the folder of the server's files is gone: mount its disk"):
        Arrival(DiskSpace(0), TextMemory(0), [tmp_path / "none"], 1)


def test_text_in_memory_is_counted_over_all_requests_but_for_its_beginning(tmp_path):
    memory = TextMemory(MIB)
    arrivals = [Arrival(DiskSpace(0), memory, [tmp_path], 0) for _ in range(40)]
    for arrival in arrivals:
        arrival.hold_text(2**16)  # small requests are never refused
    assert memory.held_bytes == 0
    arrivals[0].hold_text(MIB)
    with pytest.raises(ServiceError, match="requests with 1 MiB of base64 are arriving") as refused:
        arrivals[1].hold_text(1)
    assert (refused.value.status, refused.value.code) == (503, "busy")
    for arrival in arrivals:
        arrival.release()
    assert memory.held_bytes == 0


# ---- the server ----


@pytest.fixture
def server(tmp_path: Path, disk: SimpleNamespace) -> Iterator[Served]:
    with serving(tmp_path, min_free_bytes=150 * MIB, workers=0) as server:
        yield server


def half_sent(server: Served, size: int, *, chunked: bool = False) -> socket.socket:
    """A connection that has sent the first MiB of an upload of `size` bytes and goes on waiting."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    length = "transfer-encoding: chunked" if chunked else f"content-length: {size}"
    head = (
        f"POST /v1/videos HTTP/1.1\r\nhost: {host}\r\ncontent-type: multipart/form-data; boundary=b\r\n{length}\r\n\r\n"
    )
    part = b'--b\r\ncontent-disposition: form-data; name="input_reference"; filename="a"\r\n\r\n' + bytes(MIB)
    connection.sendall(head.encode() + (b"%x\r\n%b\r\n" % (len(part), part) if chunked else part))
    return connection


def test_half_sent_uploads_leave_what_is_to_stay_free(server):
    before = server.service._disk.reserved_bytes
    connections = [half_sent(server, 40 * MIB) for _ in range(3)]  # each needs 80: 240 of the 250 that are left
    wait_until(lambda: server.service._disk.reserved_bytes >= 3 * 78 * MIB)
    refused = half_sent(server, 40 * MIB)
    refused.shutdown(socket.SHUT_WR)
    assert refused.recv(12) == b"HTTP/1.1 507"
    small = server.http.post("/v1/videos", data={"prompt": "a"}, files={"input_reference": ("a.png", png())})
    assert small.status_code == 200, small.text
    for connection in connections:
        connection.close()
    wait_until(lambda: server.service._disk.reserved_bytes == before)
    assert used_bytes(server.service.settings.data_folder) == 0
    refused.close()


def test_uploads_in_chunks_are_refused_when_they_grow_too_large(server, disk):
    disk.free = 160 * MIB
    connection = half_sent(server, 0, chunked=True)
    chunk, sent = b"%x\r\n%b\r\n" % (MIB, bytes(MIB)), 1
    while not select.select([connection], [], [], 0.05)[0] and sent < 100:
        connection.sendall(chunk)
        sent += 1
    assert connection.recv(12) == b"HTTP/1.1 507"
    assert sent < 30  # 10 MiB are free beyond what is to stay, for the spool and the store; some are on their way
    connection.close()
    wait_until(lambda: server.service._disk.reserved_bytes == 0)
    assert used_bytes(server.service.settings.data_folder) == 0


def test_a_request_that_is_refused_gives_its_reservation_back(server):
    refusal(server.http.post("/v1/videos", data={"nonsense": "x"}, files={"input_reference": ("a.png", png())}), 400)
    refusal(server.http.post("/v1/videos", content=b"{", headers={"content-type": "application/json"}), 400)
    wait_until(lambda: server.service._disk.reserved_bytes == 0)
    assert server.service._text_memory.held_bytes == 0


def test_large_base64_bodies_share_one_memory(tmp_path):
    with serving(tmp_path, workers=0) as server:
        server.service._text_memory = TextMemory(MIB)
        url = "data:image/png;base64," + base64.b64encode(os.urandom(2 * MIB)).decode()
        answer = server.http.post("/v1/videos", json={"prompt": "a", "input_reference": url})
        error = refusal(answer, 503)
        assert (error["code"], answer.headers["retry-after"]) == ("busy", "2")
        assert server.http.post("/v1/videos", json={"prompt": "a"}).status_code == 200
        wait_until(lambda: server.service._text_memory.held_bytes == 0)


def test_a_data_folder_that_has_vanished_is_said_and_not_made_anew(tmp_path):
    with serving(tmp_path, workers=0) as server:
        data = server.service.settings.data_folder
        id = server.create()["id"]
        assert server.http.get("/health").status_code == 200
        data.rename(tmp_path / "elsewhere")
        for answer in (
            server.http.get(f"/v1/videos/{id}"),
            server.http.get("/ready"),
            server.http.get("/health"),
            server.http.post("/v1/videos", json={"prompt": "a"}),
        ):
            assert refusal(answer, 503)["code"] in ("queue_unavailable", "storage_unavailable")
        assert not data.exists()
        (tmp_path / "elsewhere").rename(data)
        assert server.http.get(f"/v1/videos/{id}").json()["status"] == "queued"
        assert server.http.get("/health").status_code == 200
        assert server.create()["status"] == "queued"
