"""Run a sweep in a folder: the run of each point, and the results so far."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from pusa.acceleration.decisions import LoadOptions
from pusa.errors import first_line
from pusa.evaluation.metrics import Figure
from pusa.evaluation.runs.files import canonical, difference, read_json, write_json, write_new
from pusa.evaluation.runs.folder import RunFolder
from pusa.evaluation.sweep.grid import Point, in_order_of_weights
from pusa.evaluation.sweep.suites import PointSettings, Suite

FORMAT = 1
RUN_FILE = "run.json"  # of another evaluation, whose report would be mixed with the sweep's
SWEEP_FILE, RESULTS_FILE, POINTS_FOLDER = "sweep.json", "results.json", "points"

Make = Callable[[RunFolder, LoadOptions], None]


@dataclass
class Result:
    """Hold what is known of a point.

    Attributes:
        name, values, published: of the point.
        figures: by name.
        videos, made: of its run.
        seconds: that a video took, the median: the first one also loads the model.
        error: why it has no figures, or not all videos; None: nothing failed.
    """

    name: str
    values: Mapping[str, Any]
    published: Mapping[str, float]
    figures: dict[str, Figure] = field(default_factory=dict)
    videos: int = 0
    made: int = 0
    seconds: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Sweep:
    """Hold a sweep.

    Attributes:
        folder: of the sweep; each point has a run below it, whose name tells its values.
        suite: what is made and scored.
        base: fields of requests that points do not set.
        noise: noise multipliers of points that do not set them; None: the suite's.
        seed: of all points: equal items of two points begin from the same noise.
        points: in the order of the table.
        load: how models are loaded where points do not say.
    """

    folder: Path
    suite: Suite
    base: Mapping[str, Any]
    noise: tuple[float, ...] | None
    seed: int
    points: Sequence[Point]
    load: LoadOptions = field(default_factory=LoadOptions)

    def settings_of(self, point: Point) -> PointSettings:
        """Return the settings of a point: its own, and those of the sweep where it has none."""
        noise = self.noise if point.noise is None else point.noise
        return PointSettings({**self.base, **point.fields}, noise, self.seed)

    def open(self) -> None:
        """Make the folder, or check that it holds this sweep; another grid over the same settings is welcome.

        Raises:
            ValueError: it holds a sweep of another suite, or with other settings, or a run.
            ValueError, FileNotFoundError: what the suite needs is missing; nothing is written.
        """
        head = canonical(
            {
                "format": FORMAT,
                "suite": {"name": self.suite.name, **self.suite.as_json()},
                "settings": {"request": dict(self.base), "noise": self.noise, "seed": self.seed},
            }
        )
        if (self.folder / RUN_FILE).exists():
            raise ValueError(f"{self.folder} holds a run of an evaluation and no sweep: give another folder")
        path = self.folder / SWEEP_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        write_new(path, json.dumps(head, ensure_ascii=False, indent=1) + "\n")
        before = read_json(path)
        if before is None:
            raise ValueError(f"{path} is damaged: begin in another folder")
        if found := difference(before, head):
            raise ValueError(f"{self.folder} holds a sweep with other settings ({found}): give another folder")

    def prepare(self) -> list[RunFolder]:
        """Make the runs of all points, or open them; nothing is made. Raises as `Suite.prepare` does."""
        self.open()
        return [self._prepare(point) for point in self.points]

    def _prepare(self, point: Point) -> RunFolder:
        return self.suite.prepare(self.folder / POINTS_FOLDER / point.name, self.settings_of(point))

    def run(
        self, make: Make, report: Callable[[Result, int, int], None] = lambda result, done, total: None
    ) -> list[Result]:
        """Make and score all points, those of one set of weights after each other; one that fails is left out.

        Args:
            make: makes the missing videos of a run; it may raise RuntimeError when some have failed.
            report: receives each point's result, how many are done, and how many there are.

        Returns:
            The results in the order of the points; they are written to the folder after each one.
        """
        self.open()
        results = {point.name: Result(point.name, point.values, point.published) for point in self.points}
        for done, point in enumerate(in_order_of_weights(self.points), start=1):
            result = results[point.name]
            self._run_point(point, result, make)
            write_json(self.folder / RESULTS_FILE, {"points": [asdict(one) for one in results.values()]})
            report(result, done, len(results))
        return list(results.values())

    def _run_point(self, point: Point, result: Result, make: Make) -> None:
        run = None
        try:
            run = self._prepare(point)
            if run.missing():
                make(run, point.load(self.load))
        except (ValueError, RuntimeError, OSError) as error:
            result.error = first_line(error)
        if run is None:
            return
        records = [record for item in run.items if (record := run.record_of(item)) is not None]
        result.videos, result.made = len(run.items), len(run.items) - len(run.missing())
        result.seconds = median(record.seconds for record in records) if records else None
        if not result.made:
            return
        try:
            result.figures = self.suite.score(run)
        except (ValueError, RuntimeError, OSError) as error:
            result.error = result.error or first_line(error)
