"""The benchmarks of the server run, and measure what they say."""

import json
from pathlib import Path

import pytest
import tables

from pusa.server.jobs.housekeeping import sweep_orphans
from pusa.server.jobs.queue import JobQueue
from pusa.server.jobs.store import FileStore


def test_the_tables_are_what_is_said_of_them(tmp_path: Path) -> None:
    queue, files = JobQueue(f"sqlite:///{tmp_path / 'jobs.sqlite'}"), FileStore(str(tmp_path / "files"))
    tables.fill(queue, 300)
    assert queue.counts() == {"queued": 20, "in_progress": 0, "completed": 297, "failed": 3, "cancelled": 0}
    job = queue.get(tables.id_of(299))
    keys = {*job.inputs, *job.results.values()}
    assert len(keys) == 3
    assert queue.keys_in_use(keys) == keys
    assert len(queue.expired(tables._NOW, limit=1000)) == 147
    files.put_bytes(job.results["video"], b"x")
    assert sweep_orphans(queue, files, now=2e9, older_than_seconds=60) == 0
    queue.close()


@pytest.mark.parametrize("sizes", [["300", "600"]])
def test_the_costs_are_printed_for_every_size(sizes: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    tables.main(["--sizes", *sizes])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(result["ms"]) == sizes
    assert all(ms > 0 for of in result["ms"].values() for ms in of.values())
