"""A database of an earlier version is migrated with all that is in it."""

from dataclasses import asdict
from typing import Any

import pytest
import sqlalchemy as sa
from old_databases import IDENTITY, id_of, make_first_version
from queue_samples import Clock, new_job

from pusa.server.jobs.queue import JobQueue


def test_a_migration_keeps_every_job_with_every_field_and_the_workers(url):
    rows = make_first_version(url)
    for _ in range(2):  # opened again: nothing is left to do
        queue = JobQueue(url, clock=Clock())
        assert queue.identity == IDENTITY
        jobs, more = queue.page(order="asc")
        assert not more
        assert len(jobs) == len(rows)
        for number, (job, row) in enumerate(zip(jobs, rows, strict=True), start=1):
            found = {**asdict(job), "inputs": list(job.inputs), "notes": list(job.notes)}
            stored = {name: value for name, value in row.items() if name != "progressed"}  # known to the queue alone
            assert {name: found[name] for name in stored} == stored
            assert (job.seq, job.turn, job.not_before, job.plan) == (number, 0, None, None)
        assert [(w.name, w.state) for w in queue.workers()] == [("host/boot/1-2.00/0", {"ready": True})]
        queue.close()


def test_migrated_tables_are_those_of_a_new_database(url, tmp_path, request):
    make_first_version(url)
    JobQueue(url).close()
    is_sqlite = url.startswith("sqlite")
    new_url = (
        f"sqlite:///{tmp_path / 'new.sqlite'}" if is_sqlite else request.getfixturevalue("postgresql").new_database()
    )
    JobQueue(new_url).close()

    def describe(url: str) -> dict[str, Any]:
        engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
        found = sa.inspect(engine)
        tables = {
            name: (
                {(c["name"], c["nullable"]) for c in found.get_columns(name)},
                {(i["name"], tuple(i["column_names"]), i["unique"]) for i in found.get_indexes(name)},
                found.get_pk_constraint(name)["constrained_columns"],
                [(k["constrained_columns"], k["referred_table"], k["options"]) for k in found.get_foreign_keys(name)],
            )
            for name in found.get_table_names()
        }
        engine.dispose()
        return tables

    assert describe(url) == describe(new_url)


def test_migrated_jobs_go_on_and_their_files_are_known(url):
    make_first_version(url)
    clock = Clock()
    clock.now = 1_000_090.0
    queue = JobQueue(url, clock=clock)
    first, second = queue.page(order="asc")[0][:2]
    checkpoint = f"checkpoints/{id_of(5)}/1.safetensors"
    named = {*first.inputs, *first.results.values(), checkpoint, f"checkpoints/{id_of(4)}/1.safetensors"}
    assert queue.keys_in_use({*named, "inputs/video_0/0.png"}) == named
    assert queue.digest(first.id, first.results["video"]) is None  # nothing to compare it with
    queue.delete(first.id)
    shared = {*first.inputs, first.results["video"]}  # the sixth job uses them
    assert queue.keys_in_use(named) & {*first.inputs, *first.results.values()} == shared
    with pytest.raises(KeyError):
        queue.delete(first.id)

    theirs, _ = queue.submit(new_job(owner="b" * 64))
    order = [queue.claim("one", lease_seconds=60) for _ in range(4)]
    assert [job.id for job in order if job] == [id_of(5), id_of(4), id_of(6), theirs.id]  # old jobs in their old order
    assert (order[0].checkpoint, order[0].checkpoint_step, order[0].attempt) == (checkpoint, 5, 2)
    assert queue.restart(second.id).status == "queued"
    queue.close()
