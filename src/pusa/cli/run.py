"""A run as a person or a script sees it: a bar or lines of JSON, and a Ctrl-C that loses nothing."""

import json
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from typing import Any

import click

from pusa.events import GenerationEvent

Start = Callable[[Callable[[], bool]], Generator[GenerationEvent, None, None]]

_STOPPING = b"\nstopping after this step (Ctrl-C again to stop at once)\n"


class MissingModelError(Exception):
    """The model, or its LoRA, is not there."""


class Stopped(Exception):  # noqa: N818 (not an error: the person asked for it)
    """The run ended early because Ctrl-C was pressed."""


def run(start: Start, *, as_json: bool) -> None:
    """Show a run to its end: the paths of its files, and nothing else, go to stdout (with `as_json`, every event does).

    Args:
        start: given a function that says whether to stop, the events.

    Raises:
        Stopped: it ended early because Ctrl-C was pressed.
        RuntimeError: it ended without a file.
    """
    written = False
    with _stop_on_interrupt() as stop, _shown_as(as_json) as show, closing(start(stop)) as events:
        for event in events:
            show(event)
            written = written or event.kind == "done"
    if not written:
        raise Stopped if stop() else RuntimeError("the run ended without a file: run it again with --debug")


@contextmanager
def _stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C asks to stop, the second raises KeyboardInterrupt."""
    asked = False

    def interrupted(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, _STOPPING)  # print() may not run in a handler

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _shown_as(as_json: bool) -> Generator[Callable[[GenerationEvent], None]]:
    if as_json:
        yield lambda event: click.echo(json.dumps(event.as_json(), ensure_ascii=False))
        return
    bar = _Bar()
    try:
        yield bar.show
    finally:
        bar.close()


class _Bar:
    """One progress bar on stderr for the current stage; silent where stderr is no terminal."""

    def __init__(self) -> None:
        self._bar: Any = None

    def show(self, event: GenerationEvent) -> None:
        if event.kind == "stage":
            self._begin(event)
        elif event.kind == "step":
            if self._bar is None or self._bar.desc != event.stage:
                self._begin(event)
            self._bar.total, self._bar.n = event.steps, event.step
            self._bar.bar_format = "{desc} {bar:30} {n_fmt}/{total_fmt}" + time_left(event.seconds_left)
            self._bar.refresh()
        elif event.kind == "note":
            self.close()
            click.echo(event.message, err=True)
        elif event.kind == "done":
            self.close()
            click.echo(str(event.path))

    def _begin(self, event: GenerationEvent) -> None:
        from tqdm import tqdm

        self.close()
        self._bar = tqdm(desc=event.stage, bar_format="{desc} ...", file=sys.stderr, disable=None, leave=False)
        self._bar.desc = event.stage  # tqdm adds a colon

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def time_left(seconds: float | None) -> str:
    """``, 3 min 20 s left``, or nothing where it is not known yet."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    words = f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f", {words} left"
