"""Let the ranks of a group make a video together: rank 0 runs `generate`, and tells the others what to load."""

from collections.abc import Callable
from dataclasses import asdict

from pusa.acceleration import parallel
from pusa.acceleration.ranks import Ranks
from pusa.events import Event, Report, Stage
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
            finally:
                if ranks.is_connected and not ranks.has_failed:
                    ranks.send({"kind": "done"})

        return run_watched

    return stop_or_fail, watched


def request_model(ranks: Ranks | None, request: ResolvedRequest) -> None:
    """Make all other ranks load the model of a request, with its LoRAs and their alphas.

    They begin at once, while rank 0 loads its own; one that fails ends the group.
    """
    if ranks is None:
        return
    if not ranks.is_connected:
        ranks.wait_until_all_are_here()
    ranks.send({"kind": "model", "request": request.model_dump(mode="json")})


def share(ranks: Ranks | None, pipe: PusaPipeline, request: ResolvedRequest) -> None:
    """Share the steps of a loaded pipeline among all ranks, in the way that suits a request or that was chosen."""
    if ranks is None:
        return parallel.disable(pipe)
    heads = pipe.transformer.config.num_attention_heads
    chosen = ranks.parallel or parallel.choose(ranks.size, guided=request.guidance > 1, heads=heads)
    ranks.send({"kind": "share", "parallel": asdict(chosen)})
    parallel.enable(pipe, chosen, ranks)
