"""Test the database: commits are on disk, writers wait in turn, and a database of another version is left alone."""

import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from queue_samples import new_job

from pusa.server.jobs import database
from pusa.server.jobs.queue import JobQueue, QueueUnavailable, SchemaError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "jobs.sqlite"


@pytest.fixture
def sqlite_url(path: Path) -> str:
    return f"sqlite:///{path}"


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: Any) -> str:
    return request.getfixturevalue(f"{request.param}_url")


# ---- SQLite ----------------------------------------------------------------------------------------------------------


def test_every_connection_of_every_thread_is_durable_and_patient(sqlite_url):
    engine = database.connect(sqlite_url)
    together = threading.Barrier(5)

    def look(_: int) -> tuple[int, tuple[Any, ...]]:
        with engine.connect() as connection:
            together.wait(timeout=30)
            names = ("journal_mode", "synchronous", "busy_timeout", "foreign_keys", "fullfsync")
            values = tuple(connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in names)
            return id(connection.connection.driver_connection), values

    with ThreadPoolExecutor(5) as threads:
        seen = list(threads.map(look, range(5)))
    assert len({connection for connection, _ in seen}) == 5  # none is shared
    assert {values for _, values in seen} == {("wal", 2, 30_000, 1, 1)}
    engine.dispose()


def test_a_writer_waits_for_another_one(sqlite_url, path):
    queue = JobQueue(sqlite_url)
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    threading.Timer(0.3, other.execute, ["COMMIT"]).start()
    began = time.monotonic()
    assert queue.submit(new_job())[1]
    assert time.monotonic() - began > 0.2
    other.close()
    queue.close()


def test_a_busy_database_is_an_error_for_writers_and_readers_go_on(sqlite_url, path, monkeypatch):
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.1)
    queue = JobQueue(sqlite_url)
    job, _ = queue.submit(new_job())
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert queue.get(job.id) == job
    assert queue.claim("one", lease_seconds=1, models=["none"]) is None  # a look is no write
    with pytest.raises(QueueUnavailable, match="the job database does not answer: database is locked"):
        queue.submit(new_job())
    other.execute("COMMIT")
    assert queue.submit(new_job())[1]
    other.close()
    queue.close()


def test_a_transaction_that_reads_and_then_writes_begins_as_a_writer(sqlite_url):
    queue = JobQueue(sqlite_url)
    with ThreadPoolExecutor(8) as threads:  # SQLite refuses one that finds out later, whatever its patience
        jobs = [job for job, _ in threads.map(lambda _: queue.submit(new_job(), total_limit=99), range(24))]
    assert [job.seq for job in sorted(jobs, key=lambda job: job.seq)] == list(range(1, 25))
    queue.close()


def test_many_may_open_a_new_database_at_once(url):
    together = threading.Barrier(6)

    def open_and_submit(_: int) -> bool:
        together.wait(timeout=30)
        queue = JobQueue(url)
        try:
            return queue.submit(new_job())[1]
        finally:
            queue.close()

    with ThreadPoolExecutor(6) as threads:
        assert all(threads.map(open_and_submit, range(6)))
    queue = JobQueue(url)
    assert queue.counts()["queued"] == 6
    queue.close()


def test_a_network_share_is_no_place_for_sqlite(sqlite_url, monkeypatch):
    monkeypatch.setattr(database, "file_system", lambda folder: "nfs4")
    with pytest.raises(ValueError, match=r"jobs.sqlite is on a shared file system \(nfs4\), where SQLite's locks do"):
        JobQueue(sqlite_url)


def test_the_file_system_is_looked_up_for_this_folder(tmp_path):
    if not Path("/proc/self/mountinfo").exists():
        pytest.skip("Linux only")
    assert database.file_system(Path("/proc")) == "proc"
    assert database.file_system(tmp_path) != "proc"


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite:///file:x?mode=memory&uri=true"])
def test_a_database_in_memory_is_refused(url):
    with pytest.raises(ValueError, match="a database in memory loses its jobs"):
        JobQueue(url)


@pytest.mark.parametrize("url", ["", "jobs.sqlite", "mysql://root:secret@host/x", "nonsense://secret"])
def test_other_databases_are_refused_without_showing_a_password(url):
    with pytest.raises(ValueError, match="the database's URL is not understood") as refused:
        JobQueue(url)
    assert "secret" not in str(refused.value)


def test_a_file_that_is_no_database_is_refused(path, sqlite_url):
    path.write_bytes(b"something else, and quite a lot of it " * 100)
    with pytest.raises(QueueUnavailable, match="file is not a database"):
        JobQueue(sqlite_url)
    assert path.read_bytes().startswith(b"something else")


# ---- Versions --------------------------------------------------------------------------------------------------------


def test_a_newer_schema_is_refused_and_left_alone(url):
    JobQueue(url).close()
    engine = database.connect(url)
    with database.transaction(engine) as connection:
        connection.execute(database.schema_version.update().values(version=7))
    with pytest.raises(SchemaError, match="has version 7 and this pusa knows up to 5: install the newer pusa"):
        JobQueue(url)
    with engine.connect() as connection:
        assert connection.execute(sa.select(database.schema_version.c.version)).scalar_one() == 7
    engine.dispose()


def test_an_older_schema_is_brought_up_to_date_with_its_jobs(url, monkeypatch):
    queue = JobQueue(url)
    job, _ = queue.submit(new_job())
    queue.close()
    statements = ["ALTER TABLE jobs ADD COLUMN colour VARCHAR(9) DEFAULT 'red'", "UPDATE jobs SET colour = 'blue'"]
    later = (lambda c, s=s: c.execute(sa.text(s)) for s in statements)
    monkeypatch.setattr(database, "MIGRATIONS", (*database.MIGRATIONS, *later))
    for _ in range(2):  # once done it is not done again: the column could not be added twice
        engine = database.connect(url)
        with engine.connect() as connection:
            assert connection.execute(sa.text("SELECT id, colour FROM jobs")).all() == [(job.id, "blue")]
            assert connection.execute(sa.select(database.schema_version.c.version)).scalars().all() == [7]
        engine.dispose()


def test_a_migration_that_fails_changes_nothing(url, monkeypatch):
    JobQueue(url).close()
    statements = ["CREATE TABLE half_done (x INTEGER)", "UPDATE no_such_table SET x = 1"]
    later = (lambda c, s=s: c.execute(sa.text(s)) for s in statements)
    monkeypatch.setattr(database, "MIGRATIONS", (*database.MIGRATIONS, *later))
    with pytest.raises(QueueUnavailable, match="no_such_table"):
        JobQueue(url)
    monkeypatch.undo()
    queue = JobQueue(url)
    assert not sa.inspect(queue.engine).has_table("half_done")
    queue.close()


# ---- PostgreSQL ------------------------------------------------------------------------------------------------------


def broken_at(queue: JobQueue, server: Any, *, verb: str) -> list[str]:
    """Break off the queue's connection from outside just before its next statement that begins with `verb`."""
    import psycopg

    broken: list[str] = []

    def before(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        if statement.startswith(verb) and not broken:
            broken.append(statement)
            with psycopg.connect(server.url, autocommit=True) as other:
                other.execute("SELECT pg_terminate_backend(%s)", [cursor.connection.info.backend_pid])

    sa.event.listen(queue.engine, "before_cursor_execute", before)
    return broken


def test_a_submit_whose_connection_breaks_is_done_once(postgresql, postgresql_url):
    queue = JobQueue(postgresql_url)
    broken = broken_at(queue, postgresql, verb="INSERT INTO jobs")
    assert queue.submit(new_job())[1]
    assert len(broken) == 1
    assert queue.counts()["queued"] == 1
    queue.close()


def test_a_claim_whose_connection_breaks_takes_no_second_job(postgresql, postgresql_url):
    queue = JobQueue(postgresql_url)
    queue.submit(new_job())
    broken = broken_at(queue, postgresql, verb="UPDATE jobs")
    with pytest.raises(QueueUnavailable, match="the job database does not answer: "):
        queue.claim("one", lease_seconds=10)
    assert len(broken) == 1
    job = queue.claim("one", lease_seconds=10)
    assert job is not None
    assert job.attempt == 1
    queue.close()


def test_a_finish_that_was_committed_and_not_answered_is_done(postgresql, postgresql_url):
    queue = JobQueue(postgresql_url)
    queue.submit(new_job())
    job = queue.claim("one", lease_seconds=10)
    committed = []

    def lose_the_answer(connection: Any) -> None:
        if not committed:
            committed.append(True)
            connection.connection.driver_connection.commit()
            connection.connection.driver_connection.close()

    sa.event.listen(queue.engine, "commit", lose_the_answer)
    queue.finish(job, results={"video": "v"}, timings={})
    assert committed
    assert queue.get(job.id).results == {"video": "v"}
    queue.close()


def test_a_server_that_went_away_and_came_back_is_used_again(postgresql, postgresql_url, monkeypatch):
    monkeypatch.setattr(database, "RETRY_SECONDS", 0.01)
    queue = JobQueue(postgresql_url)
    job, _ = queue.submit(new_job())
    postgresql.stop()
    try:
        for call in (queue.counts, lambda: queue.submit(new_job()), lambda: queue.claim("one", lease_seconds=9)):
            with pytest.raises(QueueUnavailable, match="the job database does not answer: "):
                call()
        with pytest.raises(QueueUnavailable, match="cannot be used: ") as refused:
            JobQueue(postgresql_url.replace("pusa@", "pusa:secret@"))
        assert "secret" not in str(refused.value)
    finally:
        postgresql.start()
    assert queue.get(job.id) == job
    assert queue.claim("one", lease_seconds=9).id == job.id
    queue.close()


def test_commits_are_on_disk_even_where_the_server_would_not_wait(postgresql_url):
    engine = database.connect(postgresql_url)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        name = connection.exec_driver_sql("SELECT current_database()").scalar()
        connection.exec_driver_sql(f"ALTER DATABASE {name} SET synchronous_commit = off")
    engine.dispose()
    engine = database.connect(postgresql_url)
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SHOW synchronous_commit").scalar() == "on"
    engine.dispose()
