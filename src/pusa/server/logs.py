"""Logs: a line of JSON for programs, a short line for people, both with the request and the job they belong to.

Prompts and keys are kept out. Nothing of the server passes them to a logger; what libraries put into the text of an
error (pydantic the refused value, SQLAlchemy the parameters of a statement) is cut out before a line is written.
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

Format = Literal["text", "json"]

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Of the HTTP request that is answered: ``X-Request-ID``."""
job_id: ContextVar[str | None] = ContextVar("job_id", default=None)
"""Of the job that is created or run."""

PRIVATE_FIELDS = frozenset({"prompt", "negative_prompt", "authorization", "api_key", "api_keys", "key"})
"""Extra fields of a record that are never written, whoever passes them."""

_PRIVATE_TEXT = (
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]+"), r"\1 ***"),
    (re.compile(r"(?i)([?&](?:api_)?key=)[^&\s\"]+"), r"\1***"),
    (re.compile(r"(://[^:/@\s]+:)[^@/\s]+(?=@)"), r"\1***"),  # the password in a database's URL
    (re.compile(r"input_value=.*?(?=, input_type=)", re.S), "input_value=***"),
    (re.compile(r"\[parameters: .*?\](?=\n|$)", re.S), "[parameters: ***]"),
)
_RECORD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}
_LOUD_LIBRARIES = ("httpx", "httpcore", "sqlalchemy", "multipart", "python_multipart", "PIL", "fsspec", "asyncio")


@contextmanager
def log_context(*, request: str | None = None, job: str | None = None) -> Iterator[None]:
    """Lines written inside, in this thread or task, carry these ids; what is None stays as it is outside."""
    tokens = [(var, var.set(value)) for var, value in ((request_id, request), (job_id, job)) if value is not None]
    try:
        yield
    finally:
        for var, token in reversed(tokens):
            var.reset(token)


def without_secrets(text: str) -> str:
    """Text with keys, passwords and quoted input replaced by ``***``."""
    for pattern, replacement in _PRIVATE_TEXT:
        text = pattern.sub(replacement, text)
    return text


def _on_one_line(text: str) -> str:
    """Line breaks and terminal codes escaped: a name sent by a client must not look like another line."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: repr(found[0])[1:-1], text)


def _ids(record: logging.LogRecord) -> dict[str, str]:
    """The ids that a record names itself, else those of the context it is formatted in."""
    found = {name: getattr(record, name, None) or var.get() for name, var in _CONTEXT.items()}
    return {name: value for name, value in found.items() if value}


def _fields(record: logging.LogRecord) -> dict[str, object]:
    skipped = _RECORD_FIELDS | PRIVATE_FIELDS | set(_CONTEXT)
    own = {name: value for name, value in vars(record).items() if name not in skipped}
    return {name: value for name, value in own.items() if not name.startswith("_")}  # a library's, such as Ray's


_CONTEXT = {"request_id": request_id, "job_id": job_id}


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, request_id, job_id, extra fields, error."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": without_secrets(record.getMessage()),
            **_ids(record),
        }
        line |= {name: without_secrets(v) if isinstance(v, str) else v for name, v in _fields(record).items()}
        if record.exc_info:
            line["error"] = without_secrets(self.formatException(record.exc_info))
        return json.dumps(line, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """``12:30:05 INFO worker: text (job video_1a2b...)``."""

    def format(self, record: logging.LogRecord) -> str:
        clock = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        name = record.name.removeprefix("pusa.server.")
        text = f"{clock} {record.levelname} {name}: {_on_one_line(record.getMessage())}"
        notes = [f"{name.removesuffix('_id')} {value}" for name, value in _ids(record).items()]
        notes += [f"{name} {value}" for name, value in _fields(record).items()]
        if notes:
            text += _on_one_line(f" ({', '.join(notes)})")
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return without_secrets(text)


@dataclass
class _Seen:
    first: logging.LogRecord
    until: float
    count: int = 1


class Repeats(logging.Filter):
    """Lets a warning or an error through a few times in a while, and then only says how often it came.

    Whoever can bring out a line at will would else fill the disk with it. Lines are the same that differ in numbers
    alone.

    Args:
        emit: writes the line that says how often.
        most: lines of a kind in `seconds`.
        clock: seconds, for tests.
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
        self._seen: dict[tuple[object, ...], _Seen] = {}  # in the order in which they end, as all last as long

    def filter(self, record: logging.LogRecord) -> bool:
        with self._lock:
            return self._is_let_through(record, self._clock())

    def _is_let_through(self, record: logging.LogRecord, now: float) -> bool:
        self._tell(now)
        if record.levelno < logging.WARNING:
            return True
        error = record.exc_info[0] if record.exc_info else None
        key = (record.name, record.levelno, re.sub(r"[0-9]+", "0", record.getMessage()[:300]), error)
        seen = self._seen.get(key)
        if seen is None:
            self._seen[key] = _Seen(record, now + self._seconds)
            return True
        seen.count += 1
        return seen.count <= self._most

    def _tell(self, now: float) -> None:
        """Say of each kind whose time is over how many lines were left out, and forget it."""
        while self._seen:
            key, seen = next(iter(self._seen.items()))
            if seen.until > now and len(self._seen) <= self._MOST_KINDS:
                return
            del self._seen[key]
            if seen.count <= self._most:
                continue
            line = copy.copy(seen.first)
            left_out, text = seen.count - self._most, seen.first.getMessage()
            line.msg, line.args = f"{left_out} more lines like this in {self._seconds:g} s: {text}", None
            line.exc_info = line.exc_text = line.stack_info = None
            self._emit(line)


def configure_logging(format: Format = "text", level: str = "info", stream: TextIO | None = None) -> None:
    """Send every logger of this process to one stream, stderr by default; what was set up before is replaced.

    Args:
        format: for people or for programs.
        level: of the server's own loggers; libraries that talk a lot, SQL with its parameters for one, only warn.

    Raises:
        ValueError: an unknown level.
    """
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ValueError(f"log level {level!r} is unknown: use debug, info, warning or error")
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    handler.addFilter(Repeats(handler.emit))
    root = logging.getLogger()
    for old in root.handlers[:]:
        if type(old) is logging.StreamHandler:  # not the handlers of a test runner or of an embedding program
            root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(number)
    for name in _LOUD_LIBRARIES:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):  # they bring handlers of their own
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
