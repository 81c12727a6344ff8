"""Format log records as text or JSON lines with request and job ids, without prompts and keys.

The server passes neither to a logger, but libraries quote values in their errors (pydantic the rejected input,
SQLAlchemy the parameters of a statement): these are removed before a line is written.
"""

import copy
import json
import logging
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, TextIO

from pusa.libraries import quiet_libraries

Format = Literal["text", "json"]

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""``X-Request-ID`` of the current HTTP request."""
job_id: ContextVar[str | None] = ContextVar("job_id", default=None)
"""Id of the job that is being created or run."""

PRIVATE_FIELDS = frozenset({"prompt", "negative_prompt", "authorization", "api_key", "api_keys", "prompt_key", "key"})
"""Extra fields of a record that are never written."""

_PRIVATE_TEXT = (
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]+"), r"\1 ***"),
    (re.compile(r"(?i)([?&](?:api_)?key=)[^&\s\"]+"), r"\1***"),
    (re.compile(r"(://[^:/@\s]+:)[^@/\s]+(?=@)"), r"\1***"),  # the password in a database's URL
    (re.compile(r"input_value=.*?(?=, input_type=)", re.S), "input_value=***"),
    (re.compile(r"\[parameters: .*?\](?=\n|$)", re.S), "[parameters: ***]"),
)
_RECORD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}
_VERBOSE_LIBRARIES = ("httpx", "httpcore", "sqlalchemy", "multipart", "python_multipart", "PIL", "fsspec", "asyncio")


@contextmanager
def log_context(*, request: str | None = None, job: str | None = None) -> Iterator[None]:
    """Add ids to all records of this thread or task; None keeps the id of the surrounding context."""
    tokens = [(var, var.set(value)) for var, value in ((request_id, request), (job_id, job)) if value is not None]
    try:
        yield
    finally:
        for var, token in reversed(tokens):
            var.reset(token)


def mask_secrets(text: str) -> str:
    """Replace keys, passwords and quoted input in a text by ``***``."""
    for pattern, replacement in _PRIVATE_TEXT:
        text = pattern.sub(replacement, text)
    return text


def _escape_control_characters(text: str) -> str:
    """Escape line breaks and terminal codes, so that a client's text cannot imitate a log line."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: repr(found[0])[1:-1], text)


def _ids(record: logging.LogRecord) -> dict[str, str]:
    """Read the ids of a record, or else those of the current context."""
    ids = {name: getattr(record, name, None) or var.get() for name, var in _CONTEXT.items()}
    return {name: value for name, value in ids.items() if value}


def _fields(record: logging.LogRecord) -> dict[str, object]:
    skipped = _RECORD_FIELDS | PRIVATE_FIELDS | set(_CONTEXT)
    extra = {name: value for name, value in vars(record).items() if name not in skipped}
    return {name: value for name, value in extra.items() if not name.startswith("_")}  # Ray adds private ones


_CONTEXT = {"request_id": request_id, "job_id": job_id}


class JsonFormatter(logging.Formatter):
    """Format a record as one JSON object: time (UTC), level, logger, message, ids, extra fields, error."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": mask_secrets(record.getMessage()),
            **_ids(record),
        }
        line |= {name: mask_secrets(v) if isinstance(v, str) else v for name, v in _fields(record).items()}
        if record.exc_info:
            line["error"] = mask_secrets(self.formatException(record.exc_info))
        return json.dumps(line, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """Format a record as ``12:30:05 INFO worker: text (job video_1a2b...)``."""

    def format(self, record: logging.LogRecord) -> str:
        clock = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        name = record.name.removeprefix("pusa.server.")
        text = f"{clock} {record.levelname} {name}: {_escape_control_characters(record.getMessage())}"
        notes = [f"{name.removesuffix('_id')} {value}" for name, value in _ids(record).items()]
        notes += [f"{name} {value}" for name, value in _fields(record).items()]
        if notes:
            text += _escape_control_characters(f" ({', '.join(notes)})")
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return mask_secrets(text)


@dataclass
class _Seen:
    first: logging.LogRecord
    until: float
    count: int = 1


class RepeatFilter(logging.Filter):
    """Limit the rate of equal warnings and errors, and write how many were left out.

    Otherwise a client that can provoke a log line could fill the disk. Lines that differ only in numbers are equal.

    Args:
        emit: writes the record with the number of lines left out.
        most: equal lines within `seconds`.
        clock: current time in seconds; a parameter for tests.
    """

    _MOST_KINDS = 500

    def __init__(
        self,
        emit: Callable[[logging.LogRecord], None],
        *,
        most: int = 20,
        seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self._emit, self._most, self._seconds, self._clock = emit, most, seconds, clock
        self._lock = threading.Lock()
        self.seen: dict[tuple[object, ...], _Seen] = {}  # in the order in which they expire

    def filter(self, record: logging.LogRecord) -> bool:
        with self._lock:
            return self._passes(record, self._clock())

    def _passes(self, record: logging.LogRecord, now: float) -> bool:
        self._report_expired(now)
        if record.levelno < logging.WARNING:
            return True
        error = record.exc_info[0] if record.exc_info else None
        key = (record.name, record.levelno, re.sub(r"[0-9]+", "0", record.getMessage()[:300]), error)
        seen = self.seen.get(key)
        if seen is None:
            self.seen[key] = _Seen(record, now + self._seconds)
            return True
        seen.count += 1
        return seen.count <= self._most

    def _report_expired(self, now: float) -> None:
        """Write how many lines were left out of each kind that has expired, and forget it."""
        while self.seen:
            key, seen = next(iter(self.seen.items()))
            if seen.until > now and len(self.seen) <= self._MOST_KINDS:
                return
            del self.seen[key]
            if seen.count <= self._most:
                continue
            line = copy.copy(seen.first)
            left_out, text = seen.count - self._most, seen.first.getMessage()
            line.msg, line.args = f"{left_out} more lines like this in {self._seconds:g} s: {text}", None
            line.exc_info = line.exc_text = line.stack_info = None
            self._emit(line)


def configure_logging(format: Format = "text", level: str = "info", stream: TextIO | None = None) -> None:
    """Write the records of all loggers of this process to one stream; replaces an earlier configuration.

    Args:
        format: text lines for people or JSON lines for programs.
        level: of the server's own loggers; verbose libraries (SQLAlchemy logs parameters) only warn.
        stream: stderr by default.

    Raises:
        ValueError: unknown level.
    """
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ValueError(f"log level {level!r} is unknown: use debug, info, warning or error")
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    handler.addFilter(RepeatFilter(handler.emit))
    root = logging.getLogger()
    for old in root.handlers[:]:
        if type(old) is logging.StreamHandler:  # not the handlers of a test runner or an embedding program
            root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(number)
    quiet_libraries()
    for name in _VERBOSE_LIBRARIES:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):  # they add their own handlers
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
