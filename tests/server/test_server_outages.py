"""A damaged or absent database is 503 with the way out, and failed jobs wait for another try."""

import sqlite3
from pathlib import Path
from typing import Any

import pytest
from api_samples import refusal, serving
from queue_samples import Clock, new_job
from server_samples import open_all, quick_settings, wait_until

from pusa.server.jobs import database
from pusa.server.jobs.queue import JobQueue, QueueDamaged

# ---- a damaged file ----


def filled(path: Path, jobs: int = 40) -> list[str]:
    """The ids of jobs in a database of several pages."""
    queue = JobQueue(f"sqlite:///{path}")
    ids = [queue.submit(new_job())[0].id for _ in range(jobs)]
    queue.close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    return ids


def damage_pages(path: Path) -> None:
    """Overwrite every page but the first, which holds the schema."""
    size = int.from_bytes(path.read_bytes()[16:18], "big")
    content = bytearray(path.read_bytes())
    content[size:] = b"\xa5" * (len(content) - size)
    path.write_bytes(content)


def test_a_damaged_page_is_found_at_the_start_with_the_way_to_restore(tmp_path):
    path = tmp_path / "jobs.sqlite"
    filled(path)
    JobQueue(f"sqlite:///{path}").close()
    damage_pages(path)
    with pytest.raises(QueueDamaged, match="stop the server and restore a backup") as damaged:
        JobQueue(f"sqlite:///{path}")
    assert "docs/deployment.md" in str(damaged.value)


def test_one_damaged_page_is_enough(tmp_path):
    path = tmp_path / "jobs.sqlite"
    filled(path)
    content = bytearray(path.read_bytes())
    size = int.from_bytes(content[16:18], "big")
    for page in range(1, len(content) // size):
        damaged = bytearray(content)
        damaged[page * size : (page + 1) * size] = b"\xa5" * size
        path.write_bytes(damaged)
        with pytest.raises(QueueDamaged):
            JobQueue(f"sqlite:///{path}")
    path.write_bytes(content)
    JobQueue(f"sqlite:///{path}").close()


def test_damage_while_the_server_runs_is_503_everywhere(tmp_path):
    filled((tmp_path / "data").mkdir() or tmp_path / "data/jobs.sqlite")
    with serving(tmp_path, workers=0) as server:
        assert server.http.get("/health").status_code == 200
        path = server.service.settings.data_folder / "jobs.sqlite"
        server.service.queue.close()
        damage_pages(path)
        for answer in (
            server.http.get("/v1/videos"),
            server.http.post("/v1/videos", json={"prompt": "a"}),
            server.http.get("/ready"),
            server.http.get("/health"),
        ):
            error = refusal(answer, 503)
            assert error["code"] == "queue_unavailable"
            assert "its operator restores a backup (docs/deployment.md, Backup and restore)" in error["message"]
            assert str(tmp_path) not in answer.text


def test_a_value_that_is_no_json_any_more_is_damage(tmp_path):
    path = tmp_path / "jobs.sqlite"
    ids = filled(path, 2)
    connection = sqlite3.connect(path)
    connection.execute("UPDATE jobs SET request = '{\"prom' WHERE seq = 1")
    connection.commit()
    connection.close()
    queue = JobQueue(f"sqlite:///{path}")
    with pytest.raises(QueueDamaged):
        queue.get(ids[0])
    assert queue.get(ids[1])
    assert queue.fault()
    queue.close()


# ---- a file that vanishes ----


def test_nothing_is_accepted_into_a_file_that_was_removed(tmp_path):
    settings = quick_settings(tmp_path / "data")
    queue, _ = open_all(settings)
    kept, _ = queue.submit(new_job())
    path = tmp_path / "data/jobs.sqlite"
    for name in (path, *(Path(f"{path}{suffix}") for suffix in ("-wal", "-shm"))):
        name.rename(tmp_path / name.name)
    for _ in range(2):
        with pytest.raises(database.QueueUnavailable, match="unable to open database file"):
            queue.submit(new_job())
    assert "the file of the job database is gone" in queue.fault()
    assert not path.exists()
    for name in ("jobs.sqlite", "jobs.sqlite-wal", "jobs.sqlite-shm"):
        (tmp_path / name).rename(tmp_path / "data" / name)
    assert queue.get(kept.id) == kept
    assert queue.fault() is None
    queue.close()


def test_a_backup_that_was_put_in_place_is_used_without_a_restart(tmp_path):
    path, backup = tmp_path / "jobs.sqlite", tmp_path / "backup.sqlite"
    queue = JobQueue(f"sqlite:///{path}")
    old, _ = queue.submit(new_job())
    connection = sqlite3.connect(path)
    connection.execute(f"VACUUM INTO '{backup}'")
    connection.close()
    new, _ = queue.submit(new_job())
    for suffix in ("-wal", "-shm"):
        Path(f"{path}{suffix}").unlink()
    backup.replace(path)
    assert queue.get(old.id) == old
    assert queue.get(new.id) is None
    queue.close()


# ---- PostgreSQL goes and comes back ----


def test_a_database_that_restarts_is_503_while_it_is_away(tmp_path, postgresql, postgresql_url, monkeypatch):
    monkeypatch.setattr(database, "RETRY_SECONDS", 0.01)
    with serving(tmp_path, workers=0, database=postgresql_url) as server:
        id = server.create()["id"]
        postgresql.stop()
        try:
            for answer in (server.http.get(f"/v1/videos/{id}"), server.http.post("/v1/videos", json={"prompt": "a"})):
                assert refusal(answer, 503)["code"] == "queue_unavailable"
                assert answer.headers["retry-after"]
            assert server.http.get("/health").status_code == 200  # nothing that an operator must repair
        finally:
            postgresql.start()
        assert server.http.get(f"/v1/videos/{id}").json()["status"] == "queued"
        assert server.create()["status"] == "queued"


# ---- jobs that failed ----


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: Any, tmp_path: Path) -> str:
    if request.param == "postgresql":
        return request.getfixturevalue("postgresql_url")
    return f"sqlite:///{tmp_path / 'jobs.sqlite'}"


def test_failed_attempts_are_repeated_after_pauses_that_double(url):
    clock = Clock()
    queue = JobQueue(url, clock=clock)
    job, _ = queue.submit(new_job())
    for pause in (2, 4, 8, 16, 32, 64, 64):
        running = queue.claim("one", lease_seconds=60)
        assert queue.fail(running, "x", "x", retry=True, max_failures=99, retry_seconds=2) == "queued"
        assert queue.get(job.id).not_before == clock.now + pause
        clock.now += pause - 1
        assert queue.claim("one", lease_seconds=60) is None
        clock.now += 1
    running = queue.claim("one", lease_seconds=60)
    assert running.not_before is None
    queue.heartbeat(running, lease_seconds=60, checkpoint="c", checkpoint_step=1)
    queue.fail(running, "x", "x", retry=True, retry_seconds=2)
    assert queue.claim("one", lease_seconds=60).id == job.id  # it got further: no pause
    queue.close()


def test_others_run_while_a_failed_job_waits(url):
    queue = JobQueue(url)
    queue.submit(new_job(priority=9)), queue.submit(new_job())
    first = queue.claim("one", lease_seconds=60)
    queue.fail(first, "x", "x", retry=True, retry_seconds=1000)
    assert queue.claim("one", lease_seconds=60).id != first.id
    assert queue.cancel(first.id).status == "cancelled"
    queue.close()


def test_owners_take_turns_however_many_jobs_each_has(url):
    queue = JobQueue(url)
    for owner in "aaaaaa":
        queue.submit(new_job(owner=owner))
    first = queue.claim("one", lease_seconds=60)
    for owner in "bbc":
        queue.submit(new_job(owner=owner))
    places = [(job.owner, queue.position(job.id)) for job in queue.page(order="asc")[0] if job.status == "queued"]
    order = [queue.claim("one", lease_seconds=60).owner for _ in range(8)]
    assert (first.owner, order) == ("a", ["a", "b", "c", "a", "b", "a", "a", "a"])
    assert places == [("a", 0), ("a", 3), ("a", 5), ("a", 6), ("a", 7), ("b", 1), ("b", 4), ("c", 2)]
    for owner in "aad":
        queue.submit(new_job(owner=owner))
    assert [queue.claim("one", lease_seconds=60).owner for _ in range(3)] == ["a", "d", "a"]
    queue.close()


def test_failed_jobs_are_listed_and_made_once_more(tmp_path):
    with serving(tmp_path) as server:
        failed = server.finished(prompt="fail", seed=3)
        done = server.finished(prompt="fine")
        server.executor.gate.clear()
        cancelled = server.create(prompt="wait")["id"]
        server.http.post(f"/v1/videos/{cancelled}/cancel")
        server.ended(cancelled)

        def listed(status: str) -> list[str]:
            return [video["id"] for video in server.http.get(f"/v1/videos?status={status}").json()["data"]]

        assert listed("failed") == [cancelled, failed["id"]]
        assert listed("completed") == [done["id"]]
        assert server.http.get("/v1/videos?status=failed&limit=1").json()["has_more"]
        refusal(server.http.get("/v1/videos?status=nonsense"), 400)

        server.executor.gate.set()
        again = server.http.post(f"/v1/videos/{cancelled}/retry").json()
        assert (again["id"], again["status"], again["error"]) == (cancelled, "queued", None)
        assert server.ended(cancelled)["status"] == "completed"
        assert server.http.post(f"/v1/videos/{failed['id']}/retry").status_code == 200
        assert wait_until(lambda: server.job(failed["id"]).attempt == 2)
        assert server.ended(failed["id"])["seed"] == 3
        assert refusal(server.http.post(f"/v1/videos/{done['id']}/retry"), 409)["code"] == "not_failed"
        refusal(server.http.post("/v1/videos/video_unknown/retry"), 404)


def test_a_retry_counts_as_a_new_job_for_the_limits(tmp_path):
    with serving(tmp_path, queue_limit=1) as server:
        failed = server.finished(prompt="fail")
        server.executor.gate.clear()
        server.create(prompt="wait")
        assert refusal(server.http.post(f"/v1/videos/{failed['id']}/retry"), 429)["code"] == "queue_full"


# ---- who may read what is stored ----


def test_what_is_stored_is_for_its_user_alone(tmp_path):
    data = tmp_path / "data"
    data.mkdir(mode=0o755)
    with serving(tmp_path) as server:
        server.finished(keyframes=[])
        modes = {path: path.stat().st_mode & 0o777 for path in (data, *data.rglob("*"))}
    assert modes[data] == 0o700
    assert {path.name: oct(mode) for path, mode in modes.items() if path.is_file() and mode & 0o077} == {}
    assert modes[data / "jobs.sqlite"] == 0o600
