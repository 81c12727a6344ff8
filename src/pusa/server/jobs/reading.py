"""Read jobs inside the transactions of `JobQueue`; each query has an index, so that none reads the whole table."""

import math
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from pusa.server.jobs import database, records
from pusa.server.jobs.job import (
    UNFINISHED,
    Condition,
    Job,
    Status,
    by_turn,
    job_from_row,
    not_removed,
    owned_by,
)

_table = database.jobs
_c = _table.c
_MOST_IDS = 10_000  # in one statement: databases have a limit
_SEARCHED = 1000  # prompts that a search holds in memory

# Every change of an unfinished job changes one of these: a worker's changes extend the lease.
_SEEN = (_c.id, _c.status, _c.attempt, _c.lease_until, _c.cancel_requested, _c.not_before, _c.favourite, _c.batch)


@dataclass(frozen=True, kw_only=True)
class JobFilter:
    """Select jobs of a list; None and "" select all.

    `words`, separated by spaces, are all in the prompt, in small or capital letters and with any accents.
    """

    words: str = ""
    task: str | None = None
    favourite: bool | None = None
    batch: str | None = None

    def conditions(self) -> list[Condition]:
        """Return the conditions that the database checks."""
        found: list[Condition] = []
        if self.task is not None:
            found.append(sa.func.coalesce(_c.request["task"].as_string(), "generate") == self.task)
        if self.favourite is not None:
            found.append(_c.favourite if self.favourite else sa.not_(_c.favourite))
        if self.batch is not None:
            found.append(_c.batch == self.batch)
        return found


EVERY_JOB = JobFilter()


@dataclass(frozen=True)
class Look:
    """Hold what a reader of all jobs sees at one moment.

    Attributes:
        number: of the latest recorded change.
        unfinished: the unfinished jobs by id: what is seen of each, its owner and its place among those that wait.
        changed: the jobs that have changed since the look before, whole.
        deleted: ids of jobs that were deleted or removed since, with their owners.
    """

    number: int
    unfinished: dict[str, tuple[tuple[Any, ...], str, int | None]]
    changed: list[Job]
    deleted: dict[str, str]


def find(connection: Connection, id: str, owner: str | None) -> Job | None:
    """Return a job if it exists, is not removed and belongs to this owner (None: to anyone)."""
    row = connection.execute(sa.select(_table).where(_c.id == id, not_removed(), *owned_by(owner))).one_or_none()
    return None if row is None else job_from_row(row)


def page(
    connection: Connection,
    owner: str | None,
    after: str | None,
    limit: int,
    newest_first: bool,
    statuses: Collection[Status] | None,
    filter: JobFilter,
) -> tuple[list[Job], bool]:
    """List jobs, see `JobQueue.page`."""
    conditions = [not_removed(), *owned_by(owner), *filter.conditions()]
    if after is not None:
        place = records.find_place(connection, after, owner)
        if place is None:
            raise KeyError(after)
        conditions.append(_beyond(place, newest_first))
    rows: list[Row[Any]] = []
    words = fold(filter.words).split()
    for status in [None] if statuses is None else statuses:  # one after the other: each has its index
        those = [*conditions, *([] if status is None else [_c.status == status])]
        if words:
            those = [_c.seq.in_(_search(connection, those, words, limit + 1, newest_first))]
        rows += connection.execute(sa.select(_table).where(*those).order_by(_order(newest_first)).limit(limit + 1))
    rows.sort(key=lambda row: row.seq, reverse=newest_first)
    return [job_from_row(row) for row in rows[:limit]], len(rows) > limit


def _search(
    connection: Connection, conditions: list[Condition], words: Sequence[str], limit: int, newest_first: bool
) -> list[int]:
    """Return the places (`seq`) of the first jobs whose prompts hold all words; reads the prompts of the owner."""
    found: list[int] = []
    beyond: list[Condition] = []
    columns = _c.seq, _c.prompt, _c.request["prompts"].label("prompts")
    while len(found) < limit:
        query = sa.select(*columns).where(*conditions, *beyond).order_by(_order(newest_first)).limit(_SEARCHED)
        rows = connection.execute(query).all()
        for row in rows:
            text = fold("\n".join([row.prompt, *(row.prompts or ())]))
            if all(word in text for word in words):
                found.append(row.seq)
        if len(rows) < _SEARCHED:
            break
        beyond = [_beyond(rows[-1].seq, newest_first)]
    return found[:limit]


def fold(text: str) -> str:
    """Return a text without what a search does not look at: capital letters, accents, forms of the same character."""
    text = text.casefold()
    return text if text.isascii() else "".join(map(_plain, text))


@lru_cache(4096)
def _plain(character: str) -> str:
    """Return a character without accents. Whole texts may take time squared: accents are sorted, one by one."""
    parts = unicodedata.normalize("NFKD", character)
    return "".join(part for part in parts if not unicodedata.combining(part))


def _order(newest_first: bool) -> sa.ColumnElement[Any]:
    return _c.seq.desc() if newest_first else _c.seq.asc()


def _beyond(place: int, newest_first: bool) -> Condition:
    return _c.seq < place if newest_first else _c.seq > place


def changes(connection: Connection, known: Mapping[str, Job]) -> tuple[list[Job], list[str]]:
    """Read what has changed, see `JobQueue.read_changes`."""
    changed: list[Job] = []
    deleted, ids = set(known), list(known)
    for start in range(0, len(ids), _MOST_IDS):
        these = _c.id.in_(ids[start : start + _MOST_IDS])
        rows = connection.execute(sa.select(*_SEEN).where(these, not_removed())).all()
        deleted.difference_update(row.id for row in rows)
        new = [row.id for row in rows if any(getattr(known[row.id], c.name) != row._mapping[c] for c in _SEEN)]
        changed += _whole(connection, new)
    return changed, list(deleted)


def look(connection: Connection, before: Look | None, owners: Collection[str]) -> Look:
    """Read what has changed since a look before, see `JobQueue.look`."""
    number, touched = records.find_changes(connection, None if before is None else before.number)
    unfinished: dict[str, tuple[tuple[Any, ...], str, int | None]] = {}
    waiting = 0
    for row in connection.execute(
        sa.select(*_SEEN, _c.owner).where(_c.status.in_(UNFINISHED), not_removed()).order_by(*by_turn())
    ):
        place = None
        if row.status == "queued":
            place, waiting = waiting, waiting + 1
        unfinished[row.id] = tuple(row), row.owner, place
    if before is None:
        return Look(number, unfinished, [], {})
    changed = dict(touched)
    for id, seen in (unfinished | before.unfinished).items():
        if unfinished.get(id) != before.unfinished.get(id):
            changed[id] = seen[1]
    wanted = [id for id, owner in changed.items() if owner in owners]
    jobs = _whole(connection, wanted)
    deleted = set(wanted) - {job.id for job in jobs}
    return Look(number, unfinished, jobs, {id: changed[id] for id in deleted})


def _whole(connection: Connection, ids: Sequence[str]) -> list[Job]:
    jobs: list[Job] = []
    for start in range(0, len(ids), _MOST_IDS):
        these = _c.id.in_(ids[start : start + _MOST_IDS])
        jobs += map(job_from_row, connection.execute(sa.select(_table).where(these, not_removed()).order_by(_c.seq)))
    return jobs


def of_owner(connection: Connection, owner: str, newest: int) -> list[Job]:
    """List an owner's unfinished jobs and the newest ones, the newest first."""
    own = sa.select(_table).where(_c.owner == owner, not_removed())
    rows = {row.seq: row for row in connection.execute(own.order_by(_c.seq.desc()).limit(newest))}
    for status in UNFINISHED:
        rows |= {row.seq: row for row in connection.execute(own.where(_c.status == status))}
    return [job_from_row(rows[seq]) for seq in sorted(rows, reverse=True)]


def any_of(connection: Connection, *groups: Sequence[Condition]) -> tuple[bool, ...]:
    """Tell for each group of conditions whether a job meets all of it."""
    return tuple(connection.execute(sa.select(*(sa.exists().where(*group) for group in groups))).one())


def position(connection: Connection, id: str) -> int:
    """Count the waiting jobs ahead of one, see `JobQueue.position`."""
    this = _table.alias("this")
    turn = sa.or_(_c.turn < this.c.turn, sa.and_(_c.turn == this.c.turn, _c.seq < this.c.seq))
    before = sa.or_(_c.priority > this.c.priority, sa.and_(_c.priority == this.c.priority, turn))
    ahead = (
        sa.select(sa.func.count())
        .select_from(this.join(_table, before))
        .where(this.c.id == id, this.c.status == "queued", _c.status == "queued")
    )
    return connection.execute(ahead).scalar_one()


def count(connection: Connection, statuses: Collection[Status]) -> dict[Status, int]:
    """Count the jobs of each of some statuses."""
    query = sa.select(_c.status, sa.func.count()).where(_c.status.in_(statuses)).group_by(_c.status)
    return dict.fromkeys(statuses, 0) | {row[0]: row[1] for row in connection.execute(query)}


def expired(connection: Connection, now: float, unfinished_before: float | None, limit: int) -> list[Job]:
    """List expired jobs, see `JobQueue.expired`."""
    ends: list[tuple[list[Condition], sa.ColumnElement[Any], float]] = [
        ([], _c.undo_until, now),
        ([_c.status == "completed"], _c.expires_at, now),
    ]
    if unfinished_before is not None:
        before = math.nextafter(unfinished_before, -math.inf)
        ends += [([_c.status == status], _c.completed_at, before) for status in ("failed", "cancelled")]
    rows: dict[int, Row[Any]] = {}
    for those, time_column, latest in ends:  # one after the other: each has its index
        query = sa.select(_table).where(*those, time_column <= latest)
        rows |= {row.seq: row for row in connection.execute(query.order_by(time_column).limit(limit))}
    return [job_from_row(rows[seq]) for seq in sorted(rows)[:limit]]
