"""Adapt evaluations to sweeps: each makes the run of a point from its settings, and scores it."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pusa.evaluation.fidelity.suite import FidelitySettings
from pusa.evaluation.metrics import Figure
from pusa.evaluation.runs.files import hash_of
from pusa.evaluation.runs.folder import RunFolder

if TYPE_CHECKING:
    from pusa.evaluation.vbench.scoring import Scorer


@dataclass(frozen=True)
class PointSettings:
    """Hold what a point sets: fields of requests, noise multipliers of what is given (None: the suite's), a seed."""

    fields: Mapping[str, Any]
    noise: tuple[float, ...] | None
    seed: int


class Suite(Protocol):
    """Make and score the run of a point.

    Attributes:
        name: of the suite.
    """

    @property
    def name(self) -> str: ...

    def as_json(self) -> dict[str, Any]:
        """Convert to JSON what sets the suite up, so that a folder holds one suite only; no path is in it.

        Raises ValueError, FileNotFoundError: what the suite needs is missing or damaged.
        """
        ...

    def prepare(self, folder: Path, settings: PointSettings) -> RunFolder:
        """Make the run of a point in `folder`, or open it. Raises ValueError, FileNotFoundError."""
        ...

    def score(self, run: RunFolder) -> dict[str, Figure]:
        """Score a run whose videos are made, or as many as could be: figures by name, ``GROUP/NAME`` or ``NAME``.

        Raises ValueError, RuntimeError, OSError.
        """
        ...


@dataclass(frozen=True)
class FidelitySuite:
    """Sweep `pusa eval fidelity`; all points share the files that are cut out of the clips, in `inputs`.

    Figures are called ``TASK/MEASURE``.

    Attributes:
        note: receives once why a clip is left out.
    """

    base: FidelitySettings
    inputs: Path
    name: str = "fidelity"
    note: Callable[[str], None] = lambda text: None
    _noted: set[str] = field(default_factory=set, compare=False)

    def as_json(self) -> dict[str, Any]:
        from pusa.evaluation.fidelity.clips import find_clips

        clips, _ = find_clips(self.base.source, prompts=self.base.prompts, prompt=self.base.prompt)
        values = self.base.as_json(clips[: self.base.most_clips])
        return {name: value for name, value in values.items() if name not in ("request", "noise", "seed")}  # of points

    def prepare(self, folder: Path, settings: PointSettings) -> RunFolder:
        from pusa.evaluation.fidelity.suite import prepare

        own = replace(self.base, request=settings.fields, noise=settings.noise, seed=settings.seed)
        prepared = prepare(own, self.inputs)
        for text in prepared.notes:
            if text not in self._noted:
                self._noted.add(text)
                self.note(text)
        return RunFolder.create(folder, self.name, prepared.settings, prepared.items)

    def score(self, run: RunFolder) -> dict[str, Figure]:
        from pusa.evaluation.fidelity.report import make_report, write_report
        from pusa.evaluation.fidelity.suite import score

        scored = score(run)
        report = make_report(run.settings, scored, {item.name: "" for item in run.missing()})
        write_report(report, scored, run.folder)
        return {f"{task}/{name}": figure for task, figures in report.made.items() for name, figure in figures.items()}


@dataclass(frozen=True)
class VBenchSuite:
    """Sweep VBench-I2V.

    Without a scorer, a point whose videos are made says that it has no scores yet; `pusa eval vbench score` makes them,
    and the same sweep reads them. Figures have the names of VBench's dimensions, and ``total``, ``quality`` and
    ``i2v``; all are percents.

    Attributes:
        checkout: of VBench, with its images.
        dimensions, ratio, per_prompt, count: see `pusa.evaluation.vbench.items.prepare`.
        scorer, weights: see `pusa.evaluation.vbench.scoring.score`; None: scores are only read.
    """

    checkout: Path
    dimensions: tuple[str, ...]
    ratio: str | None = None
    per_prompt: int = 5
    count: int | None = None
    scorer: "Scorer | None" = None
    weights: Path = Path()
    name: str = "vbench"

    def as_json(self) -> dict[str, Any]:
        from pusa.evaluation.vbench.suite import read_suite

        names = ("dimensions", "ratio", "per_prompt", "count")
        return {"prompts_sha256": read_suite(self.checkout).sha256} | {name: getattr(self, name) for name in names}

    def prepare(self, folder: Path, settings: PointSettings) -> RunFolder:
        from pusa.evaluation.vbench.items import prepare, request_with
        from pusa.evaluation.vbench.suite import read_suite

        noise = settings.noise or (0.0,)
        if len(noise) > 1:
            raise ValueError(f"noise has {len(noise)} numbers: VBench-I2V gives the first frame only")
        return prepare(
            folder,
            read_suite(self.checkout),
            request_with(settings.fields),
            dimensions=self.dimensions,
            ratio=self.ratio,
            per_prompt=self.per_prompt,
            count=self.count,
            noise=noise[0],
            seed=settings.seed,
        )

    def score(self, run: RunFolder) -> dict[str, Figure]:
        from pusa.evaluation.vbench import scored, scoring
        from pusa.evaluation.vbench.totals import total_of

        if self.scorer is not None:
            found = scoring.score(run, self.scorer, suite=self.checkout, weights=self.weights)
            if found.failed:
                raise RuntimeError(
                    f"{', '.join(found.failed)} could not be scored; logs are in {run.folder / 'scores'}"
                )
        known = {name: scored.read_scored(run, name) for name in self.dimensions}
        scores = {name: 100 * one.score for name, one in known.items() if one is not None and one.is_current}
        if not scores:
            raise RuntimeError(f"it has no scores yet: pusa eval vbench score {run.folder}, then the same sweep again")
        totals = total_of(scores)
        figures: dict[str, Figure] = {
            name: {"value": value, "n": len(scored.items_of(run, name))} for name, value in scores.items()
        }
        for name in ("total", "quality", "i2v"):
            interval = getattr(totals, name)
            figures[name] = {"value": interval.middle, "n": len(run.items)}
            if not interval.is_known:
                figures[name] |= {"low": interval.low, "high": interval.high}
        return figures


@dataclass(frozen=True)
class PhysicsIqSuite:
    """Sweep Physics-IQ from the user's download. Figures: ``physics_iq`` in percent, and the means against take 1.

    Attributes:
        data: the download.
        conditioning: "image" or "video".
        partial: take only the scenes whose files are there.
    """

    data: Path
    conditioning: Any = "image"
    partial: bool = False
    name: str = "physics-iq"

    def as_json(self) -> dict[str, Any]:
        from pusa.evaluation.physics_iq.dataset import Dataset

        scenes = [asdict(scene) for scene in Dataset.open(self.data).scenes]
        return {"scenes_sha256": hash_of(scenes), "conditioning": self.conditioning, "partial": self.partial}

    def prepare(self, folder: Path, settings: PointSettings) -> RunFolder:
        from pusa.evaluation.physics_iq.dataset import Dataset
        from pusa.evaluation.physics_iq.items import prepare

        fields = {**settings.fields, "seed": settings.seed}
        dataset = Dataset.open(self.data)
        return prepare(folder, dataset, self.conditioning, fields, noise=settings.noise or (0.0,), partial=self.partial)

    def score(self, run: RunFolder) -> dict[str, Figure]:
        from pusa.evaluation.physics_iq.dataset import Dataset
        from pusa.evaluation.physics_iq.measure import score_run
        from pusa.evaluation.physics_iq.scores import total

        scored = score_run(run, Dataset.open(self.data), partial_run=bool(run.missing()))
        found = total([one.scores for one in scored])
        figures: dict[str, Figure] = {"physics_iq": {"value": found.physics_iq, "n": found.scenes}}
        return figures | {name: {"value": value, "n": found.scenes} for name, value in found.take_1.items()}
