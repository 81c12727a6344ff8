"""Logs say what belongs together, and never what is private."""

import io
import json
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from pusa.request import GenerationRequest
from pusa.server.logs import RepeatFilter, configure_logging, log_context

LOGGER = logging.getLogger("pusa.server.somewhere")


@pytest.fixture(autouse=True)
def _loggers_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


def logged(log: Any, format: Any = "json", **options: Any) -> str:
    stream = io.StringIO()
    configure_logging(format, stream=stream, **options)
    log()
    return stream.getvalue()


def test_a_line_is_json_and_names_the_request_and_the_job() -> None:
    def log() -> None:
        with log_context(request="req-1"), log_context(job="video_1"):
            LOGGER.info("created in %d ms", 3, extra={"bytes": 5})
        LOGGER.warning("outside")

    first, second = map(json.loads, logged(log).splitlines())
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "level": "info",
        "logger": "pusa.server.somewhere",
        "message": "created in 3 ms",
        "request_id": "req-1",
        "job_id": "video_1",
        "bytes": 5,
    }
    assert "request_id" not in second
    assert "job_id" not in second


def test_threads_keep_their_jobs_apart() -> None:
    def job(name: str, barrier: threading.Barrier) -> None:
        with log_context(job=name):
            barrier.wait(5)
            LOGGER.info("mine is %s", name)

    def log() -> None:
        barrier = threading.Barrier(2)
        threads = [threading.Thread(target=job, args=(name, barrier)) for name in ("video_1", "video_2")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    lines = [json.loads(line) for line in logged(log).splitlines()]
    assert sorted(line["job_id"] for line in lines) == ["video_1", "video_2"]
    assert all(line["message"] == f"mine is {line['job_id']}" for line in lines)


def test_people_get_a_short_line() -> None:
    def log() -> None:
        LOGGER.info("hello", extra={"job_id": "video_1"})

    assert logged(log, "text")[8:] == " INFO somewhere: hello (job video_1)\n"


@pytest.mark.parametrize("format", ["json", "text"])
def test_no_prompt_and_no_key_is_written(format: Any) -> None:
    refused = ["SECRET"]
    statement = "[SQL: INSERT INTO jobs VALUES (?)]\n[parameters: ('SECRET [fox]',)]\n(Background: ...)"

    def log() -> None:
        LOGGER.info("asked", extra={"prompt": "SECRET fox", "api_key": "SECRET"})
        LOGGER.info("header Authorization: Bearer SECRET-1.x and /v1/videos?key=SECRET&limit=2")
        LOGGER.info("database postgresql+psycopg://pusa:SECRET@db/pusa", extra={"url": "postgresql://pusa:SECRET@db"})
        try:
            GenerationRequest(prompt="a fox", negative_prompt=refused)  # type: ignore[arg-type]
        except ValidationError:
            LOGGER.exception("refused")
        try:
            raise RuntimeError(statement)
        except RuntimeError:
            LOGGER.exception("not stored")
        logging.getLogger("sqlalchemy.engine.Engine").info("[generated in 1s] ('SECRET',)")

    text = logged(log, format, level="debug")
    assert "SECRET" not in text
    assert "limit=2" in text
    assert "ValidationError" in text
    assert "(Background" in text


def test_what_a_client_sends_cannot_look_like_another_line() -> None:
    def log() -> None:
        with log_context(request="a\n12:00:00 INFO fake: hello"):
            LOGGER.info("upload %s", "x.png\x1b[2J\r\n12:00:00 ERROR fake: hello")

    for format in ("json", "text"):
        text = logged(log, format)
        assert text.count("\n") == 1
        assert "\x1b" not in text


def test_an_unknown_log_level_is_refused() -> None:
    with pytest.raises(ValueError) as refused:
        configure_logging(level="loud")
    assert str(refused.value) == "log level 'loud' is unknown: use debug, info, warning or error"


def test_uvicorn_says_it_in_the_same_way() -> None:
    def log() -> None:
        logging.getLogger("uvicorn.error").info("Started")

    assert json.loads(logged(log))["logger"] == "uvicorn.error"


# ---- lines that come again and again ---------------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def repeating(lines: list[str], **options: Any) -> tuple[logging.Logger, Clock]:
    """A logger whose lines pass `RepeatFilter`, and its clock."""
    clock = Clock()
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    handler.addFilter(RepeatFilter(handler.emit, clock=clock, **options))
    logger = logging.Logger("repeating")
    logger.addHandler(handler)
    return logger, clock


def test_a_line_that_comes_again_and_again_is_counted() -> None:
    lines: list[str] = []
    logger, clock = repeating(lines, most=3, seconds=10.0)
    for number in range(100_000):
        logger.error("socket %d cannot be accepted", number)
    assert len(lines) == 3
    clock.now = 10.0
    logger.info("something else")
    assert lines[3:] == ["99997 more lines like this in 10 s: socket 0 cannot be accepted", "something else"]
    logger.error("socket %d cannot be accepted", 7)
    assert lines[-1] == "socket 7 cannot be accepted"


def test_lines_that_differ_and_those_that_are_no_warnings_all_come() -> None:
    lines: list[str] = []
    logger, _ = repeating(lines, most=2)
    for _ in range(50):
        logger.info("accepted")
    for word in ("a", "b", "c"):
        for kind in (logging.WARNING, logging.ERROR):
            logger.log(kind, "this is %s", word)
            try:
                raise ValueError(word)
            except ValueError:
                logger.log(kind, "this is %s", word, exc_info=True)
    assert len(lines) == 50 + 3 * 2 * 2


def test_lines_of_very_many_kinds_take_little_memory() -> None:
    lines: list[str] = []
    clock = Clock()
    repeats = RepeatFilter(lambda record: lines.append(record.getMessage()), clock=clock)
    for number in range(5000):
        text = "".join(chr(ord("a") + int(digit)) for digit in str(number))
        assert repeats.filter(logging.LogRecord("x", logging.ERROR, "", 0, text, None, None))
    assert len(repeats.seen) <= 501


def test_the_server_writes_few_lines_of_a_kind() -> None:
    def log() -> None:
        for _ in range(1000):
            LOGGER.error("the same")

    assert len(logged(log, "text").splitlines()) == 20
