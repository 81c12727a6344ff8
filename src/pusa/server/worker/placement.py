"""Find the machine of a worker, give each worker cards of its own, and choose on how many of them its model runs.

    python -m pusa.server.worker.placement        # the machine, as JSON

A process of its own asks the GPUs, as that loads torch and takes memory of each. Without GPUs nothing is started.
"""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from pusa import zoo
from pusa.acceleration.decisions import Machine
from pusa.acceleration.machine import machine_without_cards
from pusa.server.plans import PlanFunction, machine_as_json, machine_from_json, plan_model
from pusa.server.settings import ServerSettings
from pusa.server.worker.engine_ranks import PARALLEL_VARIABLE
from pusa.server.worker.local import Placement

logger = logging.getLogger(__name__)

_FIND_SECONDS = 120.0
_VISIBLE = "CUDA_VISIBLE_DEVICES"


def find_machine() -> Machine:
    """Find the cards that this process may use, and what is free of its memory and disk.

    Raises:
        RuntimeError: the GPUs do not answer.
    """
    if not has_gpu():
        return machine_without_cards()
    try:
        found = subprocess.run(
            [sys.executable, "-m", "pusa.server.worker.placement"],
            capture_output=True,
            text=True,
            timeout=_FIND_SECONDS,
            check=True,
        )
        return machine_from_json(json.loads(found.stdout.splitlines()[-1]))
    except (subprocess.SubprocessError, ValueError, IndexError, TypeError) as error:
        lines = str(getattr(error, "stderr", "") or error).strip().splitlines()
        raise RuntimeError(f"the GPUs of this machine do not answer: {lines[-1] if lines else error}") from error


def has_gpu(devices: Path = Path("/dev")) -> bool:
    """Tell whether a driver of a GPU is there, without loading torch."""
    return any(devices.glob("nvidia[0-9]*")) or (devices / "kfd").exists()


def cards_of(number: int, workers: int, gpus: int | None, visible: int) -> list[int]:
    """Choose the cards of a worker: `gpus` for each in turn, or the same number for all.

    Args:
        number: of the worker, 0..workers - 1.
        visible: number of the cards that all of them may use.

    Raises:
        ValueError: there are fewer than `gpus` for it.
    """
    if gpus is None:
        share = visible // workers
        return list(range(number * share, (number + 1) * share)) if share else [number % visible]
    if gpus > visible:
        raise ValueError(f"gpus={gpus}: this machine has {visible}: set gpus to at most {visible}, or leave it out")
    if (number + 1) * gpus > visible:
        raise ValueError(
            f"gpus={gpus} for each of {workers} workers needs {workers * gpus} cards and this machine has {visible}: "
            f"set workers to at most {visible // gpus}"
        )
    return list(range(number * gpus, (number + 1) * gpus))


def place(
    settings: ServerSettings,
    number: int = 0,
    *,
    find: Callable[[], Machine] = find_machine,
    plan: PlanFunction = plan_model,
    environ: Mapping[str, str] = os.environ,
) -> Placement:
    """Place the worker with a number: find its machine and the cards that are its own, and plan its ranks.

    Args:
        settings: `workers`, `gpus`, `cpu_ranks` and the model.
        number: of the worker in this process.
        find, plan: see `find_machine` and `plan_model`.
        environ: CUDA_VISIBLE_DEVICES limits the cards of all workers.

    Raises:
        ValueError: there are too few cards for the settings.
        RuntimeError: the GPUs do not answer.
    """
    machine = find()
    if not machine.cards:
        if settings.gpus:
            raise ValueError(f"gpus={settings.gpus}: this machine has no GPU: leave it out")
        return Placement(settings.cpu_ranks, machine=machine)
    own = cards_of(number, max(1, settings.workers), settings.gpus or None, len(machine.cards))
    names = [name.strip() for name in environ.get(_VISIBLE, "").split(",") if name.strip()]
    if len(names) != len(machine.cards):
        names = [str(index) for index in range(len(machine.cards))]
    machine = replace(machine, cards=tuple(machine.cards[index] for index in own))
    found = Placement(1, {_VISIBLE: ",".join(names[index] for index in own)}, machine)
    defaults = zoo.defaults_of(settings.model)
    size = (defaults.width, defaults.height, defaults.num_frames)
    planned = plan(settings.model, size, machine, settings.load_options, float(defaults.guidance))[0]
    if planned.problem:  # loading says so too, and it may know better
        logger.warning("%s", planned.problem)
        return found
    logger.info("%s", planned.summary)
    ranks = planned.parallel.ranks
    if ranks == 1:
        # It may use several cards, one for each expert: as many as are visible, and no plan for several ranks.
        return replace(found, env={**found.env, "PUSA_GPUS": "0"})
    shared = {PARALLEL_VARIABLE: json.dumps(asdict(planned.parallel)), "PUSA_GPUS": str(ranks)}
    return replace(found, ranks=ranks, env={**found.env, **shared})


if __name__ == "__main__":
    from pusa.acceleration.machine import machine

    print(json.dumps(machine_as_json(machine())))
