"""Record the workers inside the transactions of `JobQueue`."""

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from pusa.server.jobs import database
from pusa.server.jobs.job import WorkerRecord

_table = database.workers


def record(connection: Connection, name: str, state: Mapping[str, Any], now: float) -> None:
    """Write that a worker is alive, and its state."""
    values = {"seen_at": now, "state": dict(state)}
    if not connection.execute(_table.update().where(_table.c.name == name).values(**values)).rowcount:
        connection.execute(_table.insert().values(name=name, **values))


def forget(connection: Connection, name: str) -> None:
    """Remove the record of a worker."""
    connection.execute(_table.delete().where(_table.c.name == name))


def read(connection: Connection, since: float | None) -> list[WorkerRecord]:
    """List the workers by name, or only those seen since a time (unix seconds)."""
    query = sa.select(_table).order_by(_table.c.name)
    if since is not None:
        query = query.where(_table.c.seen_at >= since)
    return [WorkerRecord(**row._mapping) for row in connection.execute(query)]
