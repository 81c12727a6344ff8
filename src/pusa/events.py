"""Report the progress of a run: one vocabulary for progress bars, event streams, scripts and workers.

Events are plain and picklable, so that a worker receives the very events that its engine process reports.
"""

import queue
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pusa.codes import code_of, values_of
from pusa.threads import release_threads


@dataclass(frozen=True)
class _Event:
    """Share the JSON form of events."""

    @property
    def kind(self) -> str:
        """Name of the event for programs: ``stage``, ``step``, ``note``, ..."""
        return type(self).__name__.lower()

    def as_json(self) -> dict[str, Any]:
        """Convert to plain JSON, without fields that are not set."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"kind": self.kind} | {name: value for name, value in values.items() if value not in (None, "", ())}


@dataclass(frozen=True)
class Resolved(_Event):
    """Report the request with every field filled, as JSON of a `pusa.request.ResolvedRequest`."""

    request: dict[str, Any]


@dataclass(frozen=True)
class Planned(_Event):
    """Report how the model runs on this machine, in one line, and why; again when a smaller plan takes over."""

    summary: str
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage(_Event):
    """Report that a stage begins: "load", "encode", "denoise", "decode", ...; `steps` if their number is known."""

    stage: str
    steps: int = 0

    def as_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "stage": self.stage} | ({"step": 0, "steps": self.steps} if self.steps else {})


@dataclass(frozen=True)
class Step(_Event):
    """Report that the `step`-th of `steps` of a stage is done (denoising: over all windows of the video).

    The steps of `BYTE_STAGES` are megabytes.
    Encoding counts the loading of the text encoder, if it was not there, and each prompt.
    """

    step: int
    steps: int
    seconds_left: float | None = None
    stage: str = "denoise"


BYTE_STAGES = frozenset(("load", "convert"))


@dataclass(frozen=True)
class UnknownWord:
    """Hold a word of a prompt that the model was not trained on, and known phrases, the nearest first."""

    word: str
    nearest: tuple[str, ...]


@dataclass(frozen=True)
class Note(_Event):
    """Tell a person what was rounded or ignored, or which words of the prompt the model does not know.

    `code` and `values` say the same to a program, see `pusa.codes`; a note for people at the command line has none.
    """

    message: str
    unknown_words: tuple[UnknownWord, ...] = ()
    code: str = ""
    values: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, text: str, unknown_words: tuple[UnknownWord, ...] = ()) -> "Note":
        """Make a note of a text, with its code and values if it is a `pusa.codes.CodedText`."""
        return cls(str(text), unknown_words, code_of(text), values_of(text))

    def as_json(self) -> dict[str, Any]:
        words = {"unknown_words": [asdict(word) for word in self.unknown_words]} if self.unknown_words else {}
        coded = {"code": self.code, "values": self.values} if self.code else {}
        return {"kind": self.kind, "message": self.message} | words | coded


@dataclass(frozen=True)
class Preview(_Event):
    """Show the video so far as one WebP image."""

    image: bytes

    def as_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "stage": "denoise"}  # without the image


@dataclass(frozen=True)
class Frames(_Event):
    """Report how many frames of a video are done that is made piece by piece.

    Attributes:
        total: frames of the whole video; None: not known before its end.
        path: file that has them, and grows with the video; None: there is none.
    """

    done: int
    total: int | None = None
    path: Path | None = None

    def as_json(self) -> dict[str, Any]:
        return super().as_json() | ({} if self.path is None else {"path": str(self.path)})


@dataclass(frozen=True)
class Checkpoint(_Event):
    """Report a complete file with the latents of `step` steps (or of more, once it is read)."""

    path: Path
    step: int

    def as_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "step": self.step, "path": str(self.path)}


@dataclass(frozen=True)
class Done(_Event):
    """Report written files by kind ("video", ...), and timings: seconds by stage, and ``peak_memory_mb``."""

    files: dict[str, Path]
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """Return the first of the files."""
        return next(iter(self.files.values()))

    def as_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "path": str(self.path)}


Event = Resolved | Planned | Stage | Step | Note | Preview | Frames | Checkpoint | Done
Report = Callable[[Event], None]
Events = Generator[Event, None, None]


class BytesProgress:
    """Report the bytes of a stage as steps of a megabyte with the time left; called with those done and all.

    Args:
        stage: one of `BYTE_STAGES`.
        every_seconds: time from the first call to the first report, and between two: what is over sooner reports none.
    """

    def __init__(
        self, report: Report, stage: str, *, every_seconds: float = 0.5, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._report, self._stage, self._every_seconds, self._clock = report, stage, every_seconds, clock
        self._first: tuple[float, int] | None = None  # a download may precede the first call
        self._reported_at = 0.0

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        now = self._clock()
        if self._first is None:
            self._first, self._reported_at = (now, done_bytes), now
        began_at, before_bytes = self._first
        if now - self._reported_at < self._every_seconds or done_bytes <= before_bytes:
            return
        self._reported_at = now
        seconds_left = (now - began_at) * (total_bytes - done_bytes) / (done_bytes - before_bytes)
        self._report(Step(done_bytes // 10**6, max(1, total_bytes // 10**6), round(seconds_left, 1), self._stage))


class RunEnded(BaseException):
    """Unwind a run that must end; not an Exception, so that no handler on the way keeps it."""


def report_until_stopped(report: Report, stop: Callable[[], bool]) -> Report:
    """Wrap a report function to raise `RunEnded` once `stop` returns True."""

    def report_or_stop(event: Event) -> None:
        if stop():
            raise RunEnded
        report(event)

    return report_or_stop


def as_events(run: Callable[[Report], None]) -> Events:
    """Turn a function that reports events into a generator: it runs in a thread, at most one event ahead.

    Closing the generator, or a `KeyboardInterrupt`, raises `RunEnded` inside the function at its next report. The
    generator raises the exceptions of the function.
    """
    events: queue.Queue[Event | BaseException | None] = queue.Queue(maxsize=1)
    ended = threading.Event()

    def report(event: Event) -> None:
        if ended.is_set():
            raise RunEnded
        events.put(event)

    def work() -> None:
        try:
            run(report)
            events.put(None)
        except RunEnded:
            events.put(None)
        except BaseException as error:
            events.put(error)

    worker = threading.Thread(target=work, name="pusa-generate", daemon=True)
    release_threads()  # of this thread, which waits from now on
    worker.start()
    wait_seconds: float | None = None
    try:
        while (event := events.get()) is not None:
            if isinstance(event, BaseException):
                raise event
            yield event
    except KeyboardInterrupt:
        wait_seconds = 2.0  # enough to remove a partial file, not to finish a step
        raise
    finally:
        ended.set()
        while worker.is_alive():
            try:
                events.get_nowait()  # lets a waiting `put` return, so that the next report ends the run
            except queue.Empty:
                worker.join(0.02 if wait_seconds is None else wait_seconds)
                if wait_seconds is not None:
                    break
