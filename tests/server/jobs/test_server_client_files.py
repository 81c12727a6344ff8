"""The table of clients' files: each content of an owner once, found by its owner only, gone after its last use."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from queue_samples import Clock

from pusa.server.jobs.client_files import (
    ClientFile,
    ClientFileTable,
    FilesFull,
    NewClientFile,
    expire_files,
    new_file_id,
)
from pusa.server.jobs.queue import FileDigest, JobQueue
from pusa.server.jobs.store import FileStore


@pytest.fixture
def table(queue: JobQueue, clock: Clock) -> ClientFileTable:
    return ClientFileTable(queue, clock=clock)


def new(content: str = "a", owner: str = "", size_bytes: int = 10) -> NewClientFile:
    id = new_file_id()
    digest = FileDigest(size_bytes, content.ljust(64, "0"))
    info = {"kind": "image", "fps": None, "width": 3}
    return NewClientFile(id=id, owner=owner, digest=digest, key=f"files/{id}.png", name="\u00e9t\u00e9.png", info=info)


def test_a_content_is_kept_once_for_each_owner(table: ClientFileTable, clock: Clock) -> None:
    first, again, other = new(), new(), new(owner="b")
    kept = table.add(first)
    assert kept == ClientFile(**vars(first), created_at=clock.now, used_at=clock.now)
    clock.now += 5
    assert table.add(again) == ClientFile(**vars(first), created_at=clock.now - 5, used_at=clock.now)
    assert table.add(other).id == other.id
    assert table.use_same("b", first.digest.sha256).id == other.id
    assert table.use_same("c", first.digest.sha256) is None
    assert (table.get(first.id, "b"), table.use(first.id, "b"), table.delete(first.id, "b")) == (None, None, None)
    assert table.delete(first.id, "").key == first.key
    assert (table.get(first.id, ""), table.get(other.id, "b").id) == (None, other.id)


def test_many_at_once_are_one(table: ClientFileTable) -> None:
    with ThreadPoolExecutor(8) as pool:
        ids = {file.id for file in pool.map(lambda _: table.add(new()), range(8))}
    assert len(ids) == 1


def test_pages_go_on_where_the_last_one_ended(table: ClientFileTable, clock: Clock) -> None:
    ids = []
    for number in range(5):
        clock.now += number % 2  # some at the same time
        ids.append(table.add(new(str(number))).id)
    table.add(new("x", owner="b"))
    for order in ("asc", "desc"):
        seen: list[str] = []
        more, after = True, None
        while more:
            page, more = table.page("", after=after, limit=2, order=order)
            seen += [file.id for file in page]
            after = seen[-1]
        assert sorted(seen) == sorted(ids)
        times = [table.get(id, "").created_at for id in seen]
        assert times == sorted(times, reverse=order == "desc")
    with pytest.raises(KeyError):
        table.page("b", after=ids[0])


def test_an_id_may_be_any_text(table: ClientFileTable) -> None:
    table.add(new())
    for id in ("", "file_\0", "x" * 10_000, "\u0663"):
        assert table.get(id, "") is table.use(id, "") is table.delete(id, "") is None
        with pytest.raises(KeyError):
            table.page("", after=id)


def test_an_owner_keeps_no_more_bytes_than_allowed(table: ClientFileTable) -> None:
    table.add(new("a"), limit_bytes=25)
    table.add(new("b"), limit_bytes=25)
    with pytest.raises(FilesFull) as full:
        table.add(new("c"), limit_bytes=25)
    assert (full.value.used_bytes, full.value.limit_bytes) == (20, 25)
    table.add(new("b"), limit_bytes=25)
    table.add(new("c", owner="b"), limit_bytes=25)


def test_a_use_is_recorded_now_and_then_and_keeps_a_file(
    queue: JobQueue, table: ClientFileTable, clock: Clock, tmp_path: Path, monkeypatch: Any
) -> None:
    files = FileStore(str(tmp_path / "files"))
    kept, unused, raced = (table.add(new(content)) for content in "abc")
    for file in (kept, unused, raced):
        files.put_bytes(file.key, b"x")
    began = clock.now
    clock.now += 100
    assert table.use(kept.id, "", at_most_every_seconds=101).used_at == began
    assert table.use(kept.id, "", at_most_every_seconds=100).used_at == clock.now
    assert set(table.expired(clock.now, limit=10)) == {unused.id, raced.id}
    find = table.expired

    def then_used(*args: Any, **options: Any) -> list[str]:
        found = find(*args, **options)
        table.use(raced.id, "")
        return found

    monkeypatch.setattr(table, "expired", then_used)
    assert expire_files(table, files, used_before=clock.now, limit=10) == 1
    assert [files.exists(file.key) for file in (kept, unused, raced)] == [True, False, True]
    assert queue.keys_in_use([kept.key, unused.key, raced.key]) == {kept.key, raced.key}
