"""Summarise the state of the workers for ``/ready``, the metrics and the status page."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pusa.codes import plain
from pusa.server.jobs.queue import JobQueue
from pusa.server.settings import ServerSettings


@dataclass(frozen=True)
class ServerState:
    """State of the workers: `ready` once one of them has the model in memory, else how far loading is.

    `ranks` counts the processes of all workers that hold the model, or load it. `error` tells by code, values and
    message why the model cannot be loaded.
    """

    ready: bool
    stage: str
    percent: float
    model: str
    message: str
    queued: int = 0
    running: int = 0
    workers: int = 0
    ranks: int = 0
    error: dict[str, Any] | None = None


def read_readiness(queue: JobQueue, settings: ServerSettings, model: str) -> ServerState:
    """Summarise the latest reports of all workers, on any machine. Reads the database.

    Args:
        model: public name of the server's model.
    """
    counts = queue.count_unfinished()
    workers = queue.workers(seen_within_seconds=max(2 * settings.lease_seconds, 10.0))
    states = [worker.state for worker in workers]
    best = max(states, key=lambda state: (bool(state.get("ready")), state.get("percent") or 0.0), default={})
    is_ready = bool(best.get("ready"))
    stage = str(best.get("stage") or "starting") if states or settings.workers else "no worker"
    stage = "starting" if stage == "stopped" else stage
    return ServerState(
        ready=is_ready,
        stage=stage,
        percent=100.0 if is_ready else float(best.get("percent") or 0.0),
        model=model,
        message=_message(is_ready, stage, best),
        queued=counts["queued"],
        running=counts["in_progress"],
        workers=len(workers),
        ranks=sum(len(state.get("pids") or ()) for state in states),
        error=None if is_ready else _error(best),
    )


def _error(state: Mapping[str, Any]) -> dict[str, Any] | None:
    reason = state.get("error")
    if not reason:
        return None
    code = str(state.get("error_code") or "model_not_loaded")
    return {"code": code, "values": plain({"reason": str(reason)}), "message": str(reason)}


def _message(is_ready: bool, stage: str, state: Mapping[str, Any]) -> str:
    if is_ready:
        return "ready"
    if stage == "no worker":
        return "no worker is there: jobs are accepted and wait; start one with `pusa worker`"
    if state.get("error"):
        return f"the model cannot be loaded: {state['error']}"
    return "the model is being loaded; jobs are accepted and wait"
