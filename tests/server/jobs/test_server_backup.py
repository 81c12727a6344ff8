"""A backup is a copy of the database, and then of the files, of a server that goes on working."""

import shutil
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

from server_samples import House, quick_settings, submit, uninterrupted, video_of


def copy_if_there(source: str, target: str) -> None:
    with suppress(FileNotFoundError):  # a checkpoint that was replaced meanwhile
        shutil.copy2(source, target)


def backup(data: Path, target: Path) -> None:
    """Copy a data folder while jobs run, as docs/deployment.md describes."""
    target.mkdir()
    with closing(sqlite3.connect(data / "jobs.sqlite")) as database:
        database.execute("VACUUM INTO ?", (str(target / "jobs.sqlite"),))
    shutil.copytree(data / "files", target / "files", copy_function=copy_if_there)


def test_a_copy_made_while_jobs_run_is_a_whole_server(tmp_path: Path) -> None:
    said = {"steps": 8, "step_seconds": 0.2}
    first = House(quick_settings(tmp_path / "data", lease_seconds=2.0))
    try:
        done = submit(first.queue, steps=2)
        running, waiting = submit(first.queue, **said), submit(first.queue, steps=3)
        first.hire()
        first.begun(running, step=4)
        backup(tmp_path / "data", tmp_path / "restored")
        first.ended(waiting)
    finally:
        first.dismiss()
        first.queue.close()

    restored = House(quick_settings(tmp_path / "restored", lease_seconds=2.0))
    try:
        assert restored.job(done).status == "completed"
        assert video_of(restored, restored.job(done))
        assert restored.job(running).status == "in_progress"
        assert restored.job(waiting).status == "queued"
        restored.hire()
        assert restored.ended(waiting).status == "completed"
        again = restored.ended(running)
        assert (again.status, again.attempt) == ("completed", 2)
        assert video_of(restored, again) == uninterrupted(restored, **said)
    finally:
        restored.dismiss()
        restored.queue.close()
