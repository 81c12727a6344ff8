"""Measure the cost of the queue's calls with 10,000 to 500,000 jobs in the table: it must not grow with them.

    python benchmarks/tables.py                                        # SQLite
    python benchmarks/tables.py --database postgresql://user:password@host/empty
    python benchmarks/tables.py --sizes 1000 10000

The jobs are ended ones (one in a hundred failed, half of the others are expired), with two results and an input each;
twenty wait. Medians in milliseconds, and the most memory that Python took for the call; the last column compares the
largest table with the smallest.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa
from _common import table

from pusa.server.jobs.housekeeping import expire, remove_files, sweep_orphans
from pusa.server.jobs.queue import JobQueue, NewJob
from pusa.server.jobs.store import FileStore

SIZES = (10_000, 100_000, 500_000)
WAITING = 20
_WORDS = {
    "sqlite": {"hex": "printf('%032x', i)", "json": "TEXT", "false": "0"},
    "postgresql": {"hex": "lpad(to_hex(i), 32, '0')", "json": "JSON", "false": "false"},
}
_NOW = 10_000_000.0
_REQUEST = {"task": "generate", "prompt": "a red ball rolls over the beach " * 8, "seed": 7, "conditions": []}

_FILL = """
WITH RECURSIVE numbers (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM numbers WHERE i < {jobs})
INSERT INTO jobs (id, owner, request, model, prompt, seconds, size, inputs, priority, source, status, created_at,
    started_at, completed_at, expires_at, attempt, failures, progressed, cancel_requested, stage, step, steps, progress,
    checkpoint_step, results, notes, note_details, timings, turn, favourite)
SELECT 'video_' || {hex}, '', CAST(:request AS {json}), 'mini', 'a red ball', '5', '832x480',
    CAST('["inputs/video_' || {hex} || '/0.png"]' AS {json}), 0, 'api',
    CASE WHEN i % 100 = 0 THEN 'failed' ELSE 'completed' END, i, i, i + 60,
    CASE WHEN i % 2 = 0 THEN {now} - 1000 + i * 0.001 ELSE {now} + 1000 END, 1, 0, {false}, {false}, '', 10, 10, 100.0,
    0, CAST('{{"video": "results/video_' || {hex} || '/1/video.mp4", "thumbnail": "results/video_' || {hex} ||
    '/1/thumbnail.webp"}}' AS {json}), CAST('[]' AS {json}), CAST('[]' AS {json}),
    CAST('{{"denoise": 50.5}}' AS {json}), 0, {false} FROM numbers
"""
_FILES = """
INSERT INTO job_files (seq, key, kind)
SELECT seq, 'inputs/' || id || '/0.png', 'input' FROM jobs WHERE status != 'queued' UNION ALL
SELECT seq, 'results/' || id || '/1/video.mp4', 'result' FROM jobs WHERE status != 'queued' UNION ALL
SELECT seq, 'results/' || id || '/1/thumbnail.webp', 'result' FROM jobs WHERE status != 'queued'
"""


def fill(queue: JobQueue, jobs: int) -> None:
    """Insert ended jobs in SQL, and let twenty wait."""
    dialect = queue.engine.dialect.name
    statement = _FILL.format(jobs=jobs, now=_NOW, **_WORDS[dialect])
    with queue.engine.begin() as connection:
        connection.execute(sa.text(statement), {"request": json.dumps(_REQUEST)})
        connection.execute(sa.text(_FILES))
    with queue.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("ANALYZE")
    for _ in range(WAITING):
        queue.submit(new_job())


def new_job() -> NewJob:
    return NewJob(request=_REQUEST, model="mini", prompt="a red ball", seconds="5", size="832x480")


def id_of(number: int) -> str:
    return f"video_{number:032x}"


def calls(queue: JobQueue, files: FileStore, jobs: int) -> dict[str, tuple[int, Callable[[], Any]]]:
    """List what is measured, and how often."""
    odd = iter(range(1, jobs, 2))  # these have not expired

    def delete() -> None:
        remove_files(queue, files, [queue.delete(id_of(next(odd)))])

    def work() -> None:
        job = queue.claim("one", lease_seconds=600)
        assert job is not None
        queue.finish(job, results={"video": f"results/{job.id}/1/video.mp4"}, timings={"denoise": 1.0})
        queue.submit(new_job())

    return {
        "DELETE, with its files": (20, delete),
        "expire 100 jobs": (3, partial(expire, queue, files, now=_NOW, keep_seconds=1e9, limit=100)),
        "sweep 1,000 files": (
            3,
            lambda: sweep_orphans(queue, files, now=time.time() + 7200, older_than_seconds=3600),
        ),
        "/ready and /metrics": (20, queue.count_unfinished),
        "newest page": (20, queue.page),
        "page of failed jobs": (20, lambda: queue.page("", statuses=("failed", "cancelled"))),
        "claim, finish, submit": (20, work),
        "place in the queue": (20, lambda: queue.position(queue.page(limit=1)[0][0].id)),
    }


def measure(call: Callable[[], Any], times: int) -> tuple[float, float]:
    """Median milliseconds, and the most MB that Python took."""
    call()
    took = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        took.append(1000 * (time.perf_counter() - start))
    tracemalloc.start()
    call()
    memory = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    return statistics.median(took), memory


def run(url: str, folder: Path, jobs: int) -> dict[str, tuple[float, float]]:
    queue, files = JobQueue(url), FileStore(str(folder / f"files-{jobs}"))
    start = time.perf_counter()
    fill(queue, jobs)
    print(f"{jobs} jobs made in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    for number in range(jobs - 999, jobs + 1):  # of jobs that are there: the sweep keeps them
        files.put_bytes(f"results/{id_of(number)}/1/video.mp4", b"x")
    found = {}
    for name, (times, call) in calls(queue, files, jobs).items():
        found[name] = measure(call, times)
    start = time.perf_counter()
    JobQueue(url).close()
    found["open, with the check of a SQLite file"] = (1000 * (time.perf_counter() - start), 0.0)
    queue.close()
    return found


def empty(url: str) -> None:
    """Drop the tables, for the next size."""
    engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.begin() as connection:
        for name in ("job_files", "deleted_jobs", "jobs", "workers", "schema_version"):
            connection.exec_driver_sql(f"DROP TABLE IF EXISTS {name}")
    engine.dispose()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--database", help="postgresql://... with no tables in it; default: SQLite")
    options = parser.parse_args(arguments)
    found: dict[int, dict[str, tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="pusa-tables-") as temporary:
        for jobs in options.sizes:
            url = options.database or f"sqlite:///{temporary}/jobs-{jobs}.sqlite"
            if options.database:
                empty(url)
            found[jobs] = run(url, Path(temporary), jobs)
    least, most = min(options.sizes), max(options.sizes)
    rows = [
        [
            name,
            *(f"{found[jobs][name][0]:.2f}" for jobs in options.sizes),
            f"{found[most][name][1]:.2f}",
            f"{found[most][name][0] / found[least][name][0]:.1f}",
        ]
        for name in found[most]
    ]
    print(table(["milliseconds", *(f"{jobs:,} jobs" for jobs in options.sizes), "MB", "ratio"], rows))
    result = {
        "benchmark": "tables",
        "database": "postgresql" if options.database else "sqlite",
        "cores": psutil.cpu_count(),
        "load_average": round(psutil.getloadavg()[0], 2),
        "ms": {jobs: {name: round(ms, 3) for name, (ms, _) in of.items()} for jobs, of in found.items()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
