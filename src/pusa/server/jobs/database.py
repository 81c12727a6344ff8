"""The tables of the server and how they are reached: SQLite in a local file, or PostgreSQL by URL.

Committed means on disk in both. SQLite runs in WAL mode with ``synchronous=FULL`` on every connection; a PostgreSQL
that answers before it has written (``synchronous_commit=off``) is asked to write first.
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

BUSY_SECONDS = 30  # how long a connection waits for another one's write before it gives up
RETRY_SECONDS = 0.5  # before the one repetition of a statement whose connection broke
_WRITING = "pusa_writing"
_ADVISORY_LOCK = 0x50555341  # "PUSA": PostgreSQL's lock for what must happen one after the other
_SHARED_FILE_SYSTEMS = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "fuse.sshfs", "fuse.glusterfs", "lustre"}

logger = logging.getLogger(__name__)


class QueueUnavailable(Exception):  # noqa: N818 (a state of the outside world, as QueueFull)
    """The database cannot be reached or stays busy: the same call may succeed later."""


class SchemaError(Exception):
    """The tables belong to another version of pusa."""


_metadata = sa.MetaData()
_id = sa.BigInteger().with_variant(sa.Integer, "sqlite")  # only INTEGER counts by itself in SQLite
_json = sa.JSON(none_as_null=True)

schema_version = sa.Table(
    "schema_version",
    _metadata,
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("identity", sa.Text, nullable=False),  # drawn once: tells this queue's files from another's
)

jobs = sa.Table(
    "jobs",
    _metadata,
    sa.Column("seq", _id, primary_key=True, autoincrement=True),  # the order of arrival; never given out twice
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
    sa.Column("created_at", sa.Double, nullable=False),  # unix seconds, as all times here
    sa.Column("started_at", sa.Double),
    sa.Column("completed_at", sa.Double),
    sa.Column("expires_at", sa.Double),
    sa.Column("attempt", sa.Integer, nullable=False, default=0),
    sa.Column("failures", sa.Integer, nullable=False, default=0),
    sa.Column("progressed", sa.Boolean, nullable=False, default=False),  # whether this attempt has moved the checkpoint
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
"""The n-th one (from 1) turns version n of the tables into version n + 1."""


def connect(url: str) -> Engine:
    """A database whose tables are there and have this program's version.

    Args:
        url: ``sqlite:///relative.sqlite``, ``sqlite:////absolute.sqlite`` or ``postgresql://user@host/name``.

    Raises:
        ValueError: another kind of database, or a place where SQLite loses data.
        SchemaError: the tables were made by a newer version.
        QueueUnavailable: it cannot be reached.
    """
    parsed = _parsed(url)
    engine = _sqlite(parsed) if parsed.get_backend_name() == "sqlite" else _postgresql(parsed)
    try:
        with transaction(engine, exclusive=True) as connection:
            _bring_up_to_date(connection)
    except SQLAlchemyError as error:
        engine.dispose()
        raise QueueUnavailable(f"{parsed.render_as_string()} cannot be used: {_first_line(error)}") from error
    except BaseException:
        engine.dispose()
        raise
    return engine


def _parsed(url: str) -> URL:
    try:
        parsed = sa.make_url(url)
        backend = parsed.get_backend_name()
    except (ArgumentError, NoSuchModuleError):
        backend = ""  # not shown: it may hold a password
    if backend == "sqlite":
        if not parsed.database or parsed.database == ":memory:" or parsed.query.get("mode") == "memory":
            raise ValueError("a database in memory loses its jobs: give a file, such as sqlite:///jobs.sqlite")
        return parsed.set(drivername="sqlite+pysqlite")
    if backend in ("postgresql", "postgres"):
        return parsed.set(drivername="postgresql+psycopg")
    raise ValueError(
        "the database's URL is not understood: write sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE"
    )


def _sqlite(url: URL) -> Engine:
    path = Path(str(url.database))
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = _file_system(path.parent)
    if kind in _SHARED_FILE_SYSTEMS:
        raise ValueError(
            f"{path} is on a shared file system ({kind}), where SQLite's locks do not hold: use a local disk, or "
            "PostgreSQL for several machines"
        )
    engine = sa.create_engine(
        url,
        connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False},  # a connection serves one thread at a time
        pool_size=8,
        max_overflow=64,
    )

    @sa.event.listens_for(engine, "connect")
    def opened(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # Python's module would begin transactions at its own discretion
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000}")
        mode = _in_wal_mode(cursor)
        if mode != "wal":
            raise ValueError(f"SQLite stays in mode {mode!r} at {path}: use a local disk that supports WAL")
        cursor.execute("PRAGMA synchronous = FULL")
        cursor.execute("PRAGMA fullfsync = ON")  # macOS: through the disk's own cache
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.execute("PRAGMA journal_size_limit = 67108864")
        cursor.close()

    @sa.event.listens_for(engine, "begin")
    def begun(connection: Connection) -> None:
        # A transaction that reads first and writes later would fail where another one wrote in between.
        writes = connection.get_execution_options().get(_WRITING)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _in_wal_mode(cursor: Any) -> str:
    """Switching needs the file alone and does not wait for it by itself: a server may start beside another."""
    give_up_at = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            return cursor.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > give_up_at:
                raise
            time.sleep(0.02)


def _postgresql(url: URL) -> Engine:
    engine = sa.create_engine(
        url, pool_pre_ping=True, pool_size=5, max_overflow=20, pool_recycle=1800, connect_args={"connect_timeout": 10}
    )

    @sa.event.listens_for(engine, "connect")
    def opened(connection: Any, record: Any) -> None:
        connection.execute(
            "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'"
        )
        connection.commit()

    return engine


def _file_system(folder: Path) -> str | None:
    """The kind of file system a folder is on, where Linux tells."""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return None
    device = os.stat(folder).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in lines:
        before, _, after = line.partition(" - ")
        if before.split()[2] == wanted:
            return after.split()[0]
    return None


def _bring_up_to_date(connection: Connection) -> None:
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
    """A transaction that writes; on disk when this ends without an exception.

    Args:
        exclusive: one after the other on PostgreSQL too, for what reads and then writes by what it read. In SQLite
            there is one writer at any time.
    """
    with engine.connect().execution_options(**{_WRITING: True}) as connection, connection.begin():
        if exclusive and engine.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_ADVISORY_LOCK)))
        yield connection


def repeated(method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """Once more where the connection broke: for what may be done twice. Database errors become QueueUnavailable."""
    return _guarded(method, attempts=2)


def once(method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """Never again by itself; database errors become QueueUnavailable."""
    return _guarded(method, attempts=1)


def _guarded(method: Callable[Concatenate[Any, P], T], attempts: int) -> Callable[Concatenate[Any, P], T]:
    @functools.wraps(method)
    def guarded(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        for left in range(attempts - 1, -1, -1):
            try:
                return method(self, *args, **kwargs)
            except sa.exc.OperationalError as error:
                if not left or self._engine.dialect.name == "sqlite":  # SQLite has waited its BUSY_SECONDS already
                    raise QueueUnavailable(f"the job database does not answer: {_first_line(error)}") from error
                logger.warning("the job database broke off (%s): once more", _first_line(error))
            except (sa.exc.InterfaceError, sa.exc.InternalError, sa.exc.TimeoutError) as error:
                raise QueueUnavailable(f"the job database does not answer: {_first_line(error)}") from error
            time.sleep(RETRY_SECONDS)
        raise AssertionError("unreachable")

    return guarded


def _first_line(error: SQLAlchemyError) -> str:
    """What the database said, without the statement and its values: those may be prompts."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]
