"""Record the files that clients keep on the server, each owner's contents once, in the database of `JobQueue`."""

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Row

from pusa.server.jobs import database
from pusa.server.jobs.database import retried, transaction
from pusa.server.jobs.job import Condition, FileDigest
from pusa.server.jobs.queue import JobQueue
from pusa.server.jobs.queue_table import QueueTable
from pusa.server.jobs.store import FileStore

__all__ = ["ClientFile", "ClientFileTable", "FilesFull", "NewClientFile", "expire_files", "new_file_id"]

_table = database.files
_c = _table.c


def new_file_id() -> str:
    """Draw a random file id: ``file_`` and 32 hexadecimal digits."""
    return f"file_{uuid.uuid4().hex}"


@dataclass(frozen=True, kw_only=True)
class NewClientFile:
    """Hold a file that is to be kept: its digest, the client's `name` for it, and what the prober found (`info`).

    `owner` is empty or the sha256 of an API key, `key` names the content in the FileStore.
    """

    id: str
    owner: str
    digest: FileDigest
    key: str
    name: str
    info: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ClientFile(NewClientFile):
    """Hold a row of the table; times are unix seconds."""

    created_at: float
    used_at: float


class FilesFull(Exception):  # noqa: N818 (a state that passes, as QueueFull)
    """Report that an owner's files take as many bytes as they may."""

    def __init__(self, used_bytes: int, limit_bytes: int) -> None:
        self.used_bytes, self.limit_bytes = used_bytes, limit_bytes
        super().__init__(f"{used_bytes} of {limit_bytes} bytes are taken")


class ClientFileTable(QueueTable):
    """Read and write the table of clients' files. Thread-safe; raises `QueueUnavailable` as the queue does.

    Args:
        queue: whose database holds the table.
        clock: returns unix seconds.
    """

    def __init__(self, queue: JobQueue, *, clock: Callable[[], float] = time.time) -> None:
        super().__init__(queue)
        self._clock = clock

    @retried
    def add(self, new: NewClientFile, *, limit_bytes: int | None = None) -> ClientFile:
        """Keep a file, or return the owner's earlier one of the same content, which counts as used now.

        Args:
            limit_bytes: of all files of this owner; None: any.

        Raises:
            FilesFull: the limit would be exceeded.
        """
        now = self._clock()
        with transaction(self.engine, exclusive=True) as connection:
            same = [_c.owner == new.owner, _c.sha256 == new.digest.sha256]
            update = _table.update().where(*same).values(used_at=now).returning(_table)
            if (row := connection.execute(update).one_or_none()) is not None:
                return _from_row(row)
            if limit_bytes is not None:
                taken = sa.select(sa.func.coalesce(sa.func.sum(_c.size_bytes), 0)).where(_c.owner == new.owner)
                used = int(connection.execute(taken).scalar_one())
                if used + new.digest.size_bytes > limit_bytes:
                    raise FilesFull(used, limit_bytes)
            values = {
                **{name: getattr(new, name) for name in ("id", "owner", "key", "name", "info")},
                **{"sha256": new.digest.sha256, "size_bytes": new.digest.size_bytes},
                **{"created_at": now, "used_at": now},
            }
            return _from_row(connection.execute(_table.insert().values(**values).returning(_table)).one())

    @retried
    def use_same(self, owner: str, sha256: str) -> ClientFile | None:
        """Return the owner's file of this content, which counts as used now; None if there is none."""
        same = [_c.owner == owner, _c.sha256 == sha256]
        with transaction(self.engine) as connection:
            update = _table.update().where(*same).values(used_at=self._clock()).returning(_table)
            row = connection.execute(update).one_or_none()
        return None if row is None else _from_row(row)

    @retried
    def get(self, id: str, owner: str) -> ClientFile | None:
        """Return a file if it exists and belongs to this owner."""
        with self.engine.connect() as connection:
            row = connection.execute(sa.select(_table).where(*_this(id, owner))).one_or_none()
        return None if row is None else _from_row(row)

    @retried
    def use(self, id: str, owner: str, *, at_most_every_seconds: float = 0.0) -> ClientFile | None:
        """Return a file like `get`, and write that it is used now, unless that was written so lately."""
        found = self.get(id, owner)
        now = self._clock()
        if found is None or now - found.used_at < at_most_every_seconds:
            return found
        with transaction(self.engine) as connection:
            update = _table.update().where(*_this(id, owner)).values(used_at=now)
            row = connection.execute(update.returning(_table)).one_or_none()
        return None if row is None else _from_row(row)

    @retried
    def page(
        self, owner: str, *, after: str | None = None, limit: int = 20, order: Literal["asc", "desc"] = "desc"
    ) -> tuple[list[ClientFile], bool]:
        """List an owner's files by the time at which they were kept ("desc": the newest first); tell if more follow.

        Raises KeyError for an `after` that does not exist.
        """
        newest_first = order == "desc"
        conditions = [_c.owner == owner]
        with self.engine.connect() as connection:
            if after is not None:
                last = connection.execute(sa.select(_table).where(*_this(after, owner))).one_or_none()
                if last is None:
                    raise KeyError(after)
                here, place = sa.tuple_(_c.created_at, _c.id), sa.tuple_(last.created_at, last.id)
                conditions.append(here < place if newest_first else here > place)
            columns = (_c.created_at, _c.id)
            ordered = [column.desc() if newest_first else column.asc() for column in columns]
            rows = connection.execute(sa.select(_table).where(*conditions).order_by(*ordered).limit(limit + 1)).all()
        return [_from_row(row) for row in rows[:limit]], len(rows) > limit

    @retried
    def delete(self, id: str, owner: str) -> ClientFile | None:
        """Remove a row and return it; None if there is none of this owner."""
        return self._delete(_this(id, owner))

    @retried
    def expired(self, used_before: float, *, limit: int) -> list[str]:
        """List the ids of files that were last used before a time (unix seconds), the oldest first."""
        query = sa.select(_c.id).where(_c.used_at < used_before).order_by(_c.used_at).limit(limit)
        with self.engine.connect() as connection:
            return list(connection.execute(query).scalars())

    @retried
    def delete_unused(self, id: str, used_before: float) -> ClientFile | None:
        """Remove a row like `delete`, of any owner, unless it was used at this time (unix seconds) or later."""
        return self._delete([_c.id == id, _c.used_at < used_before])

    def _delete(self, this: list[Condition]) -> ClientFile | None:
        with transaction(self.engine) as connection:
            row = connection.execute(_table.delete().where(*this).returning(_table)).one_or_none()
        return None if row is None else _from_row(row)


def expire_files(table: ClientFileTable, files: FileStore, *, used_before: float, limit: int) -> int:
    """Remove at most `limit` files that were last used before a time (unix seconds); return how many.

    Jobs have copies of what they were made from, so none of them needs a file any more.
    """
    removed = [table.delete_unused(id, used_before) for id in table.expired(used_before, limit=limit)]
    for file in removed:
        if file is not None:  # it may have been used meanwhile
            files.delete(file.key)
    return sum(file is not None for file in removed)


def _this(id: str, owner: str) -> list[Condition]:
    if "\0" in id:  # no id has it, and PostgreSQL cannot even be asked
        return [sa.false()]
    return [_c.id == id, _c.owner == owner]


def _from_row(row: Row[Any]) -> ClientFile:
    values = dict(row._mapping)
    return ClientFile(digest=FileDigest(values.pop("size_bytes"), values.pop("sha256")), **values)
