"""Record the files that jobs name, the places of deleted jobs, and changes, inside the transactions of `JobQueue`."""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from pusa.server.jobs import database
from pusa.server.jobs.job import UNFINISHED, FileDigest

Kind = Literal["input", "result", "checkpoint"]

_files, _deleted, _jobs = database.job_files, database.deleted_jobs, database.jobs
_kept, _changes = database.files, database.job_changes
_BATCH = 500  # keys in one query
_PREVIEW = re.compile(r"previews/([a-z0-9_]+)[./].*")
_KEPT = re.compile(r"files/(file_[0-9a-f]{32})[./].*")


def record_files(
    connection: Connection, seq: int, kind: Kind, keys: Iterable[str], digests: Mapping[str, FileDigest] | None = None
) -> None:
    """Replace the records of a job's files of one kind; a key without a digest is not checked when it is read."""
    digests = digests or {}
    connection.execute(_files.delete().where(_files.c.seq == seq, _files.c.kind == kind))
    rows = []
    for key in dict.fromkeys(keys):
        digest = digests.get(key)
        rows.append(
            {
                "seq": seq,
                "key": key,
                "kind": kind,
                "size_bytes": digest and digest.size_bytes,
                "sha256": digest and digest.sha256,
            }
        )
    if rows:
        connection.execute(_files.insert(), rows)


def find_digest(connection: Connection, id: str, key: str) -> FileDigest | None:
    """Return the digest of a job's file; None if it was recorded without one, or is not recorded."""
    query = sa.select(_files.c.size_bytes, _files.c.sha256).join(_jobs, _jobs.c.seq == _files.c.seq)
    row = connection.execute(query.where(_jobs.c.id == id, _files.c.key == key)).one_or_none()
    return None if row is None or row.sha256 is None else FileDigest(row.size_bytes, row.sha256)


def find_used(connection: Connection, keys: Collection[str]) -> set[str]:
    """Return those keys that a row of jobs or files names, and those of the previews of unfinished jobs."""
    used: set[str] = set()
    ordered = sorted(keys)
    for start in range(0, len(ordered), _BATCH):
        batch = ordered[start : start + _BATCH]
        named = sa.or_(_files.c.kind != "checkpoint", _jobs.c.checkpoint == _files.c.key)
        query = sa.select(_files.c.key).join(_jobs, _jobs.c.seq == _files.c.seq)
        used.update(connection.execute(query.where(_files.c.key.in_(batch), named)).scalars())
        previews = {key: found[1] for key in batch if (found := _PREVIEW.fullmatch(key))}
        ids = set(previews.values())
        unfinished = sa.select(_jobs.c.id).where(_jobs.c.id.in_(ids), _jobs.c.status.in_(UNFINISHED))
        running = set(connection.execute(unfinished).scalars())
        used.update(key for key, id in previews.items() if id in running)
        kept = {found[1] for key in batch if (found := _KEPT.fullmatch(key))}
        used.update(connection.execute(sa.select(_kept.c.key).where(_kept.c.id.in_(kept))).scalars() if kept else ())
    return used


def record_deleted(connection: Connection, id: str, seq: int, owner: str, now: float) -> None:
    """Remember the place of a deleted job in the list."""
    connection.execute(_deleted.delete().where(_deleted.c.id == id))
    connection.execute(_deleted.insert().values(id=id, seq=seq, owner=owner, deleted_at=now))


def find_place(connection: Connection, id: str, owner: str | None) -> int | None:
    """Return the `seq` of a job of this owner (None: of anyone) that exists or was deleted lately."""
    if "\0" in id:  # no id has it, and PostgreSQL cannot even be asked
        return None
    for table in (_jobs, _deleted):
        query = sa.select(table.c.seq).where(table.c.id == id)
        query = query if owner is None else query.where(table.c.owner == owner)
        if (seq := connection.execute(query).scalar()) is not None:
            return int(seq)
    return None


def forget_deleted(connection: Connection, before: float, limit: int) -> int:
    """Forget the places of jobs that were deleted before a time (unix seconds), at most `limit`; return how many."""
    oldest = sa.select(_deleted.c.id).where(_deleted.c.deleted_at < before).order_by(_deleted.c.deleted_at).limit(limit)
    return connection.execute(_deleted.delete().where(_deleted.c.id.in_(oldest))).rowcount


def record_change(connection: Connection, id: str, owner: str, now: float) -> None:
    """Tell readers that a job has changed otherwise than by its worker.

    Only in exclusive transactions: a reader must never see a number before a lower one is there.
    """
    connection.execute(_changes.insert().values(id=id, owner=owner, changed_at=now))


def find_changes(connection: Connection, after: int | None) -> tuple[int, dict[str, str]]:
    """Return the number of the latest change, and the ids of the jobs changed after a number, with their owners.

    None for `after` finds no job.
    """
    if after is None:
        return connection.execute(sa.select(sa.func.max(_changes.c.number))).scalar() or 0, {}
    query = sa.select(_changes.c.number, _changes.c.id, _changes.c.owner).where(_changes.c.number > after)
    rows = connection.execute(query.order_by(_changes.c.number)).all()
    return rows[-1].number if rows else after, {row.id: row.owner for row in rows}


def forget_changes(connection: Connection, before: float, limit: int) -> None:
    """Forget the changes before a time (unix seconds), at most `limit`."""
    number, at = _changes.c.number, _changes.c.changed_at
    oldest = sa.select(number).where(at < before).order_by(at).limit(limit)
    connection.execute(_changes.delete().where(number.in_(oldest)))
