"""Define the job tables and open the database that holds them: SQLite in a local file, or PostgreSQL by URL.

A committed transaction is on disk in both. SQLite runs in WAL mode with ``synchronous=FULL`` on every connection; where
a PostgreSQL server has ``synchronous_commit=off``, each connection switches it on.
"""

import functools
import logging
import os
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError

P = ParamSpec("P")
T = TypeVar("T")

BUSY_SECONDS = 30  # timeout of a connection that waits for another one's write
RETRY_SECONDS = 0.5  # delay before a statement whose connection broke is retried
_WRITING = "pusa_writing"
_ADVISORY_LOCK = 0x50555341  # "PUSA": PostgreSQL's lock for transactions that must be serialised
_SHARED_FILE_SYSTEMS = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "fuse.sshfs", "fuse.glusterfs", "lustre"}

logger = logging.getLogger(__name__)


class QueueUnavailable(Exception):  # noqa: N818 (a state that passes, as QueueFull)
    """Report that the database cannot be reached or stays busy; the same call may succeed later."""


class SchemaError(Exception):
    """Report that another version of pusa has written the tables."""


_metadata = sa.MetaData()
_id = sa.BigInteger().with_variant(sa.Integer, "sqlite")  # SQLite increments only INTEGER keys by itself
_json = sa.JSON(none_as_null=True)

schema_version = sa.Table(
    "schema_version",
    _metadata,
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column(
        "identity", sa.Text, nullable=False
    ),  # random, written once: distinguishes this queue's files from another's
)

jobs = sa.Table(
    "jobs",
    _metadata,
    sa.Column("seq", _id, primary_key=True, autoincrement=True),  # the order of arrival; never reused
    sa.Column("id", sa.Text, nullable=False, unique=True),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("request", _json, nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("prompt", sa.Text, nullable=False),
    sa.Column("seconds", sa.Text, nullable=False),
    sa.Column("size", sa.Text, nullable=False),
    sa.Column("inputs", _json, nullable=False),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("parent", sa.Text),
    sa.Column("idempotency_key", sa.Text),
    sa.Column("fingerprint", sa.Text),
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("traceparent", sa.Text),
    sa.Column("status", sa.Text, nullable=False, default="queued"),
    sa.Column("created_at", sa.Double, nullable=False),  # unix seconds, like every time in this table
    sa.Column("started_at", sa.Double),
    sa.Column("completed_at", sa.Double),
    sa.Column("expires_at", sa.Double),
    sa.Column("attempt", sa.Integer, nullable=False, default=0),
    sa.Column("failures", sa.Integer, nullable=False, default=0),
    sa.Column("progressed", sa.Boolean, nullable=False, default=False),  # this attempt has advanced the checkpoint
    sa.Column("lease_owner", sa.Text),
    sa.Column("lease_until", sa.Double),
    sa.Column("cancel_requested", sa.Boolean, nullable=False, default=False),
    sa.Column("stage", sa.Text, nullable=False, default=""),
    sa.Column("step", sa.Integer, nullable=False, default=0),
    sa.Column("steps", sa.Integer, nullable=False, default=0),
    sa.Column("progress", sa.Double, nullable=False, default=0.0),
    sa.Column("seconds_left", sa.Double),
    sa.Column("checkpoint", sa.Text),
    sa.Column("checkpoint_step", sa.Integer, nullable=False, default=0),
    sa.Column("resolved", _json),
    sa.Column("results", _json, nullable=False, default=dict),
    sa.Column("notes", _json, nullable=False, default=list),
    sa.Column("timings", _json, nullable=False, default=dict),
    sa.Column("error_code", sa.Text),
    sa.Column("error_message", sa.Text),
    sa.UniqueConstraint("owner", "idempotency_key", name="jobs_idempotency"),  # NULLs differ from one another
    sqlite_autoincrement=True,
)
sa.Index("jobs_waiting", jobs.c.status, jobs.c.priority.desc(), jobs.c.seq)
sa.Index("jobs_by_end", jobs.c.status, jobs.c.completed_at)
sa.Index("jobs_of_owner", jobs.c.owner, jobs.c.seq)
sa.Index("jobs_of_owner_by_status", jobs.c.owner, jobs.c.status)
sa.Index("jobs_fingerprint", jobs.c.owner, jobs.c.fingerprint, jobs.c.created_at)
sa.Index("jobs_expiry", jobs.c.expires_at)

workers = sa.Table(
    "workers",
    _metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("seen_at", sa.Double, nullable=False),
    sa.Column("state", _json, nullable=False),
)

MIGRATIONS: tuple[Callable[[Connection], None], ...] = ()
"""Migrations by version: the n-th (from 1) turns version n of the tables into version n + 1."""


def connect(url: str) -> Engine:
    """Open a database; create its tables or migrate them to this program's version.

    Args:
        url: ``sqlite:///relative.sqlite``, ``sqlite:////absolute.sqlite`` or ``postgresql://user@host/name``.

    Raises:
        ValueError: the URL names another kind of database, or a place where SQLite loses data.
        SchemaError: a newer version has written the tables.
        QueueUnavailable: the database cannot be reached.
    """
    parsed = _parse_url(url)
    engine = _sqlite_engine(parsed) if parsed.get_backend_name() == "sqlite" else _postgresql_engine(parsed)
    try:
        with transaction(engine, exclusive=True) as connection:
            _create_or_migrate(connection)
    except SQLAlchemyError as error:
        engine.dispose()
        raise QueueUnavailable(f"{parsed.render_as_string()} cannot be used: {_first_line(error)}") from error
    except BaseException:
        engine.dispose()
        raise
    return engine


def _parse_url(url: str) -> URL:
    try:
        parsed = sa.make_url(url)
        backend = parsed.get_backend_name()
    except (ArgumentError, NoSuchModuleError):
        backend = ""  # the message does not show the URL, which may hold a password
    if backend == "sqlite":
        if not parsed.database or parsed.database == ":memory:" or parsed.query.get("mode") == "memory":
            raise ValueError("a database in memory loses its jobs: give a file, such as sqlite:///jobs.sqlite")
        return parsed.set(drivername="sqlite+pysqlite")
    if backend in ("postgresql", "postgres"):
        return parsed.set(drivername="postgresql+psycopg")
    raise ValueError(
        "the database's URL is not understood: write sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE"
    )


def _sqlite_engine(url: URL) -> Engine:
    path = Path(str(url.database))
    path.parent.mkdir(parents=True, exist_ok=True)
    if (kind := file_system(path.parent)) in _SHARED_FILE_SYSTEMS:
        raise ValueError(
            f"{path} is on a shared file system ({kind}), where SQLite's locks do not hold: use a local disk, "
            "or PostgreSQL for several machines"
        )
    engine = sa.create_engine(
        url,
        connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False},  # a connection serves one thread at a time
        pool_size=8,
        max_overflow=64,
    )

    @sa.event.listens_for(engine, "connect")
    def set_pragmas(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # `begin` below starts transactions, not Python's module
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000}")
        mode = _switch_to_wal(cursor)
        if mode != "wal":
            raise ValueError(f"SQLite stays in mode {mode!r} at {path}: use a local disk that supports WAL")
        cursor.execute("PRAGMA synchronous = FULL")
        cursor.execute("PRAGMA fullfsync = ON")  # macOS: flush the disk's own cache as well
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.execute("PRAGMA journal_size_limit = 67108864")
        cursor.close()

    @sa.event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A transaction that reads first and writes later would fail if another one wrote in between.
        writes = connection.get_execution_options().get(_WRITING)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _switch_to_wal(cursor: Any) -> str:
    """Switch the file to WAL mode and return its journal mode.

    The switch needs exclusive access and SQLite does not wait for it, so retry: another server may start as well.
    """
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            return cursor.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _postgresql_engine(url: URL) -> Engine:
    engine = sa.create_engine(
        url, pool_pre_ping=True, pool_size=5, max_overflow=20, pool_recycle=1800, connect_args={"connect_timeout": 10}
    )

    @sa.event.listens_for(engine, "connect")
    def commit_synchronously(connection: Any, record: Any) -> None:
        connection.execute(
            "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'"
        )
        connection.commit()

    return engine


def file_system(folder: Path) -> str | None:
    """Return the type of the file system that holds a folder; None outside Linux."""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return None
    device = os.stat(folder).st_dev
    device_number = f"{os.major(device)}:{os.minor(device)}"
    for line in lines:
        before, _, after = line.partition(" - ")
        if before.split()[2] == device_number:
            return after.split()[0]
    return None


def _create_or_migrate(connection: Connection) -> None:
    newest = 1 + len(MIGRATIONS)
    if not sa.inspect(connection).has_table(schema_version.name):
        _metadata.create_all(connection)
        connection.execute(schema_version.insert().values(version=newest, identity=uuid.uuid4().hex))
        return
    version = connection.execute(sa.select(schema_version.c.version)).scalar_one()
    if version > newest:
        raise SchemaError(
            f"the job table has version {version} and this pusa knows up to {newest}: install the newer pusa that "
            "wrote it, or give another database"
        )
    for migrate in MIGRATIONS[version - 1 :]:
        migrate(connection)
    connection.execute(schema_version.update().values(version=newest))


@contextmanager
def transaction(engine: Engine, *, exclusive: bool = False) -> Iterator[Connection]:
    """Open a writing transaction; it is on disk when the block ends without an exception.

    Args:
        exclusive: serialise on PostgreSQL too, for transactions that write by what they have read. SQLite has one
            writer at any time.
    """
    with engine.connect().execution_options(**{_WRITING: True}) as connection, connection.begin():
        if exclusive and engine.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_ADVISORY_LOCK)))
        yield connection


def retried(method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """Run an idempotent method again if its connection breaks; database errors become QueueUnavailable."""
    return _translate_errors(method, attempts=2)


def not_retried(method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """Run a method that must not run twice; database errors become QueueUnavailable."""
    return _translate_errors(method, attempts=1)


def _translate_errors(method: Callable[Concatenate[Any, P], T], attempts: int) -> Callable[Concatenate[Any, P], T]:
    @functools.wraps(method)
    def translated(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        for left in range(attempts - 1, -1, -1):
            try:
                return method(self, *args, **kwargs)
            except sa.exc.OperationalError as error:
                if not left or self.engine.dialect.name == "sqlite":  # SQLite has waited for BUSY_SECONDS already
                    raise QueueUnavailable(f"the job database does not answer: {_first_line(error)}") from error
                logger.warning("the job database broke off (%s): retrying", _first_line(error))
            except (sa.exc.InterfaceError, sa.exc.InternalError, sa.exc.TimeoutError) as error:
                raise QueueUnavailable(f"the job database does not answer: {_first_line(error)}") from error
            time.sleep(RETRY_SECONDS)
        raise AssertionError("unreachable")

    return translated


def _first_line(error: SQLAlchemyError) -> str:
    """Return the database's own message, without the statement and its values, which may be prompts."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]
