"""Make the items of a fidelity run out of the user's clips, and score its videos."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from pusa.evaluation.fidelity.baselines import BASELINES, cross_fade, still
from pusa.evaluation.fidelity.clips import Clip, find_clips, prepare_inputs
from pusa.evaluation.fidelity.measures import MEASURE_VERSION, MEASURES, Values, load_skimage, measure
from pusa.evaluation.fidelity.tasks import EXTENSIONS, TASKS, Layout, TaskName, cut, lay_out, request_of
from pusa.evaluation.metrics import Figure, mean, ratio
from pusa.evaluation.runs.checks import resolve
from pusa.evaluation.runs.files import canonical, read_json, write_json
from pusa.evaluation.runs.folder import RunFolder
from pusa.evaluation.runs.items import Item, seed_of
from pusa.fsutil import sha256_of
from pusa.media import MediaError, read_video
from pusa.request import GenerationRequest, ResolvedRequest

SUITE = "fidelity"
MADE, REAL, THROUGH_VAE = "made", "real clips", "through the VAE"
ROWS = (MADE, REAL, THROUGH_VAE, *BASELINES)

_VAE_SEED = 0  # nothing is drawn: all frames are kept
_WEIGHTS = ("model", "lora", "lora_layers", "fast", "alpha", "alpha_2")  # equal ones, so that nothing is loaded anew

Table = dict[str, dict[str, Figure]]
"""Figures by row (`ROWS`) and measure."""


@dataclass(frozen=True)
class FidelitySettings:
    """Hold what a fidelity run makes.

    Attributes:
        source, prompts, prompt: see `pusa.evaluation.fidelity.clips.find_clips`.
        request: fields of a `GenerationRequest` that all videos have, such as model, steps or alpha.
        noise: noise multipliers of what is given, see `request_of`; None: the preset's.
        encode: of pictures after the first frame; None: the model's.
        tasks: some of `TASKS`; ``vae`` is always made, as it costs one step.
        count: videos of each clip and task, each with its own seed.
        extensions: in a row.
        seed: what all seeds are derived from.
        most_clips: so many at most, the first ones by name; None: all.
    """

    source: Path
    prompts: Path | None = None
    prompt: str | None = None
    request: Mapping[str, Any] = field(default_factory=dict)
    noise: tuple[float, ...] | None = None
    encode: Literal["single", "repeat"] | None = None
    tasks: tuple[TaskName, ...] = tuple(task for task in TASKS if task != "vae")
    count: int = 1
    extensions: int = EXTENSIONS
    seed: int = 0
    most_clips: int | None = None

    def __post_init__(self) -> None:
        if unknown := [task for task in self.tasks if task not in TASKS]:
            raise ValueError(f"no task is called {unknown[0]!r}: there are {', '.join(TASKS)}")
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError("give each task once, and at least one")
        for name, value in (("count", self.count), ("extensions", self.extensions)):
            if not 1 <= value <= 100:
                raise ValueError(f"{name}={value} is outside 1..100")

    def as_json(self, clips: Sequence[Clip]) -> dict[str, Any]:
        """Convert to what a run's folder keeps, so that another run is not mixed with it."""
        return {
            "clips": {clip.name: clip.sha256 for clip in clips},
            "request": dict(self.request),
            "noise": None if self.noise is None else list(self.noise),
            "encode": self.encode,
            "tasks": list(self.tasks),
            "count": self.count,
            "extensions": self.extensions,
            "seed": self.seed,
        }


@dataclass(frozen=True)
class Prepared:
    """Hold the items of a run, its settings for `RunFolder.create`, and notes about clips that are left out."""

    settings: dict[str, Any]
    items: list[Item]
    notes: list[str]


# ---- items -----------------------------------------------------------------------------------------------------------


def prepare(settings: FidelitySettings, inputs: Path) -> Prepared:
    """Find the clips, write what requests are given of them to `inputs`, and make the items.

    Raises:
        FileNotFoundError, ValueError: no clips, none long enough, or settings that the model does not take.
        RuntimeError: scikit-image, which measures need, is not installed: before hours of work, not after them.
    """
    load_skimage()
    clips, notes = find_clips(settings.source, prompts=settings.prompts, prompt=settings.prompt)
    clips = clips[: settings.most_clips]
    items: list[Item] = []
    used: list[Clip] = []
    problem = ""
    for clip in clips:
        resolved = _resolve(settings, clip)
        layouts = _layouts(settings, resolved)
        try:
            real = prepare_inputs(clip, resolved, list(layouts.values()), inputs.absolute())
        except ValueError as error:
            problem = str(error)
            notes.append(problem)
            continue
        for task, layout in layouts.items():
            made = _items(settings, clip, resolved, task, layout, real)
            if not used:
                _check_task(task, made[0].request)
            items += made
        used.append(clip)
    if not used:
        raise ValueError(f"{settings.source} has no clip that can be used: {problem}")
    return Prepared(settings.as_json(used), items, notes)


def _resolve(settings: FidelitySettings, clip: Clip) -> ResolvedRequest:
    """Resolve the request of a clip's extension: its size, its rate, its length and its overlap are those of a run."""
    chosen = {"task", "conditions", "prompts", "draft", "prompt", "seed"} & set(settings.request)
    if chosen:
        raise ValueError(f"fidelity sets {', '.join(sorted(chosen))} itself: leave it out")
    conditions = [{"kind": "video", "file": str(clip.path)}]
    fields = {**settings.request, "task": "extend", "prompt": clip.prompt, "seed": 0, "conditions": conditions}
    return resolve(GenerationRequest(**fields))


def _layouts(settings: FidelitySettings, resolved: ResolvedRequest) -> dict[TaskName, Layout]:
    found: dict[TaskName, Layout] = {}
    for task in dict.fromkeys(("vae", *settings.tasks)):
        try:
            found[task] = lay_out(task, resolved, settings.extensions)
        except ValueError as error:
            raise ValueError(f"task {task}: {error}, or leave the task out (--tasks)") from error
    return found


def _check_task(task: TaskName, request: GenerationRequest) -> None:
    """Raise ValueError if the model cannot do a task."""
    try:
        resolve(request)
    except ValueError as error:
        raise ValueError(f"task {task}: {error}, or leave the task out (--tasks)") from error


def _items(
    settings: FidelitySettings, clip: Clip, resolved: ResolvedRequest, task: TaskName, layout: Layout, real: Path
) -> list[Item]:
    size = {"width": resolved.width, "height": resolved.height, "fps": resolved.fps, "window": resolved.window}
    shared: dict[str, Any] = {**size, "prompt": clip.prompt, "metadata": "minimal"}
    fields = {**settings.request, **shared}
    noise: Sequence[float] | None = settings.noise
    count = settings.count
    if task == "vae":  # no frame is made: steps and guidance would only take time
        fields = {name: value for name, value in fields.items() if name in (*_WEIGHTS, *shared)}
        fields, noise, count = {**fields, "steps": 1, "guidance": 1.0}, [0.0], 1
    items = []
    for number in range(count):
        seed = _VAE_SEED if task == "vae" else seed_of(settings.seed, clip.name, task, number)
        request = request_of(layout, {**fields, "seed": seed}, str(real.parent), noise=noise, encode=settings.encode)
        labels = {
            "clip": clip.name,
            "prompt": clip.prompt,
            "task": task,
            "layout": layout.as_json(),
            "real": real.name,
        }
        items.append(Item(f"{clip.name}-{task}" + (f"-{number}" if count > 1 else ""), request, labels))
    return items


# ---- scores ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """Hold the values of one video by row, and of rows that need no video."""

    item: Item
    video: Path
    rows: dict[str, Values]

    @property
    def task(self) -> str:
        return str(self.item.labels["task"])


def score_items(
    items: Sequence[Item],
    video_of: Callable[[Item], Path | None],
    kept: Path | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[Scored]:
    """Measure every video that is there.

    Args:
        items: of `prepare`, or of a run.
        video_of: returns an item's video, or None if there is none.
        kept: folder where values are kept, so that no video is measured twice.
        report: receives the number of videos measured so far, and of all.

    Raises:
        ValueError: a video has another length or size than its item.
        MediaError: it cannot be read.
    """
    through_vae = {item.labels["clip"]: video_of(item) for item in items if item.labels["task"] == "vae"}
    hash_file = cache(sha256_of)  # a clip's video through the VAE stands beside each of its tasks
    found = []
    for number, item in enumerate(items, start=1):
        if (video := video_of(item)) is not None:
            rows = _score_one(item, video, through_vae.get(item.labels["clip"]), kept, hash_file)
            found.append(Scored(item, video, rows))
        report(number, len(items))
    return found


def _score_one(
    item: Item, video: Path, vae_video: Path | None, kept: Path | None, hash_file: Callable[[Path], str]
) -> dict[str, Values]:
    files = {name: hash_file(path) for name, path in ((MADE, video), (THROUGH_VAE, vae_video)) if path is not None}
    key = canonical({"version": MEASURE_VERSION, "files": files, "layout": item.labels["layout"]})
    file = None if kept is None else kept / f"{item.id}.json"
    before = None if file is None else read_json(file)
    if before is not None and "rows" in before and {name: before.get(name) for name in key} == key:
        return {row: dict(values) for row, values in before["rows"].items()}
    rows = measure_rows(item, video, vae_video)
    if file is not None:
        write_json(file, {**key, "rows": rows})
    return rows


def read_real(item: Item) -> np.ndarray:
    """Read an item's clip, which lies beside what its request is given, uint8 ``[F, H, W, 3]``.

    Raises:
        ValueError: the file is missing or damaged; the message says how it is made again.
    """
    path = Path(item.request.conditions[0].file).with_name(item.labels["real"])
    try:
        return read_video(path)
    except (MediaError, FileNotFoundError) as error:
        raise ValueError(f"{error}: remove {path.parent}, and the same command writes it again") from error


def measure_rows(item: Item, video: Path, vae_video: Path | None) -> dict[str, Values]:
    """Measure a video, its clip, and what needs no model."""
    layout = Layout.from_json(item.labels["layout"])
    real = read_real(item)[: layout.frames]
    known = cut(layout, len(real))
    made_frames = read_video(video, max_frames=layout.frames + 1)  # one more shows that it is too long
    try:
        rows = {MADE: measure(made_frames, real, layout)}
    except ValueError as error:
        raise ValueError(f"{video}: {error}") from error
    if layout.joints:  # of the VAE's own item nothing is made
        rows[REAL] = measure(real, real, known)
        made = {"still frame": still(real, layout.given, layout.frames)}
        if layout.middles:
            made["cross-fade"] = cross_fade(real, layout.given, layout.frames)
        rows |= {name: measure(frames, real, layout) for name, frames in made.items()}
        if vae_video is not None:
            whole = read_video(vae_video)
            rows[THROUGH_VAE] = measure(whole, real[: len(whole)], cut(layout, len(whole)))
    return rows


def tables_of(scored: Sequence[Scored]) -> dict[str, Table]:
    """Summarise values as figures with their uncertainty, by task, row and measure.

    The samples of a clip count as one: their mean.
    """
    tables: dict[str, Table] = {}
    for task in TASKS:
        values = _by_clip([one for one in scored if one.task == task])
        if values:
            tables[task] = {row: _figures(values, row) for row in ROWS if any(row in rows for rows in values)}
    return tables


def _by_clip(scored: Sequence[Scored]) -> list[dict[str, Values]]:
    clips: dict[str, list[dict[str, Values]]] = {}
    for one in scored:
        clips.setdefault(one.item.labels["clip"], []).append(one.rows)
    averaged = []
    for samples in clips.values():
        rows: dict[str, Values] = {}
        for row in dict.fromkeys(row for rows in samples for row in rows):
            some = [rows[row] for rows in samples if row in rows]
            rows[row] = {name: float(np.mean([values[name] for values in some])) for name in some[0]}
        averaged.append(rows)
    return averaged


def _figures(clips: Sequence[dict[str, Values]], row: str) -> dict[str, Figure]:
    figures: dict[str, Figure] = {}
    for name, about in MEASURES.items():
        some = [rows for rows in clips if name in rows.get(row, {}) and (about.summary == "mean" or name in rows[REAL])]
        if not some:
            continue
        values = torch.tensor([rows[row][name] for rows in some])
        if about.summary == "mean":
            figures[name] = mean(values)
        else:
            reference = torch.tensor([rows[REAL][name] for rows in some])
            if float(reference.mean()) > 0:
                figures[name] = ratio(values, reference)
    return figures


def score(run: RunFolder, report: Callable[[int, int], None] = lambda done, total: None) -> list[Scored]:
    """Measure the videos of a run; values are kept in its folder ``scores``. Raises as `score_items` does."""
    return score_items(
        run.items, lambda item: run.video_of(item) if run.is_made(item) else None, run.folder / "scores", report
    )
