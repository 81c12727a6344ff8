"""Plan how the served model runs on the machines of its workers, and estimate what a request would need.

A worker publishes its machine with its state (`pusa.server.worker.placement`), so plans are those of the machines that
make the videos, wherever the server runs. Nothing here loads torch.
"""

import logging
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pusa import zoo
from pusa.acceleration.decisions import Card, LoadOptions, Machine, Plan
from pusa.codes import ERRORS, plain
from pusa.defaults import GenerationDefaults
from pusa.request import ResolvedRequest
from pusa.request.work import steps_of, tokens_of, windows_of
from pusa.server.jobs.queue import Job, JobQueue, Status
from pusa.server.settings import ServerSettings

logger = logging.getLogger(__name__)

Size = tuple[int, int, int]
"""Width, height and frames of what a model makes at once."""

PlanFunction = Callable[[str, Size, Machine, LoadOptions, float], Sequence[Plan]]
"""List plans of how a model (a source, as in a request) makes a clip on a machine, with a guidance scale; best first.

There is at least one; where nothing fits, it has a `problem`.
"""

_KEPT_SECONDS = 2.0  # for which the workers' machines, and the durations of earlier jobs, are not read again
_KEPT_PLANS = 256
_RECENT_JOBS = 100
_COMPLETED: tuple[Status, ...] = ("completed",)


def plan_model(model: str, size: Size, machine: Machine, options: LoadOptions, guidance: float) -> list[Plan]:
    """Call `pusa.acceleration.planning.plans`, which is imported when it is needed first."""
    from pusa.acceleration.planning import plans

    return plans(model, size=size, machine=machine, options=options, guidance=guidance)


def problem_of(plan: Plan) -> dict[str, Any]:
    """Return the problem of a plan as plain JSON: its code, values and message."""
    unknown: dict[str, Any] = dict.fromkeys(ERRORS["does_not_fit"], "")
    values = {**unknown, **plan.problem_values, "problem": plan.problem}
    return {"code": "does_not_fit", "values": plain(values), "message": plan.problem}


def machine_as_json(machine: Machine) -> dict[str, Any]:
    """Convert a machine to plain values."""
    return asdict(machine)


def machine_from_json(values: Mapping[str, Any]) -> Machine:
    """Convert what `machine_as_json` returned, after a way through JSON. Raises TypeError for other values."""
    cards = []
    for card in values.get("cards", ()):
        capability = card.get("capability")
        cards.append(Card(**{**card, "capability": None if capability is None else tuple(capability)}))
    return Machine(**{**values, "cards": tuple(cards)})


@dataclass(frozen=True)
class Estimate:
    """Tell what a request would need.

    Attributes:
        tokens: of the transformer's input; a long video's are those of one window.
        windows: that a long video is made in.
        steps: denoising steps of all windows.
        plan: how the model runs; None while no worker has reported its machine, or the planner does not know the model.
        seconds: measured on this server for as many tokens; None before the first such video.
    """

    tokens: int
    windows: int
    steps: int
    plan: Plan | None
    seconds: float | None


class Planner:
    """Plan requests for the machines of the workers, and estimate their durations from earlier jobs.

    All methods read the database at times: call them in a thread.

    Args:
        plan: see `plan_model`.
        kept_seconds: for which what was read from the database is used.
    """

    def __init__(
        self,
        settings: ServerSettings,
        queue: JobQueue,
        plan: PlanFunction = plan_model,
        *,
        kept_seconds: float = _KEPT_SECONDS,
    ) -> None:
        self._settings, self._queue, self._plan = settings, queue, plan
        self._kept_seconds = kept_seconds
        self._plans: dict[tuple[Any, ...], Plan | None] = {}
        self._lock = threading.Lock()
        self._groups: tuple[_Group, ...] = ()
        self._durations: list[_Duration] = []
        self._groups_read_at = self._durations_read_at = float("-inf")

    @cached_property
    def _is_known(self) -> bool:
        return has_shapes(self._settings.model)

    @cached_property
    def _token_pixels(self) -> int:
        return zoo.defaults_of(self._settings.model).size_multiple

    def _different_groups(self) -> "tuple[_Group, ...]":
        """Return the different machines and numbers of ranks of the workers that were heard of lately."""
        now = time.monotonic()
        if now - self._groups_read_at >= self._kept_seconds:
            seen_seconds = max(2 * self._settings.lease_seconds, 10.0)
            states = [worker.state for worker in self._queue.workers(seen_within_seconds=seen_seconds)]
            found: dict[_Group, None] = {}
            for state in states:
                with suppress(TypeError, AttributeError):  # of a worker of another version
                    if values := state.get("machine"):
                        found[_Group(machine_from_json(values), int(state.get("world_size", 1)))] = None
            self._groups, self._groups_read_at = tuple(found), now
        return self._groups

    def plan(self, size: Size, guidance: float) -> tuple[Plan, Machine] | None:
        """Plan a clip on the workers' machines; of several, the first one on which it works.

        Returns:
            A plan, whose `problem` says why it works on none of them, and its machine; None if no machine, or the
            model, is not known.
        """
        groups = self._different_groups()
        plans = [(plan, group.machine) for group in groups if (plan := self._plan_on(group, size, guidance))]
        return next((found for found in plans if not found[0].problem), plans[0] if plans else None)

    def _plan_on(self, group: "_Group", size: Size, guidance: float) -> Plan | None:
        key = group, size, guidance > 1
        with self._lock:
            if key not in self._plans:
                if len(self._plans) >= _KEPT_PLANS:
                    self._plans.clear()
                self._plans[key] = self._call(group, size, guidance)
            return self._plans[key]

    def _call(self, group: "_Group", size: Size, guidance: float) -> Plan | None:
        """Plan for the ranks that share each job, as they do themselves: a small clip could do with fewer."""
        if not self._is_known:
            return None
        machine, ranks = group.machine, group.ranks
        options = replace(self._settings.load_options, gpus=ranks if machine.cards and ranks > 1 else None)
        try:
            plans = self._plan(self._settings.model, size, machine, options, guidance)
        except (ValueError, OSError, ImportError) as error:  # such as a damaged configuration
            logger.warning("%s cannot be planned: %s", self._settings.model, error)
            return None
        return next((plan for plan in plans if plan.parallel.ranks == ranks), plans[0])

    def plan_request(self, request: ResolvedRequest) -> Plan | None:
        """Plan a request, see `plan`."""
        found = self.plan((request.width, request.height, min(request.frames, request.window)), request.guidance)
        return None if found is None else found[0]

    def plan_defaults(self, defaults: GenerationDefaults) -> tuple[Plan, Machine] | None:
        """Plan a video of the model's own size and length, see `plan`."""
        return self.plan((defaults.width, defaults.height, defaults.num_frames), float(defaults.guidance))

    def estimate(self, request: ResolvedRequest) -> Estimate:
        """Estimate what a request would need."""
        tokens, windows = tokens_of(request, self._token_pixels), windows_of(request)
        steps = steps_of(request)
        seconds = self._seconds(_Kind(tokens, request.guidance > 1), steps, request.frames)
        return Estimate(tokens, windows, steps, self.plan_request(request), seconds)

    def _seconds(self, kind: "_Kind", steps: int, frames: int) -> float | None:
        now = time.monotonic()
        if now - self._durations_read_at >= self._kept_seconds:
            jobs, _ = self._queue.page(limit=_RECENT_JOBS, statuses=_COMPLETED)
            self._durations = [found for job in jobs if (found := _duration_of(job, self._token_pixels)) is not None]
            self._durations_read_at = now
        alike = [found for found in self._durations if found.kind == kind]
        if not alike:
            return None
        per_step = statistics.median(found.seconds_per_step for found in alike)
        per_frame = statistics.median(found.other_seconds_per_frame for found in alike)
        return per_step * steps + per_frame * frames


def has_shapes(model: str) -> bool:
    """Return True if a model is in the zoo, or a folder in diffusers layout.

    The planner takes any other for Wan2.1 14B, by which no request may be refused.
    """
    return (
        zoo.find(zoo.with_fallback(model)) is not None
        or (Path(model).expanduser() / "transformer" / "config.json").is_file()
    )


@dataclass(frozen=True)
class _Group:
    """Hold the machine of a worker, and the number of ranks that share each job on it."""

    machine: Machine
    ranks: int


@dataclass(frozen=True)
class _Kind:
    """Tell jobs apart by what a step of them takes."""

    tokens: int
    is_guided: bool


@dataclass(frozen=True)
class _Duration:
    kind: _Kind
    seconds_per_step: float
    other_seconds_per_frame: float


def _duration_of(job: Job, pixels: int) -> _Duration | None:
    """Measure a completed job; None for one that was interrupted, or does not tell enough."""
    denoise_seconds = job.timings.get("denoise", 0.0)
    if job.attempt != 1 or not job.steps or not denoise_seconds or job.resolved is None:
        return None
    try:
        request = ResolvedRequest.model_validate(job.resolved)
    except ValueError:  # of an earlier version
        return None
    other_seconds = job.inference_seconds - denoise_seconds
    kind = _Kind(tokens_of(request, pixels), request.guidance > 1)
    return _Duration(kind, denoise_seconds / job.steps, other_seconds / request.frames)
