"""Let the ranks of a group make a video together: rank 0 runs `generate`, and tells the others what to load."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pusa.acceleration import parallel
from pusa.acceleration.decisions import LoadOptions, Parallel, PartPlan, Plan
from pusa.acceleration.ranks import Ranks
from pusa.errors import first_line
from pusa.events import Event, Report, Stage
from pusa.generate.residents import Resident, resident_of
from pusa.lora.sources import EXPERTS
from pusa.models.parts import PARTS
from pusa.models.vae import is_out_of_memory
from pusa.pipeline import PusaPipeline
from pusa.request import ResolvedRequest

Run = Callable[[Report], None]


def watch(
    ranks: Ranks | None, stop: Callable[[], bool], pipeline: PusaPipeline | None
) -> tuple[Callable[[], bool], Callable[[Run], Run]]:
    """Return `stop` and a wrapper of the run that both raise RankError once a rank has failed.

    Raises:
        ValueError: there are ranks, and a pipeline that they cannot load.
    """
    if ranks is None:
        return stop, lambda run: run
    if pipeline is not None:
        raise ValueError("ranks load the request's model themselves: leave the pipeline out, or the ranks")

    def stop_or_fail() -> bool:
        ranks.check()
        return stop()

    def watched(run: Run) -> Run:
        def run_watched(report: Report) -> None:
            def report_or_fail(event: Event) -> None:
                if isinstance(event, Stage):
                    ranks.stage = event.stage
                ranks.check()
                report(event)

            try:
                run(report_or_fail)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                raise torch.OutOfMemoryError(f"{first_line(error)}; or {parallel.MEMORY_ADVICE}") from error
            finally:
                if ranks.is_connected and not ranks.has_failed:
                    ranks.send({"kind": "done"})

        return run_watched

    return stop_or_fail, watched


def request_model(ranks: Ranks | None, request: ResolvedRequest, options: LoadOptions) -> LoadOptions:
    """Make all other ranks load the model of a request, with its LoRAs and their alphas.

    They begin at once, while rank 0 loads its own; one that fails ends the group.

    Returns:
        The options to load it with on every rank: a plan for as many cards as there are ranks.
    """
    if ranks is None:
        return options
    options = replace(options, gpus=ranks.size)
    if not ranks.is_connected:
        ranks.wait_until_all_are_here()
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()}
    ranks.send({"kind": "model", "request": request.model_dump(mode="json"), "options": plain})
    return options


def share(ranks: Ranks | None, pipe: PusaPipeline, request: ResolvedRequest, plan: Plan | None) -> None:
    """Share the steps of a loaded pipeline among all ranks, in the way that suits a request or that was chosen.

    Raises:
        ValueError: the tokens or the attention heads do not divide among so many ranks.
    """
    if ranks is None:
        return parallel.disable(pipe)
    chosen = ranks.parallel or (plan.parallel if plan and plan.parallel.ranks == ranks.size else None)
    model = pipe.transformer or pipe.transformer_2
    if chosen is None:
        chosen = parallel.choose(ranks.size, guided=request.guidance > 1, heads=model.config.get("num_attention_heads"))
    parallel.check_tokens(model, chosen)  # before the others enable it
    if request.step_cache != "none" and chosen.ulysses * chosen.ring > 1:
        raise ValueError(
            f"step_cache={request.step_cache}: each of the ranks that share a pass would decide for itself; leave it "
            "out, or share the two passes of guidance alone"
        )
    ranks.send({"kind": "share", "parallel": asdict(chosen), "plan": plan and _plain(plan)})
    parallel.enable(pipe, chosen, ranks)


def smaller_plan(ranks: Ranks | None, resident: Resident, report: Report) -> Callable[[str], bool]:
    """Return what takes a smaller plan where memory runs out: nothing among ranks, which all must have the same."""
    return (lambda where: False) if ranks else partial(resident.take_smaller_plan, report=report)


class SharedModel:
    """Hold, on a rank other than 0, the model that rank 0 has asked for."""

    def __init__(self, ranks: Ranks, message: Mapping[str, Any]) -> None:
        """Load it: `message` is that of `request_model`."""
        options: dict[str, Any] = {
            name: Path(value) if name in PARTS and value else value for name, value in message["options"].items()
        }
        self._request = ResolvedRequest.model_validate(message["request"])
        self._resident = resident_of(self._request, LoadOptions(**options), device=ranks.device.type)
        self.pipe = self._resident.prepare(self._request, None, _ignore)

    def share(self, ranks: Ranks, message: Mapping[str, Any]) -> None:
        """Share it as rank 0 does: `message` is that of `share`; weights are stored as those of rank 0."""
        plan, own = message["plan"] and _from_plain(message["plan"]), self._resident.plan
        if plan and own and _stored(own) != _stored(plan):
            self.pipe = self._resident.prepare(self._request, [plan], _ignore)
        parallel.enable(self.pipe, Parallel(**message["parallel"]), ranks)


def _ignore(event: Event) -> None:
    """Drop an event: rank 0 reports it."""


def _plain(plan: Plan) -> dict[str, Any]:
    """Convert what decides how a rank computes to values of JSON."""
    parts = {name: asdict(part) for name, part in plan.parts.items()}
    values = {name: getattr(plan, name) for name in ("model", "wish", "merge", "in_8_bits", "attention", "compile")}
    return {**values, "parts": parts}


def _from_plain(values: Mapping[str, Any]) -> Plan:
    """Convert what `_plain` returned."""
    return Plan(**{**values, "parts": {name: PartPlan(**part) for name, part in values["parts"].items()}})


def _stored(plan: Plan) -> tuple[Any, ...]:
    """Return what changes what the transformers compute."""
    parts = {name: (part.dtype, part.storage) for name, part in plan.parts.items() if name in EXPERTS}
    return parts, plan.merge, plan.wish, plan.in_8_bits, plan.attention, plan.compile
