"""Show a run as a progress bar or as lines of JSON, and stop it cleanly on Ctrl-C."""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from typing import Any

import click

from pusa.events import BYTE_STAGES, Done, Event, Events, Frames, Note, Planned, Stage, Step
from pusa.resources import readable_time

Start = Callable[[Callable[[], bool]], Events]

SILENCE_SECONDS = 20.0  # of a command that works, where no progress bar can be drawn

_STOPPING = b"\nstopping after this step (Ctrl-C again to stop at once)\n"


class MissingModelError(Exception):
    """Report that the model, or its LoRA, does not exist."""


class Stopped(Exception):  # noqa: N818 (not an error: the user asked for it)
    """Report that Ctrl-C ended the run early."""


def run(start: Start, *, as_json: bool) -> None:
    """Show a run to its end. Only the paths of its files go to stdout, or every event with `as_json`.

    Args:
        start: starts the run; its argument returns True if the run must stop.

    Raises:
        Stopped: Ctrl-C ended the run early.
        RuntimeError: it ended without a file.
    """
    written = False
    with _stop_on_interrupt() as stop, _display(as_json) as show, closing(start(stop)) as events:
        is_growing = False
        for event in events:
            show(event)
            if isinstance(event, Frames) and event.path is not None and not (as_json or is_growing):
                show(Note(f"watch the beginning in {event.path} while the rest is made"))
                is_growing = True
            written = written or isinstance(event, Done)
    if not written:
        raise Stopped if stop() else RuntimeError("the run ended without a file: run it again with --debug")


@contextmanager
def _stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Set a flag on the first Ctrl-C; raise KeyboardInterrupt on the second."""
    is_interrupted = False

    def handle(number: int, frame: Any) -> None:
        nonlocal is_interrupted
        if is_interrupted:
            raise KeyboardInterrupt
        is_interrupted = True
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, _STOPPING)  # print() may not run in a handler

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: is_interrupted
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _display(as_json: bool) -> Generator[Callable[[Event], None]]:
    if as_json:
        yield lambda event: click.echo(json.dumps(event.as_json(), ensure_ascii=False))
        return
    bar = _Bar() if sys.stderr.isatty() else _Lines()
    try:
        yield bar.show
    finally:
        bar.close()


class _Lines:
    """Write a line about the current stage to stderr, which is no terminal, every `SILENCE_SECONDS`."""

    def __init__(self) -> None:
        self._text = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def _write(self) -> None:
        while not self._ended.wait(SILENCE_SECONDS):
            if self._text:
                click.echo(self._text, err=True)

    def show(self, event: Event) -> None:
        match event:
            case Stage(stage):
                self._text = f"{stage} ..."
            case Step(step, steps, seconds_left, stage):
                self._text = f"{stage} {_count(stage, step, steps)}{time_left(seconds_left)}"
            case Note(message):
                click.echo(message, err=True)
            case Planned():
                _show_plan(event)
            case Done():
                click.echo(str(event.path))

    def close(self) -> None:
        self._ended.set()
        self._thread.join()


class _Bar:
    """Draw a progress bar for the current stage on stderr, a terminal."""

    def __init__(self) -> None:
        self._bar: Any = None

    def show(self, event: Event) -> None:
        match event:
            case Stage(stage):
                self._begin(stage)
            case Step(step, steps, seconds_left, stage):
                if self._bar is None or self._bar.desc != stage:
                    self._begin(stage)
                self._bar.total, self._bar.n = steps, step
                self._bar.bar_format = f"{{desc}} {{bar:30}} {_count(stage, step, steps)}{time_left(seconds_left)}"
                self._bar.refresh()
            case Note(message):
                self.close()
                click.echo(message, err=True)
            case Planned():
                self.close()
                _show_plan(event)
            case Done():
                self.close()
                click.echo(str(event.path))

    def _begin(self, stage: str) -> None:
        from tqdm import tqdm

        self.close()
        self._bar = tqdm(desc=stage, bar_format="{desc} ...", file=sys.stderr, disable=None, leave=False)
        self._bar.desc = stage  # tqdm adds a colon

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _show_plan(event: Planned) -> None:
    """Write how the model runs to stderr, if there was anything to decide."""
    if event.reasons:
        click.echo("\n  ".join((event.summary, *event.reasons)), err=True)


def _count(stage: str, step: int, steps: int) -> str:
    return f"{step / 1000:.1f} of {steps / 1000:.1f} GB" if stage in BYTE_STAGES else f"{step}/{steps}"


def time_left(seconds: float | None) -> str:
    """Format ``, 3 min 20 s left``; empty if unknown."""
    return "" if seconds is None else f", {readable_time(seconds)} left"
