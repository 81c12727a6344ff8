"""Make databases as earlier versions of the program wrote them. Nothing here follows the present tables."""

import json
from typing import Any

import sqlalchemy as sa

IDENTITY = "5f0c4f6c1d0f4f6f9a3e6d1b2c3d4e5f"

_FIRST_TABLES = """
CREATE TABLE schema_version (version INTEGER NOT NULL, identity TEXT NOT NULL);
CREATE TABLE jobs (
    seq {seq}, id TEXT NOT NULL, owner TEXT NOT NULL, request JSON NOT NULL, model TEXT NOT NULL, prompt TEXT NOT NULL,
    seconds TEXT NOT NULL, size TEXT NOT NULL, inputs JSON NOT NULL, priority INTEGER NOT NULL, parent TEXT,
    idempotency_key TEXT, fingerprint TEXT, source TEXT NOT NULL, traceparent TEXT, status TEXT NOT NULL,
    created_at {double} NOT NULL, started_at {double}, completed_at {double}, expires_at {double},
    attempt INTEGER NOT NULL, failures INTEGER NOT NULL, progressed BOOLEAN NOT NULL, lease_owner TEXT,
    lease_until {double}, cancel_requested BOOLEAN NOT NULL, stage TEXT NOT NULL, step INTEGER NOT NULL,
    steps INTEGER NOT NULL, progress {double} NOT NULL, seconds_left {double}, checkpoint TEXT,
    checkpoint_step INTEGER NOT NULL, resolved JSON, results JSON NOT NULL, notes JSON NOT NULL, timings JSON NOT NULL,
    error_code TEXT, error_message TEXT, CONSTRAINT jobs_idempotency UNIQUE (owner, idempotency_key), UNIQUE (id)
);
CREATE INDEX jobs_by_end ON jobs (status, completed_at);
CREATE INDEX jobs_fingerprint ON jobs (owner, fingerprint, created_at);
CREATE INDEX jobs_waiting ON jobs (status, priority DESC, seq);
CREATE INDEX jobs_expiry ON jobs (expires_at);
CREATE INDEX jobs_of_owner_by_status ON jobs (owner, status);
CREATE INDEX jobs_of_owner ON jobs (owner, seq);
CREATE TABLE workers (name TEXT NOT NULL, seen_at {double} NOT NULL, state JSON NOT NULL, PRIMARY KEY (name))
"""
_TYPES = {
    "sqlite": {"seq": "INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT", "double": "DOUBLE"},
    "postgresql": {"seq": "BIGSERIAL NOT NULL PRIMARY KEY", "double": "DOUBLE PRECISION"},
}
_DEFAULTS: dict[str, Any] = {
    "owner": "a" * 64,
    "request": {"task": "generate", "prompt": "a red ball “🎾”", "seed": 7, "conditions": [], "model": "mini"},
    "model": "mini",
    "prompt": "a red ball “🎾”",
    "seconds": "2",
    "size": "128x128",
    "inputs": [],
    "priority": 0,
    "source": "api",
    "created_at": 1_000_000.0,
    "attempt": 0,
    "failures": 0,
    "progressed": False,
    "cancel_requested": False,
    "stage": "",
    "step": 0,
    "steps": 0,
    "progress": 0.0,
    "checkpoint_step": 0,
    "results": {},
    "notes": [],
    "timings": {},
}


def id_of(number: int) -> str:
    """Return the id of the job with this number, 1..6."""
    return f"video_{number:032x}"


def _rows() -> list[dict[str, Any]]:
    """One job in every status, a second one that waits with a checkpoint, and one that uses the files of the first."""
    inputs = [f"inputs/{id_of(1)}/0.png"]
    video, sheet = f"results/{id_of(1)}/2/video.mp4", f"results/{id_of(1)}/2/thumbnail.webp"
    ended = {"started_at": 1_000_010.0, "completed_at": 1_000_070.0, "steps": 10, "step": 10}
    return [
        {
            **ended,
            "status": "completed",
            "inputs": inputs,
            "expires_at": 1_604_870.0,
            "attempt": 2,
            "progress": 100.0,
            "resolved": {"seed": 7, "width": 128, "height": 128, "fps": 16.0},
            "results": {"video": video, "thumbnail": sheet},
            "notes": ["rounded to 128x128"],
            "timings": {"denoise": 50.5, "decode": 9.5},
            "idempotency_key": "k",
            "fingerprint": "e" * 64,
            "traceparent": "00-1-2-01",
        },
        {**ended, "status": "failed", "error_code": "out_of_memory", "error_message": "ask for less", "failures": 1},
        {**ended, "status": "cancelled", "owner": ""},
        {
            "status": "in_progress",
            "started_at": 1_000_020.0,
            "attempt": 1,
            "lease_owner": "host/boot/1-2.00/0",
            "lease_until": 1_000_080.0,
            "stage": "denoise",
            "step": 6,
            "steps": 10,
            "progress": 55.5,
            "seconds_left": 4.5,
            "checkpoint": f"checkpoints/{id_of(4)}/1.safetensors",
            "checkpoint_step": 5,
            "progressed": True,
        },
        {
            "status": "queued",
            "attempt": 1,
            "checkpoint": f"checkpoints/{id_of(5)}/1.safetensors",
            "checkpoint_step": 5,
            "priority": 1,
        },
        {"status": "queued", "inputs": [*inputs, video], "parent": id_of(1), "source": "studio"},
    ]


def make_first_version(url: str) -> list[dict[str, Any]]:
    """Make a database of version 1 with six jobs and a worker; return the rows of the jobs."""
    engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    rows = [{**_DEFAULTS, "id": id_of(n), **row} for n, row in enumerate(_rows(), start=1)]
    with engine.begin() as connection:
        for statement in _FIRST_TABLES.format(**_TYPES[engine.dialect.name]).split(";"):
            connection.exec_driver_sql(statement)
        connection.execute(sa.text("INSERT INTO schema_version VALUES (1, :identity)"), {"identity": IDENTITY})
        for row in rows:
            values = {n: json.dumps(v) if isinstance(v, dict | list) else v for n, v in row.items()}
            names = ", ".join(values)
            marks = ", ".join(f":{name}" for name in values)
            connection.execute(sa.text(f"INSERT INTO jobs ({names}) VALUES ({marks})"), values)
        state = json.dumps({"ready": True})
        connection.execute(sa.text("INSERT INTO workers VALUES ('host/boot/1-2.00/0', 1000070, :s)"), {"s": state})
    engine.dispose()
    return rows
