"""Define the job tables and open the database that holds them: SQLite in a local file, or PostgreSQL by URL.

A committed transaction is on disk in both. SQLite runs in WAL mode with ``synchronous=FULL`` on every connection; where
a PostgreSQL server has ``synchronous_commit=off``, each connection switches it on.
"""

import functools
import json
import logging
import os
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar
from urllib.parse import quote

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError

from pusa.errors import first_line
from pusa.server.jobs.migrations import MIGRATIONS

P = ParamSpec("P")
T = TypeVar("T")

BUSY_SECONDS = 30  # timeout of a connection that waits for another one's write
RETRY_SECONDS = 0.5  # delay before a statement whose connection broke is retried
_WRITING = "pusa_writing"
_ADVISORY_LOCK = 0x50555341  # "PUSA": PostgreSQL's lock for transactions that must be serialised
_RESTORE = "stop the server and restore a backup (docs/deployment.md, Backup and restore)"
_DAMAGE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_SHARED_FILE_SYSTEMS = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "fuse.sshfs", "fuse.glusterfs", "lustre"}

logger = logging.getLogger(__name__)


class QueueUnavailable(Exception):  # noqa: N818 (a state that passes, as QueueFull)
    """Report that the database cannot be reached or stays busy; the same call may succeed later."""


class QueueDamaged(QueueUnavailable):
    """Report that the database's file is damaged or gone: no call succeeds until an operator has restored it."""


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
    sa.Column("turn", sa.BigInteger, nullable=False, default=0),  # owners take turns, see `admission.next_turn`
    sa.Column("not_before", sa.Double),  # a failed attempt is repeated no earlier
    sa.Column("plan", sa.Text),  # one line: how the model runs; NULL before the first attempt
    sa.Column("batch", sa.Text),  # the client's own name for jobs made together
    sa.Column("favourite", sa.Boolean, nullable=False, default=False),
    sa.Column("undo_until", sa.Double),  # removed by its owner, who may undo it until then; NULL: not removed
    sa.Column("note_details", _json, nullable=False, default=list),  # the notes as codes with values
    sa.Column("error_values", _json),
    sa.UniqueConstraint("owner", "idempotency_key", name="jobs_idempotency"),  # NULLs differ from one another
    sqlite_autoincrement=True,
)
sa.Index("jobs_waiting", jobs.c.status, jobs.c.priority.desc(), jobs.c.turn, jobs.c.seq)
sa.Index("jobs_by_end", jobs.c.status, jobs.c.completed_at)
sa.Index("jobs_of_owner", jobs.c.owner, jobs.c.seq)
sa.Index("jobs_of_owner_by_status", jobs.c.owner, jobs.c.status, jobs.c.seq)
sa.Index("jobs_fingerprint", jobs.c.owner, jobs.c.fingerprint, jobs.c.created_at)
sa.Index("jobs_expiry", jobs.c.status, jobs.c.expires_at)
sa.Index("jobs_removed", jobs.c.undo_until)
sa.Index("jobs_of_batch", jobs.c.owner, jobs.c.batch)
sa.Index("jobs_favourite", jobs.c.owner, jobs.c.seq, sqlite_where=jobs.c.favourite, postgresql_where=jobs.c.favourite)

job_files = sa.Table(  # the files that a row of `jobs` names, to find the jobs of a file and to know a damaged one
    "job_files",
    _metadata,
    sa.Column("seq", _id, sa.ForeignKey("jobs.seq", ondelete="CASCADE"), primary_key=True, autoincrement=False),
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("kind", sa.Text, nullable=False),  # input, result or checkpoint
    sa.Column("size_bytes", sa.BigInteger),  # NULL, as the next: stored before version 2
    sa.Column("sha256", sa.Text),
)
sa.Index("job_files_by_key", job_files.c.key)

files = sa.Table(  # what clients have sent, one row for each content and owner
    "files",
    _metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("sha256", sa.Text, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("key", sa.Text, nullable=False),
    sa.Column("name", sa.Text, nullable=False),  # as the client called it
    sa.Column("info", _json, nullable=False),  # what the prober found
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("used_at", sa.Double, nullable=False),
)
sa.Index("files_of_owner", files.c.owner, files.c.sha256, unique=True)
sa.Index("files_by_use", files.c.used_at)

deleted_jobs = sa.Table(  # where a page that begins after a deleted job begins
    "deleted_jobs",
    _metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("seq", sa.BigInteger, nullable=False),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("deleted_at", sa.Double, nullable=False),
)
sa.Index("deleted_jobs_by_time", deleted_jobs.c.deleted_at)

job_changes = sa.Table(  # by clients: jobs that are new, marked, removed, restored, queued again or deleted
    "job_changes",
    _metadata,
    sa.Column("number", _id, primary_key=True, autoincrement=True),  # written in exclusive transactions: in order
    sa.Column("id", sa.Text, nullable=False),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("changed_at", sa.Double, nullable=False),
    sqlite_autoincrement=True,
)
sa.Index("job_changes_by_time", job_changes.c.changed_at)

ended_sessions = sa.Table(  # of pages, which were signed out before their cookies expired
    "ended_sessions",
    _metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("expires_at", sa.Double, nullable=False),
)

workers = sa.Table(
    "workers",
    _metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("seen_at", sa.Double, nullable=False),
    sa.Column("state", _json, nullable=False),
)


def connect(url: str, *, check: bool = True) -> Engine:
    """Open a database; create its tables or migrate them to this program's version.

    Args:
        url: ``sqlite:///relative.sqlite``, ``sqlite:////absolute.sqlite`` or ``postgresql://user@host/name``.
        check: read a whole SQLite file first to find damaged pages (a second for some 500 MB).

    Raises:
        ValueError: the URL names another kind of database, or a place where SQLite loses data.
        SchemaError: a newer version has written the tables.
        QueueUnavailable: the database cannot be reached; `QueueDamaged` if its file is damaged.
    """
    parsed = _parse_url(url)
    is_sqlite = parsed.get_backend_name() == "sqlite"
    engine = _sqlite_engine(parsed) if is_sqlite else _postgresql_engine(parsed)
    try:
        if check and is_sqlite:
            _quick_check(engine)
        with transaction(engine, exclusive=True) as connection:
            _create_or_migrate(connection)
    except SQLAlchemyError as error:
        engine.dispose()
        message = f"{parsed.render_as_string()} cannot be used: {_first_line(error)}"
        if is_damage(error):
            raise QueueDamaged(f"{message}; {_RESTORE}") from error
        raise QueueUnavailable(message) from error
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
    path = Path(str(url.database)).absolute()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if (kind := file_system(path.parent)) in _SHARED_FILE_SYSTEMS:
        raise ValueError(
            f"{path} is on a shared file system ({kind}), where SQLite's locks do not hold: use a local disk, "
            "or PostgreSQL for several machines"
        )
    _create_file(path)
    uri = f"file:{quote(str(path))}?mode=rw"  # a file that has vanished is an error, not a new and empty queue
    engine = sa.create_engine(
        url,
        # a connection serves one thread at a time
        creator=lambda: sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, check_same_thread=False),
        pool_size=8,
        max_overflow=64,
    )

    @sa.event.listens_for(engine, "checkout")
    def check_file(connection: Any, record: Any, proxy: Any) -> None:
        # SQLite goes on writing to a file that was removed: accepted jobs would be lost with the process.
        if record.info["file"] != _file_identity(path):
            raise sa.exc.DisconnectionError(f"{path} was removed or replaced")

    @sa.event.listens_for(engine, "connect")
    def set_pragmas(connection: Any, record: Any) -> None:
        record.info["file"] = _file_identity(path)
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


def _create_file(path: Path) -> None:
    """Create an empty SQLite file that only this user may read; SQLite gives the files beside it the same mode.

    An existing one is not opened: closing it would drop the locks that other connections of this process hold.
    """
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        pass
    except OSError as error:
        raise QueueUnavailable(f"{path} cannot be used: {error.strerror}") from error


def _file_identity(path: Path) -> tuple[int, int] | None:
    """Return device and inode of a file; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def missing_file(engine: Engine) -> str | None:
    """Return the reason if a SQLite file has vanished with its folder or disk; else None."""
    if engine.dialect.name != "sqlite" or _file_identity(Path(str(engine.url.database))) is not None:
        return None
    return f"the file of the job database is gone: mount its disk again, or {_RESTORE}"


def _quick_check(engine: Engine) -> None:
    """Raise QueueDamaged if a page of a SQLite file is damaged."""
    with engine.connect() as connection:
        answer = str(connection.exec_driver_sql("PRAGMA quick_check(1)").scalar())
    if answer != "ok":
        raise QueueDamaged(f"{engine.url.render_as_string()} is damaged ({answer.splitlines()[0]}): {_RESTORE}")


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
            except (sa.exc.DatabaseError, json.JSONDecodeError) as error:
                if is_damage(error):
                    self.damage = f"the job database is damaged ({_first_line(error)}): {_RESTORE}"
                    raise QueueDamaged(self.damage) from error
                if not isinstance(error, sa.exc.OperationalError | sa.exc.InternalError):
                    raise
                # SQLite has waited for BUSY_SECONDS already
                if not left or isinstance(error, sa.exc.InternalError) or self.engine.dialect.name == "sqlite":
                    raise QueueUnavailable(f"the job database does not answer: {_first_line(error)}") from error
                logger.warning("the job database broke off (%s): retrying", _first_line(error))
            except (sa.exc.InterfaceError, sa.exc.TimeoutError) as error:
                raise QueueUnavailable(f"the job database does not answer: {_first_line(error)}") from error
            time.sleep(RETRY_SECONDS)
        raise AssertionError("unreachable")

    return translated


def is_damage(error: Exception) -> bool:
    """Return True for a damaged page of SQLite, and for a value that is no longer JSON."""
    if isinstance(error, json.JSONDecodeError):
        return True
    code = getattr(getattr(error, "orig", None), "sqlite_errorcode", 0) or 0
    return code & 0xFF in _DAMAGE  # without the extended code


def _first_line(error: Exception) -> str:
    """Return the database's own message, without the statement and its values, which may be prompts."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    return first_line(cause or error)
