"""One stream tells an owner all that happens to its jobs, whoever changes them, and is read once for all."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from api_samples import Served, refusal, serving
from queue_samples import new_job
from server_samples import open_all, quick_settings, wait_until

from pusa.server.errors import ServiceError
from pusa.server.events import EventFeed
from pusa.server.jobs.queue import JobQueue, QueueUnavailable
from pusa.server.jobs.store import FileStore
from pusa.server.readiness import ServerState

ANNS, BOBS = "anns-key-0123456789", "bobs-key-0123456789"


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[tuple[JobQueue, FileStore]]:
    queue, files = open_all(quick_settings(tmp_path))
    yield queue, files
    queue.close()


class Stream:
    """Follow an owner and keep what came."""

    def __init__(self, feed: EventFeed, owner: str = "", is_allowed: Callable[[], bool] = lambda: True) -> None:
        async def may_go_on() -> bool:
            return is_allowed()

        self.events: list[tuple[str, Any]] = []
        self.comments = 0
        self.text = self._rest = b""
        self._texts = feed.follow(owner, may_go_on)
        self.task = asyncio.ensure_future(self._read())

    async def _read(self) -> None:
        async for text in self._texts:
            self.comments += text.count(b": still here")
            self.text += text
            whole, end, self._rest = (self._rest + text).rpartition(b"\n\n")
            self.events += parsed((whole + end).decode())

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                await asyncio.sleep(0.01)

    def named(self, name: str) -> list[Any]:
        return [data for found, data in self.events if found == name]

    async def leave(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        await self._texts.aclose()


def parsed(text: str) -> list[tuple[str, Any]]:
    found = []
    for block in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if "event" in lines:
            found.append((lines["event"], json.loads(lines["data"])))
    return found


def make_feed(queue: JobQueue, files: FileStore, **options: Any) -> EventFeed:
    state = ServerState(True, "ready", 100.0, "tiny", "ready")
    return EventFeed(queue, files, options.pop("readiness", lambda: state), lambda: False, **options)


def submit(queue: JobQueue, owner: str = "", **changes: Any) -> str:
    return queue.submit(new_job(owner=owner, **changes))[0].id


def test_a_stream_begins_with_what_there_is_and_goes_on_with_each_change(opened, tmp_path):
    queue, files = opened
    other, _ = open_all(quick_settings(tmp_path))
    done = submit(queue)
    queue.finish(queue.claim("w", lease_seconds=60), results={"video": "v"}, timings={})

    async def follow() -> None:
        stream = Stream(make_feed(queue, files))
        await stream.until(lambda: stream.named("ready"))
        assert [name for name, _ in stream.events] == ["videos", "ready"]
        assert [video["id"] for video in stream.named("videos")[0]["data"]] == [done]

        def last(id: str) -> dict[str, Any]:
            return next((video for video in reversed(stream.named("video")) if video["id"] == id), {})

        first, second = submit(other, batch="b"), submit(other)
        await stream.until(lambda: last(second))
        assert (last(first)["queue_position"], last(second)["queue_position"]) == (0, 1)
        assert last(first)["batch"] == "b"
        other.move(second, before=first)
        await stream.until(lambda: last(second)["queue_position"] == 0 and last(first)["queue_position"] == 1)
        files.put_bytes(f"previews/{second}.webp", b"picture")
        job = other.claim("w", lease_seconds=60)
        await stream.until(lambda: last(second)["status"] == "in_progress" and stream.named("preview"))
        assert stream.named("preview") == [{"id": second, "image": "data:image/webp;base64,cGljdHVyZQ=="}]
        await stream.until(lambda: last(first)["queue_position"] == 0)
        other.heartbeat(job, lease_seconds=60, step=1, steps=2)
        await stream.until(lambda: last(second)["step"] == 1)
        other.finish(job, results={"video": "v2"}, timings={})
        await stream.until(lambda: last(second)["status"] == "completed")
        assert last(second)["has"] == ["video"]
        other.update(done, favourite=True)
        await stream.until(lambda: last(done).get("favourite"))
        other.remove(done, undo_seconds=30)
        await stream.until(lambda: {"id": done} in stream.named("deleted"))
        count = len(stream.named("video"))
        other.restore(done)
        await stream.until(lambda: len(stream.named("video")) > count)
        other.delete(first)
        await stream.until(lambda: {"id": first} in stream.named("deleted"))
        assert len(stream.named("preview")) == 1
        await stream.leave()

    asyncio.run(follow())
    other.close()


def test_a_change_is_read_once_for_all_streams_and_each_owner_sees_its_own(opened):
    queue, files = opened
    reads: list[str] = []

    def count(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        if statement.startswith("SELECT"):
            reads.append(statement)

    async def follow() -> None:
        feed = make_feed(queue, files)
        owners = {"a": [Stream(feed, "a") for _ in range(40)], "b": [Stream(feed, "b") for _ in range(40)]}
        streams = owners["a"] + owners["b"]
        for stream in streams:
            await stream.until(lambda stream=stream: stream.named("ready"))
        sa.event.listen(queue.engine, "before_cursor_execute", count)
        changes = 5
        ids = []
        for number in range(1, changes + 1):
            before = len(reads)
            ids.append(submit(queue, "a"))
            wrote = len(reads) - before
            for stream in owners["a"]:
                await stream.until(lambda stream=stream, number=number: len(stream.named("video")) == number)
            del reads[before : before + wrote]
        assert len(reads) <= 3 * (changes + 3)  # changes, the unfinished, these; a look now and then for others
        sa.event.remove(queue.engine, "before_cursor_execute", count)
        assert all([video["id"] for video in stream.named("video")] == ids for stream in owners["a"])
        assert not any(stream.named("video") for stream in owners["b"])
        for stream in streams:
            await stream.leave()
        assert not feed._channels
        await streams[0].until(lambda: feed._reader is not None and feed._reader.done())

    asyncio.run(follow())


def test_streams_that_begin_together_share_one_read_and_miss_nothing(opened, monkeypatch):
    queue, files = opened
    reads = []
    jobs_of = queue.jobs_of
    monkeypatch.setattr(queue, "jobs_of", lambda *arguments: reads.append(arguments) or jobs_of(*arguments))

    async def follow() -> None:
        feed = make_feed(queue, files)
        streams, ids = [], []
        for number in range(60):
            streams.append(Stream(feed))
            if number % 6 == 0:
                ids.append(submit(queue))
                await asyncio.sleep(0.03)
        for stream in streams:
            await stream.until(lambda stream=stream: known(stream) == set(ids))
        assert len(reads) < len(streams)
        for stream in streams:
            await stream.leave()

    def known(stream: Stream) -> set[str]:
        begun = {video["id"] for videos in stream.named("videos") for video in videos["data"]}
        return begun | {video["id"] for video in stream.named("video")}

    asyncio.run(follow())


def test_who_is_too_slow_begins_again(opened, monkeypatch):
    queue, files = opened
    monkeypatch.setattr("pusa.server.events._MOST_EVENTS", 3)

    async def follow() -> None:
        feed = make_feed(queue, files)
        slow: AsyncIterator[bytes] = feed.follow("", lambda: True)
        quick = Stream(feed)
        assert (await anext(slow)).startswith(b"retry: ")
        assert parsed((await anext(slow)).decode())[0] == ("videos", {"data": []})
        ids = []
        for number in range(1, 6):
            ids.append(submit(queue))
            await quick.until(lambda number=number: len(quick.named("video")) == number)
        [(name, data), *_] = parsed((await anext(slow)).decode())
        assert name == "videos"
        assert [video["id"] for video in data["data"]] == ids[::-1]
        await slow.aclose()
        await quick.leave()

    asyncio.run(follow())


def test_a_client_that_takes_nothing_holds_one_piece_of_what_is_sent(opened, monkeypatch):
    queue, files = opened
    monkeypatch.setattr("pusa.server.events._PIECE_BYTES", 1000)
    monkeypatch.setattr("pusa.server.events._MOST_BYTES", 20_000)
    ids = [submit(queue, prompt=f"{number} " + "long " * 500) for number in range(2)]

    async def follow() -> None:
        feed = make_feed(queue, files)
        slow, quick = feed.follow("", lambda: True), Stream(feed)
        texts = [await anext(slow), await anext(slow)]
        for number in range(1, 6):
            for id in ids:
                queue.update(id, favourite=number % 2 == 0)
            await quick.until(lambda number=number: quick.text.count(b"event: video\n") == len(ids) * number)
        [channel] = feed._channels.values()
        assert channel.held_bytes == sum(map(len, channel.events)) <= 20_000
        while b"".join(texts).count(b"event: ready") < 2:  # it has missed some, and begins again
            texts.append(await anext(slow))
        assert max(map(len, texts)) <= 1000
        names = [name for name, _ in parsed(b"".join(texts).decode())]
        assert [name for name in names if name != "video"] == ["videos", "ready"] * 2
        await slow.aclose()
        await quick.leave()

    asyncio.run(follow())


def test_all_unfinished_jobs_and_the_newest_others_are_what_it_begins_with(opened, monkeypatch):
    queue, files = opened
    monkeypatch.setattr("pusa.server.events.NEWEST", 3)
    old = submit(queue)
    ended = [submit(queue) for _ in range(5)]
    for id in ended:
        queue.cancel(id)
    gone = submit(queue)
    queue.remove(gone, undo_seconds=9)

    async def follow() -> None:
        stream = Stream(make_feed(queue, files))
        await stream.until(lambda: stream.named("videos"))
        assert [video["id"] for video in stream.named("videos")[0]["data"]] == [*ended[:-4:-1], old]
        await stream.leave()

    asyncio.run(follow())


def test_the_state_of_the_workers_comes_when_it_changes(opened):
    queue, files = opened
    states = [ServerState(False, "load", 10.0, "tiny", "loading")]

    async def follow() -> None:
        stream = Stream(make_feed(queue, files, readiness=lambda: states[-1]))
        await stream.until(lambda: stream.named("ready"))
        states.append(ServerState(True, "ready", 100.0, "tiny", "ready"))
        await stream.until(lambda: len(stream.named("ready")) == 2)
        submit(queue)
        await stream.until(lambda: stream.named("video"))
        assert [state["percent"] for state in stream.named("ready")] == [10.0, 100.0]
        await stream.leave()

    asyncio.run(follow())


def test_a_lost_database_ends_the_streams_and_refuses_new_ones(opened, monkeypatch):
    queue, files = opened

    async def follow() -> None:
        feed = make_feed(queue, files)
        streams = [Stream(feed) for _ in range(3)]
        for stream in streams:
            await stream.until(lambda stream=stream: stream.named("ready"))
        with monkeypatch.context() as patch:
            patch.setattr(queue, "look", lambda *_: (_ for _ in ()).throw(QueueUnavailable("away")))
            await asyncio.wait_for(asyncio.gather(*(stream.task for stream in streams)), 30)
            assert all(stream.named("end") == [{"reason": "unavailable"}] for stream in streams)
            with pytest.raises(ServiceError, match="cannot be reached"):
                await anext(feed.follow("", lambda: True))
        again = Stream(feed)
        id = submit(queue)
        await again.until(lambda: id in str(again.events))
        await again.leave()

    asyncio.run(follow())


def test_a_quiet_stream_is_kept_alive_and_ends_when_its_key_is_removed(opened):
    queue, files = opened
    valid = [True]

    async def follow() -> None:
        stream = Stream(make_feed(queue, files, keep_alive_seconds=0.05), is_allowed=lambda: valid[-1])
        await stream.until(lambda: stream.comments > 1)
        valid.append(False)
        await asyncio.wait_for(stream.task, 30)
        assert stream.events[-1] == ("end", {"reason": "signed_out"})

    asyncio.run(follow())


# ---- over HTTP -------------------------------------------------------------------------------------------------------


@contextmanager
def listening(server: Served, **headers: str) -> Iterator[list[tuple[str, Any]]]:
    """Collect the events of a stream meanwhile."""
    events: list[tuple[str, Any]] = []
    ends = threading.Event()

    def read(response: httpx.Response) -> None:
        name = ""
        for line in response.iter_lines():
            key, _, value = line.partition(": ")
            if key == "event":
                name = value
            elif key == "data":
                events.append((name, json.loads(value)))
            if ends.is_set():
                return

    with (
        httpx.Client(base_url=server.url, timeout=30, trust_env=False, headers=headers) as client,
        client.stream("GET", "/v1/events") as response,
    ):
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-store"
        thread = threading.Thread(target=read, args=(response,), daemon=True)
        thread.start()
        yield events
        ends.set()
        client.post("/v1/videos", json={"prompt": "a last one, so that the reader looks up"}, headers=headers)
        thread.join(20)
        assert not thread.is_alive()


def test_every_tab_and_device_of_a_key_hears_of_its_jobs(tmp_path):
    with serving(tmp_path, api_keys=(ANNS, BOBS)) as server:
        ann, bob = ({"authorization": f"Bearer {key}"} for key in (ANNS, BOBS))
        with listening(server, **ann) as one, listening(server, **ann) as two, listening(server, **bob) as bobs:
            wait_until(lambda: all(len(events) >= 2 for events in (one, two, bobs)))
            id = server.http.post("/v1/videos", json={"prompt": "a duck"}, headers=ann).json()["id"]

            def completed(events: list[tuple[str, Any]]) -> bool:
                return any(data.get("status") == "completed" for name, data in events if name == "video")

            wait_until(lambda: completed(one) and completed(two))
            assert server.http.delete(f"/v1/videos/{id}", headers=ann).status_code == 200
            wait_until(lambda: all(("deleted", {"id": id}) in events for events in (one, two)))
            assert {name for name, _ in bobs} == {"videos", "ready"}
            assert id not in str(bobs)


def test_a_key_has_so_many_streams(tmp_path):
    with serving(tmp_path, workers=0, api_keys=(ANNS,), key_stream_limit=1) as server:
        headers = {"authorization": f"Bearer {ANNS}"}
        with listening(server, **headers) as events:
            wait_until(lambda: events)
            answer = server.http.get("/v1/events", headers=headers)
            assert refusal(answer, 429)["code"] == "too_many_streams"
        wait_until(lambda: not server.service._streams)


def test_a_server_that_stops_says_so(tmp_path):
    with serving(tmp_path, workers=0) as server, server.http.stream("GET", "/v1/events") as response:
        lines = response.iter_lines()
        assert next(lines).startswith("retry: ")
        stopped_at = time.monotonic()
        server.app.state.stop()
        assert 'data: {"reason": "shutdown"}' in list(lines)
        assert time.monotonic() - stopped_at < 20
