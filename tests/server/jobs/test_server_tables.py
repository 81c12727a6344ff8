"""The cost of a call does not grow with the table: every statement has an index, and reads what it needs."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from queue_samples import Clock, new_job

from pusa.server.jobs.housekeeping import Housekeeping, expire, remove_files, sweep_orphans
from pusa.server.jobs.queue import FileDigest, Job, JobFilter, JobQueue, new_id
from pusa.server.jobs.store import FileStore


@pytest.fixture
def files(tmp_path: Path) -> FileStore:
    return FileStore(str(tmp_path / "files"))


def completed(queue: JobQueue, clock: Clock, **changes: Any) -> Job:
    id = new_id()
    queue.submit(new_job(id=id, inputs=(f"inputs/{id}/0.png",), **changes))
    job = queue.claim("one", lease_seconds=60)
    queue.finish(job, results={"video": f"results/{id}/1/video.mp4"}, timings={}, expires_at=clock.now + 10)
    return job


@contextmanager
def statements(queue: JobQueue) -> Iterator[list[tuple[str, Any, int]]]:
    """Record what the queue executes meanwhile: statement, parameters and number of rows."""
    found: list[tuple[str, Any, int]] = []

    def after(connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        if statement.split()[0] in ("SELECT", "UPDATE", "DELETE"):
            found.append((statement, parameters, cursor.rowcount))

    sa.event.listen(queue.engine, "after_cursor_execute", after)
    try:
        yield found
    finally:
        sa.event.remove(queue.engine, "after_cursor_execute", after)


def scans(queue: JobQueue, found: list[tuple[str, Any, int]]) -> list[tuple[str, str]]:
    """Statements that read a whole table or a whole index of jobs or their files, with the line of the plan."""
    bad = []
    is_sqlite = queue.engine.dialect.name == "sqlite"
    with queue.engine.connect() as connection:
        if not is_sqlite:  # a table of a few rows is read whole, index or not
            connection.exec_driver_sql("SET enable_seqscan = off")
        for statement, parameters, _ in found:
            if is_sqlite:
                rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
                plan = [row[-1] for row in rows]
                if plan == ["SCAN jobs"] and "WHERE" not in statement and "LIMIT" in statement:
                    continue  # in the order of the rows, up to the limit
                bad += [(statement, line) for line in plan if line.startswith(("SCAN jobs", "SCAN job_"))]
            else:
                plan = [row[0] for row in connection.exec_driver_sql(f"EXPLAIN {statement}", parameters)]
                bad += [(statement, line) for line in plan if "Seq Scan on job" in line]
        connection.rollback()
    return bad


def test_no_call_reads_the_whole_table(queue, clock, files):
    first, old = completed(queue, clock), completed(queue, clock, owner="a")
    failed, _ = queue.submit(new_job(owner="a"))
    queue.fail(queue.claim("one", lease_seconds=60), "x", "x", retry=False)
    with statements(queue) as found:
        waiting, _ = queue.submit(new_job(owner="a", idempotency_key="k", fingerprint="f"), total_limit=9, key_limit=9)
        queue.submit(new_job(owner="a", fingerprint="f"), same_fingerprint_seconds=60)
        queue.get(waiting.id, "a")
        queue.page(), queue.page("a"), queue.page("a", after=waiting.id, order="asc")
        queue.page("a", statuses=("failed", "cancelled"))
        queue.page("a", filter=JobFilter(favourite=True)), queue.page("a", filter=JobFilter(batch="b"))
        queue.page("a", filter=JobFilter(words="ball", task="generate"))
        queue.jobs_of("a", 50)
        queue.position(waiting.id)
        queue.count_unfinished(), queue.seconds_per_job()
        queue.read_changes({waiting.id: waiting, failed.id: failed})
        look = queue.look(None, ())
        queue.update(waiting.id, favourite=True), queue.move(waiting.id, before=None)
        queue.remove(failed.id, undo_seconds=9), queue.restore(failed.id), queue.cancel_all("b")
        assert queue.look(look, ("a",)).changed
        job = queue.claim("one", lease_seconds=60)
        queue.heartbeat(job, lease_seconds=60, checkpoint="c", checkpoint_step=1, checkpoint_digest=FileDigest(1, "a"))
        queue.digest(job.id, "c")
        queue.release(job)
        queue.cancel(job.id)
        queue.restart(job.id)
        queue.recover_overdue(), queue.release_leases_of("host/")
        deleted = queue.delete(first.id)
        remove_files(queue, files, [deleted])
        files.put_bytes(f"inputs/{new_id()}/0.png", b"x")
        files.put_bytes(f"previews/{new_id()}.webp", b"x")
        assert sweep_orphans(queue, files, now=clock.now + 2e9, older_than_seconds=60) == 2
        assert expire(queue, files, now=clock.now + 60, keep_seconds=30) == 2
        queue.forget_deleted(clock.now)
    assert queue.get(old.id) is None
    assert len(found) > 60
    assert scans(queue, found) == []


@pytest.mark.parametrize("jobs", [3, 30])
def test_deleting_a_job_reads_its_own_rows_however_many_there_are(queue, clock, files, jobs):
    made = [completed(queue, clock) for _ in range(jobs)]
    with statements(queue) as found:
        remove_files(queue, files, [queue.delete(made[0].id)])
    selected = [(statement, rows) for statement, _, rows in found if statement.startswith("SELECT")]
    assert len(found) <= 5  # with PostgreSQL's lock
    assert sum(rows for _, rows in selected if rows > 0) <= 2


def test_expiry_reads_no_more_than_its_limit(queue, clock, files):
    made = [completed(queue, clock) for _ in range(12)]
    with statements(queue) as found:
        assert expire(queue, files, now=clock.now + 60, keep_seconds=None, limit=5) == 5
    assert "LIMIT" in next(statement for statement, *_ in found)
    left = queue.page(order="asc", limit=100)[0]
    assert [job.id for job in left] == [job.id for job in made[5:]]


def test_a_job_that_was_queued_again_meanwhile_does_not_expire(queue, clock, files, monkeypatch):
    failed, _ = queue.submit(new_job())
    queue.fail(queue.claim("one", lease_seconds=60), "x", "x", retry=False)
    listed = queue.expired

    def then_restarted(*arguments: Any, **options: Any) -> list[Job]:
        jobs = listed(*arguments, **options)
        queue.restart(failed.id)
        return jobs

    monkeypatch.setattr(queue, "expired", then_restarted)
    expire(queue, files, now=clock.now + 60, keep_seconds=30)
    assert queue.get(failed.id).status == "queued"


def test_a_sweep_in_parts_looks_at_every_file_once(queue, files, clock):
    lost = {f"inputs/{new_id()}/{n}.png" for n in range(25)}
    for key in lost:
        files.put_bytes(key, b"x")
    clock.now = 2e9
    keeper = Housekeeping(queue, files, clock=clock, first_seconds=0.0, most_listed=10)
    assert [keeper.round().orphans for _ in range(4)] == [10, 10, 5, 0]
    assert [key for key, _ in files.keys("inputs")] == []


def test_a_plan_that_scans_is_found(queue):
    with statements(queue) as found, queue.engine.connect() as connection:
        connection.execute(sa.text("SELECT * FROM jobs WHERE prompt = 'x'")).all()
    if queue.engine.dialect.name == "sqlite":
        assert "SCAN jobs" in scans(queue, found)[0][1]
    else:
        assert "Seq Scan on jobs" in scans(queue, found)[0][1]
