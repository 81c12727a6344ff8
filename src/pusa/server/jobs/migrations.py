"""Migrate the tables of earlier versions. A migration is never changed, so it names no table of the present program."""

from collections.abc import Callable

import sqlalchemy as sa
from sqlalchemy.engine import Connection

__all__ = ["MIGRATIONS"]

_VERSION_2 = (
    "ALTER TABLE jobs ADD COLUMN turn BIGINT NOT NULL DEFAULT 0",
    "ALTER TABLE jobs ADD COLUMN not_before DOUBLE PRECISION",
    "DROP INDEX jobs_waiting",
    "DROP INDEX jobs_of_owner_by_status",
    "DROP INDEX jobs_expiry",
    "CREATE INDEX jobs_waiting ON jobs (status, priority DESC, turn, seq)",
    "CREATE INDEX jobs_of_owner_by_status ON jobs (owner, status, seq)",
    "CREATE INDEX jobs_expiry ON jobs (status, expires_at)",
    "CREATE TABLE job_files (seq BIGINT NOT NULL, key TEXT NOT NULL, kind TEXT NOT NULL, size_bytes BIGINT, "
    "sha256 TEXT, PRIMARY KEY (seq, key), FOREIGN KEY (seq) REFERENCES jobs (seq) ON DELETE CASCADE)",
    "CREATE INDEX job_files_by_key ON job_files (key)",
    "CREATE TABLE deleted_jobs (id TEXT NOT NULL PRIMARY KEY, seq BIGINT NOT NULL, owner TEXT NOT NULL, "
    "deleted_at DOUBLE PRECISION NOT NULL)",
    "CREATE INDEX deleted_jobs_by_time ON deleted_jobs (deleted_at)",
)
_FILES_OF_ROWS = (
    "INSERT INTO job_files (seq, key, kind) SELECT jobs.seq, file.value, 'input' FROM jobs, {elements}(inputs) AS file "
    "WHERE true ON CONFLICT DO NOTHING",
    "INSERT INTO job_files (seq, key, kind) SELECT jobs.seq, file.value, 'result' FROM jobs, {pairs}(results) AS file "
    "WHERE true ON CONFLICT DO NOTHING",
    "INSERT INTO job_files (seq, key, kind) SELECT seq, checkpoint, 'checkpoint' FROM jobs "
    "WHERE checkpoint IS NOT NULL ON CONFLICT DO NOTHING",
)
_JSON_FUNCTIONS = {
    "sqlite": {"elements": "json_each", "pairs": "json_each"},
    "postgresql": {"elements": "json_array_elements_text", "pairs": "json_each_text"},
}


def add_turns_and_files(connection: Connection) -> None:
    """Add the turns of owners, the pause before another attempt, the files of jobs and the ids of deleted jobs."""
    functions = _JSON_FUNCTIONS[connection.dialect.name]
    for statement in (*_VERSION_2, *(text.format(**functions) for text in _FILES_OF_ROWS)):
        connection.execute(sa.text(statement))


def add_plan(connection: Connection) -> None:
    """Add the line that says how the model runs."""
    connection.execute(sa.text("ALTER TABLE jobs ADD COLUMN plan TEXT"))


_VERSION_4 = (
    "ALTER TABLE jobs ADD COLUMN batch TEXT",
    "ALTER TABLE jobs ADD COLUMN favourite BOOLEAN NOT NULL DEFAULT false",
    "ALTER TABLE jobs ADD COLUMN undo_until DOUBLE PRECISION",
    "ALTER TABLE jobs ADD COLUMN note_details {json} NOT NULL DEFAULT '[]'",
    "ALTER TABLE jobs ADD COLUMN error_values {json}",
    "CREATE INDEX jobs_removed ON jobs (undo_until)",
    "CREATE INDEX jobs_of_batch ON jobs (owner, batch)",
    "CREATE INDEX jobs_favourite ON jobs (owner, seq) WHERE {favourite}",
    "CREATE TABLE job_changes (number {number}, id TEXT NOT NULL, owner TEXT NOT NULL, "
    "changed_at DOUBLE PRECISION NOT NULL)",
    "CREATE INDEX job_changes_by_time ON job_changes (changed_at)",
    "CREATE TABLE files (id TEXT NOT NULL PRIMARY KEY, owner TEXT NOT NULL, sha256 TEXT NOT NULL, "
    "size_bytes BIGINT NOT NULL, key TEXT NOT NULL, name TEXT NOT NULL, info {json} NOT NULL, "
    "created_at DOUBLE PRECISION NOT NULL, used_at DOUBLE PRECISION NOT NULL)",
    "CREATE UNIQUE INDEX files_of_owner ON files (owner, sha256)",
    "CREATE INDEX files_by_use ON files (used_at)",
)


_VERSION_4_WORDS = {
    "sqlite": {"number": "INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT", "favourite": "favourite = 1"},
    "postgresql": {"number": "BIGSERIAL NOT NULL PRIMARY KEY", "favourite": "favourite"},
}


def add_files_and_marks(connection: Connection) -> None:
    """Add clients' files, batches, favourites, changes, removal that can be undone, values of notes and errors."""
    words = _VERSION_4_WORDS[connection.dialect.name]
    for statement in _VERSION_4:
        connection.execute(sa.text(statement.format(json="JSON", **words)))


def add_ended_sessions(connection: Connection) -> None:
    """Add the sessions of pages that were ended before their time."""
    statement = "CREATE TABLE ended_sessions (id TEXT NOT NULL PRIMARY KEY, expires_at DOUBLE PRECISION NOT NULL)"
    connection.execute(sa.text(statement))


MIGRATIONS: tuple[Callable[[Connection], None], ...] = (
    add_turns_and_files,
    add_plan,
    add_files_and_marks,
    add_ended_sessions,
)
"""Migrations by version: the n-th (from 1) turns version n of the tables into version n + 1."""
