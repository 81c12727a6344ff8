"""Estimate the hours, the money and the disk that a run takes, before any work.

Seconds are operations over the rate of a card (`pusa.acceleration.speed`), slowed down as its plan predicts, with a
tenth added for encoding, decoding and writing. Where the run has videos of the same size and settings already, their
measured seconds and sizes count instead. Nothing here imports torch.
"""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from pusa import zoo
from pusa.acceleration.decisions import LoadOptions, Machine, Plan
from pusa.acceleration.needs import clip_of, shapes_of
from pusa.acceleration.planning import plans
from pusa.acceleration.speed import rate_of
from pusa.evaluation.runs.checks import resolve
from pusa.evaluation.runs.folder import Record, RunFolder
from pusa.evaluation.runs.items import Item
from pusa.request import ResolvedRequest
from pusa.request.work import steps_of

OTHER_SHARE = 0.1  # of the denoising: text encoder, VAE, file
BITS_PER_PIXEL = 0.6  # of a detailed clip at CRF 17; 6 less double it, x264's rule of thumb
_LEAST_MEASURED = 3


@dataclass(frozen=True)
class Estimate:
    """Hold what the missing videos of a run take.

    Attributes:
        videos: of the whole run.
        missing: videos that are to be made.
        seconds_per_video: of one card, on average.
        cards: that make videos side by side.
        disk_bytes: of the missing videos.
        price: of one card for an hour, in any currency.
        plans: how the model runs, a line for each kind of video.
        measured: how many of the missing videos are estimated from videos of the run.
        problem: why they cannot be made there; "" if they can.
    """

    videos: int
    missing: int
    seconds_per_video: float
    cards: int
    disk_bytes: int
    price: float | None
    plans: tuple[str, ...]
    measured: int
    problem: str

    @property
    def card_hours(self) -> float:
        """Hours of all cards together."""
        return self.missing * self.seconds_per_video / 3600

    @property
    def hours(self) -> float:
        """Hours from the beginning to the end."""
        return self.card_hours / self.cards

    @property
    def cost(self) -> float | None:
        """Cost in the currency of the price; None without one."""
        return None if self.price is None else self.card_hours * self.price

    def as_json(self) -> dict[str, Any]:
        """Convert to plain JSON."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return values | {"card_hours": self.card_hours, "hours": self.hours, "cost": self.cost}


@dataclass(frozen=True)
class _Kind:
    """Tell videos apart by what they take; `frames` and `crf` are those of the file that is kept."""

    model: str
    size: tuple[int, int, int]
    steps: int
    passes: float
    still_frames: int
    frames: int
    crf: int

    @property
    def file_bytes(self) -> float:
        """Size of the file, roughly."""
        width, height, _ = self.size
        return width * height * self.frames * BITS_PER_PIXEL * 2 ** ((17 - self.crf) / 6) / 8


def estimate(
    run: RunFolder | Sequence[Item],
    machine: Machine,
    *,
    load: LoadOptions | None = None,
    price: float | None = None,
) -> Estimate:
    """Estimate a run, one process on each card of a machine; of a folder, what is missing of it.

    Several machines alike: hours divide by their number, and the cost stays.

    Raises:
        ValueError: a request is invalid for its model.
    """
    items = run.items if isinstance(run, RunFolder) else list(run)
    missing = run.missing() if isinstance(run, RunFolder) else items
    measured = _measure(run, missing) if isinstance(run, RunFolder) else {}
    cards = max(1, len(machine.cards))
    one = replace(machine, cards=machine.cards[:1], ram_bytes=machine.ram_bytes // cards, link="none")

    kinds = Counter(_kind_of(item) for item in missing)
    found = {kind: _plan(kind, one, load or LoadOptions()) for kind in kinds}
    problems = [plan.problem for plan in found.values() if plan.problem]
    seconds, file_bytes = 0.0, 0.0
    for kind, count in kinds.items():
        predicted = 0.0 if problems else _seconds(kind, found[kind], one)
        each_seconds, each_bytes = measured.get(kind, (predicted, kind.file_bytes))
        seconds += count * each_seconds
        file_bytes += count * each_bytes
    return Estimate(
        videos=len(items),
        missing=len(missing),
        seconds_per_video=0.0 if problems else seconds / max(1, len(missing)),
        cards=cards,
        disk_bytes=round(file_bytes),
        price=price,
        plans=tuple(dict.fromkeys(plan.summary for plan in found.values() if not plan.problem)),
        measured=sum(count for kind, count in kinds.items() if kind in measured),
        problem=problems[0] if problems else "",
    )


def _kind_of(item: Item) -> _Kind:
    request = resolve(item.request)
    return _Kind(
        request.model,
        (request.width, request.height, min(request.frames, request.window)),
        steps_of(request),
        _passes(request),
        0 if request.exact else request.still_frames,
        request.frames if item.cut is None else item.cut.frames,
        request.crf if item.cut is None else item.cut.crf,
    )


def _passes(request: ResolvedRequest) -> float:
    """Count the passes of a step on average: two where guidance holds."""
    guided = 0.0 if request.guidance <= 1 else request.guidance_stop - request.guidance_start
    return 1 + guided


def _plan(kind: _Kind, machine: Machine, load: LoadOptions) -> Plan:
    return plans(
        kind.model,
        size=kind.size,
        machine=machine,
        options=load,
        guidance=kind.passes > 1,
        still_frames=kind.still_frames,
    )[0]


def _seconds(kind: _Kind, plan: Plan, machine: Machine) -> float:
    model = _model_of(kind.model)
    operations = sum(shapes_of(model).transformer.flops(clip_of(model, shapes_of(model), kind.size)))
    capability = machine.cards[0].capability if machine.cards else None
    speed = rate_of(capability) * (plan.relative_speed or 1.0)
    return kind.steps * kind.passes * operations / speed * (1 + OTHER_SHARE)


@cache
def _model_of(source: str) -> zoo.ZooModel:
    known = zoo.find(zoo.with_fallback(source)) or zoo.in_folder(Path(source).expanduser())
    return known or zoo.get("wan2.1-14b")


def _measure(run: RunFolder, missing: Sequence[Item]) -> dict[_Kind, tuple[float, float]]:
    """Return the median seconds and bytes of the videos that are made, by kind."""
    left = {item.id for item in missing}
    records: dict[_Kind, list[Record]] = {}
    for item in run.items:
        if item.id not in left and (record := run.record_of(item)) is not None:
            records.setdefault(_kind_of(item), []).append(record)
    return {
        kind: (statistics.median(one.seconds for one in found), statistics.median(one.size_bytes for one in found))
        for kind, found in records.items()
        if len(found) >= _LEAST_MEASURED
    }
