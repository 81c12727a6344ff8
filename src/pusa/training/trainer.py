"""Vectorised timestep adaptation: a text-to-video model learns one time per latent frame (arXiv 2507.16116).

    from pusa.training.config import load_config
    from pusa.training.trainer import train

    folder = train(load_config("mini-vta", {"data.folders": ["clips"]}))
    pipe.load_pusa(folder, alpha=1.0)

The same function runs alone, under ``accelerate launch`` and under ``torchrun``. What a run leaves in its folder:

    config.json            all it was told         adapter.safetensors    the result (``model/`` for a full fine-tune)
    run.json               what it ran on          checkpoints/           to go on from; see `pusa.training.checkpoint`
    metrics.jsonl          losses and speeds       tensorboard/           curves, if TensorBoard is installed

With two experts (Wan2.2) each has a folder of its own inside, and the results are called ``adapter_high_noise`` and
``adapter_low_noise``.
"""

import json
import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pusa.resources import is_bf16_fast
from pusa.training.batches import Data
from pusa.training.checkpoint import checkpoints, read_state
from pusa.training.config import CONFIG_FILE, TrainConfig, load_config
from pusa.training.distributed import Processes, launched
from pusa.training.export import result_path
from pusa.training.model import load_transformer, prepare
from pusa.training.run import Job, Run, TrainingStoppedError, Validate

__all__ = ["TrainingStoppedError", "train"]

logger = logging.getLogger(__name__)


def train(
    config: TrainConfig,
    *,
    transformer: Any = None,
    dataset: Data | None = None,
    on_validate: Validate | None = None,
    resume: bool = False,
) -> Path:
    """Train as the configuration says. Every process of a run calls it with the same arguments.

    Args:
        config: see `pusa.training.config`.
        transformer: a Wan transformer to adapt, or one per expert, instead of loading ``config.model.source``. Its
            weights keep their dtype; afterwards it has the trained adapter attached as "pusa" (averaged if there is a
            moving average) and is in evaluation mode.
        dataset: instead of reading ``config.data.folders``.
        on_validate: called as ``on_validate(step, model)`` every ``report.validate_every`` steps and at the end, on
            every process (a sharded model computes only together), without gradients, with the moving average in place
            if there is one. What it draws at random does not change the run. If it returns a picture's path, the
            tracker shows it beside the curves.
        resume: go on from the last checkpoint of the run's folder; without one, begin.

    Returns:
        The run's folder, which `pusa.lora.load_pusa` takes.

    Raises:
        ValueError, FileNotFoundError: the configuration, the data or the model do not fit, or the folder holds a run
            already and `resume` is not set.
        TrainingStoppedError: SIGTERM or SIGINT came; a checkpoint was written after the step. A second SIGINT
            interrupts at once.
        RuntimeError: ``max_nonfinite`` steps in a row were not finite.
    """
    processes = launched(config.parallel.context_parallel)
    config = _with_fast_dtype(config, processes.device)
    folder = config.folder
    _open_folder(folder, config, processes, resume=resume)
    if dataset is None:
        dataset = _read_dataset(config)
    training, held_out = dataset.split(config.data.held_out_share, config.seed)
    with _deterministic(config, processes), _Signals() as signals:
        for expert in config.model.experts:
            job = Job(
                config, expert, folder, processes, dataset, training, held_out, on_validate, lambda: signals.received
            )
            if resume and processes.agree(_is_finished(job)):
                logger.info("%s is finished", job.leg)
                continue
            given = transformer[expert] if isinstance(transformer, Mapping) else transformer
            model = load_transformer(config, expert) if given is None else given
            shapes = sorted({*training.buckets, *held_out.buckets})
            Run(job, *prepare(model, config, processes, shapes)).go(resume=resume)
            del model, given
    return folder


# ---- the run's folder and surroundings -----------------------------------------------------------------------------


def _with_fast_dtype(config: TrainConfig, device: torch.device) -> TrainConfig:
    """Replace bf16 by fp32 on a CPU that emulates bf16, where a step would take up to 80 times as long."""
    if config.model.dtype == "fp32" or is_bf16_fast(device.type):
        return config
    logger.warning("this CPU has no bf16 of its own: training in fp32, which is much faster here")
    return config.model_copy(update={"model": config.model.model_copy(update={"dtype": "fp32"})})


def _open_folder(folder: Path, config: TrainConfig, processes: Processes, *, resume: bool) -> None:
    """Refuse to run over another run; store the configuration and say what changed in it."""
    stored = folder / CONFIG_FILE
    if stored.is_file() and not resume and any(folder.glob("**/checkpoints/step-*")):
        raise ValueError(f"{folder} holds a run already: go on with --resume, or give another name or output")
    before = load_config(stored) if stored.is_file() and resume else None
    processes.wait()
    if not processes.is_main:
        return
    if before is not None:
        old, new = (dict(_leaves(json.loads(c.model_dump_json(exclude={"output"})))) for c in (before, config))
        changes = [
            f"{name} was {old.get(name)} and is {new.get(name)}" for name in old | new if old.get(name) != new.get(name)
        ]
        if changes:
            logger.warning("the configuration has changed since the run began: %s", "; ".join(changes))
    folder.mkdir(parents=True, exist_ok=True)
    part = stored.with_suffix(".part")
    part.write_text(config.to_json())
    part.replace(stored)


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _read_dataset(config: TrainConfig) -> Data:
    if not config.data.folders:
        raise ValueError("data.folders is empty: name a folder that `pusa data prepare` has made")
    from pusa.data.dataset import LatentDataset

    return LatentDataset(config.data.folders)


def _is_finished(job: Job) -> bool:
    config, found = job.config, checkpoints(job.leg)
    if not found or not result_path(job.folder, config, job.expert).exists():
        return False
    state = read_state(found[max(found)])
    return state["step"] >= config.steps if config.steps is not None else state["seconds"] >= (config.seconds or 0.0)


@contextmanager
def _deterministic(config: TrainConfig, processes: Processes) -> Iterator[None]:
    """On a GPU, no sums whose order depends on timing, if the configuration wants it so."""
    if not (config.model.deterministic and processes.device.type == "cuda"):
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS when it starts
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class _Signals:
    """SIGTERM (as Slurm sends it) and the first SIGINT end the run after the step; a second SIGINT at once."""

    def __init__(self) -> None:
        self.received = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, _: object) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True
        logger.warning("%s: stopping after this step", signal.Signals(number).name)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
