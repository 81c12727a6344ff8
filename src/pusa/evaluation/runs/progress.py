"""Report how many videos of a run are made, by this process or by others, and the time left."""

import os
import time
from collections.abc import Iterable

from pusa.evaluation.runs.folder import RunFolder
from pusa.evaluation.runs.items import SUFFIX, Item
from pusa.events import Event, Note, Planned, Report, Step

STAGE = "videos"

_COUNT_SECONDS = 5.0  # between two looks at what other processes have made


class NotesOnce:
    """Report notes and how a model runs, each text once, and no other events: every video has the same to say.

    Threads may share it, and it may be pickled if `report` may.

    Attributes:
        report: receives the events; None drops them.
    """

    def __init__(self, report: Report | None = None) -> None:
        self.report = report
        self._seen: dict[str, Event] = {}

    def __call__(self, event: Event) -> None:
        text = event.message if isinstance(event, Note) else event.summary if isinstance(event, Planned) else None
        if text is None or self.report is None:
            return
        if self._seen.setdefault(text, event) is event:
            self.report(event)


class RunProgress:
    """Count the videos of a run as they appear in its folder.

    Attributes:
        made: the last count.
    """

    def __init__(self, run: RunFolder, items: Iterable[Item]) -> None:
        self._videos, self._names = run.videos, {f"{item.name}{SUFFIX}" for item in items}
        self._start, self._first = time.monotonic(), self._count()
        self._counted_at, self.made = self._start, -1

    def report(self, report: Report, *, sometimes: bool = False) -> None:
        """Report the count if it has changed; with `sometimes` look only every few seconds."""
        now = time.monotonic()
        if sometimes and now - self._counted_at < _COUNT_SECONDS:
            return
        self._counted_at, made = now, self._count()
        if made == self.made:
            return
        self.made = made
        seconds_left = None
        if made > self._first:
            seconds_left = round((now - self._start) / (made - self._first) * (len(self._names) - made), 1)
        report(Step(made, len(self._names), seconds_left, STAGE))

    def _count(self) -> int:
        try:
            with os.scandir(self._videos) as entries:
                return sum(entry.name in self._names for entry in entries)
        except FileNotFoundError:
            return 0
