"""However many follow jobs, a change is read once."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from api_samples import refusal, serving
from server_samples import open_all, quick_settings, submit, wait_until

from pusa.server.errors import ServiceError
from pusa.server.feed import JobFeed, Snapshot
from pusa.server.jobs.queue import Job, JobQueue, QueueUnavailable


@pytest.fixture
def queue(tmp_path: Path) -> JobQueue:
    queue, _ = open_all(quick_settings(tmp_path))
    return queue


async def until(condition: Any, seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def followed(feed: JobFeed, job: Job, seen: list[Job]) -> None:
    async for snapshot in feed.follow(job):
        seen.append(snapshot.job)


def test_a_change_is_read_once_for_all_who_follow(queue):
    reads: list[str] = []

    def count(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        if statement.startswith("SELECT"):
            reads.append(statement)

    async def follow() -> None:
        jobs = [submit(queue, n=n) for n in range(20)]
        seen: list[list[Job]] = [[] for _ in range(100)]
        feed = JobFeed(queue, lambda: False)
        tasks = [asyncio.ensure_future(followed(feed, jobs[n % 20], seen[n])) for n in range(100)]
        await until(lambda: all(seen))
        running = queue.claim("one", lease_seconds=60)
        await until(lambda: all(len(seen[n]) == 2 for n in range(0, 100, 20)))
        sa.event.listen(queue.engine, "before_cursor_execute", count)
        changes = 5
        for step in range(1, changes + 1):
            queue.heartbeat(running, lease_seconds=60, step=step)
            await until(lambda step=step: all(seen[n][-1].step == step for n in range(0, 100, 20)))
        sa.event.remove(queue.engine, "before_cursor_execute", count)
        assert len(reads) <= 2 * changes + 4  # which have changed, and these; a look now and then for other processes
        assert all(len(seen[n]) == 1 for n in range(100) if n % 20)  # others are not woken
        queue.finish(running, results={}, timings={})
        for job in jobs[1:]:
            queue.delete(job.id)
        await asyncio.wait_for(asyncio.gather(*tasks), 30)
        assert {seen[n][-1].status for n in range(0, 100, 20)} == {"completed"}
        assert not feed._followed

    asyncio.run(follow())
    queue.close()


def test_changes_by_other_processes_are_found(tmp_path, queue):
    other, _ = open_all(quick_settings(tmp_path))

    async def follow() -> None:
        job, seen = submit(queue), list[Job]()
        task = asyncio.ensure_future(followed(JobFeed(queue, lambda: False), job, seen))
        await until(lambda: seen)
        other.cancel(job.id)
        await asyncio.wait_for(task, 30)
        assert [job.status for job in seen] == ["queued", "cancelled"]

    asyncio.run(follow())
    queue.close(), other.close()


def test_what_is_made_of_a_snapshot_is_made_once(queue):
    made: list[str] = []

    async def make(job: Job) -> str:
        made.append(job.id)
        await asyncio.sleep(0.01)
        return job.id.upper()

    async def ask() -> None:
        snapshot = Snapshot(submit(queue))
        answers = await asyncio.gather(*(snapshot.once("text", make) for _ in range(50)))
        assert set(answers) == {snapshot.job.id.upper()}

    asyncio.run(ask())
    assert len(made) == 1
    queue.close()


def test_a_stop_and_a_lost_database_end_all_streams(queue, monkeypatch):
    stopping = []

    async def follow() -> None:
        feed = JobFeed(queue, lambda: bool(stopping))
        job = submit(queue)
        tasks = [asyncio.ensure_future(followed(feed, job, [])) for _ in range(3)]
        await asyncio.sleep(0.05)
        monkeypatch.setattr(queue, "read_changes", lambda known: (_ for _ in ()).throw(QueueUnavailable("away")))
        queue.cancel(job.id)
        ends = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 30)
        assert [type(end) for end in ends] == [ServiceError] * 3
        monkeypatch.undo()
        waiting = submit(queue)
        tasks = [asyncio.ensure_future(followed(feed, waiting, [])) for _ in range(3)]
        await asyncio.sleep(0.05)
        stopping.append(True)
        assert await asyncio.wait_for(asyncio.gather(*tasks), 30) == [None] * 3

    asyncio.run(follow())
    queue.close()


def test_who_comes_and_goes_leaves_nothing_behind(queue):
    async def follow() -> None:
        feed, job = JobFeed(queue, lambda: False), submit(queue)
        for _ in range(5):
            snapshots: AsyncIterator[Snapshot] = feed.follow(job)
            assert (await anext(snapshots)).job == job
            await snapshots.aclose()  # type: ignore[attr-defined]
        assert not feed._followed
        await until(lambda: feed._reader is not None and feed._reader.done())

    asyncio.run(follow())
    queue.close()


def test_one_key_has_so_many_streams_and_another_has_its_own(tmp_path):
    keys = ("a" * 20, "b" * 20)
    with serving(tmp_path, workers=0, api_keys=keys, key_stream_limit=2) as server:
        headers = [{"authorization": f"Bearer {key}"} for key in keys]
        ids = [server.http.post("/v1/videos", json={"prompt": "a"}, headers=h).json()["id"] for h in headers]
        path = "/v1/videos/{}/events"
        with (
            server.http.stream("GET", path.format(ids[0]), headers=headers[0]) as one,
            server.http.stream("GET", path.format(ids[0]), headers=headers[0]) as two,
        ):
            lines = [stream.iter_lines() for stream in (one, two)]  # held: a dropped one closes its stream
            assert [next(of) for of in lines] == ["retry: 2000"] * 2
            answer = server.http.get(path.format(ids[0]), headers=headers[0])
            assert refusal(answer, 429)["code"] == "too_many_streams"
            with server.http.stream("GET", path.format(ids[1]), headers=headers[1]) as theirs:
                assert theirs.status_code == 200
        wait_until(lambda: not server.service._streams)
        with server.http.stream("GET", path.format(ids[0]), headers=headers[0]) as again:
            assert again.status_code == 200
