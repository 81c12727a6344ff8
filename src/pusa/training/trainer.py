"""Train a text-to-video model with one time per latent frame: vectorised timestep adaptation (arXiv 2507.16116).

    from pusa.training.config import load_config
    from pusa.training.trainer import train

    folder = train(load_config("mini-vta", {"data.folders": ["clips"]}))
    pipe.load_pusa(folder, alpha=1.0)

The same function runs alone, under ``accelerate launch`` and under ``torchrun``. Files in the folder of a run:

    config.json            its configuration       adapter.safetensors    the result (``model/`` for a full fine-tune)
    run.json               model, data, versions   checkpoints/           see `pusa.training.checkpoint`
    metrics.jsonl          losses and speeds       tensorboard/           curves, if TensorBoard is installed

With two experts (Wan2.2) each has a folder of its own inside, and the results have the names ``adapter_high_noise`` and
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

from pusa.fsutil import replacing
from pusa.models.bases import base_of
from pusa.resources import is_bf16_fast
from pusa.training.batches import Data
from pusa.training.checkpoint import checkpoints, read_state
from pusa.training.config import CONFIG_FILE, NO_FOLDERS, Expert, TrainConfig, leaves, load_config
from pusa.training.distributed import Processes, connect_processes
from pusa.training.export import result_path
from pusa.training.model import load_transformer, prepare
from pusa.training.run import Run, RunContext, TrainingStoppedError, Validate

__all__ = ["TrainingStoppedError", "train"]

logger = logging.getLogger(__name__)


def train(
    config: TrainConfig,
    *,
    transformer: Any = None,
    dataset: Data | None = None,
    on_validate: Validate | None = None,
    resume: bool = False,
    other_data: bool = False,
) -> Path:
    """Train a model. Every process of a run must call this with the same arguments.

    Args:
        config: see `pusa.training.config`.
        transformer: one of any base to adapt, or one per expert, instead of loading ``config.model.source``. Its
            weights keep their dtype; afterwards it has the trained adapter attached as "pusa" (averaged if there is a
            moving average) and is in evaluation mode.
        dataset: instead of reading ``config.data.folders``.
        on_validate: called as ``on_validate(step, model)`` every ``report.validate_every`` steps and at the end, on
            every process (a sharded model computes only together), without gradients, with the moving average in place
            if there is one. Random numbers that it draws do not change the run. If it returns the path of an image, the
            tracker shows it beside the curves.
        resume: continue from the last checkpoint in the run's folder; without one, begin. A run that cannot be resumed
            is left as it was, bit for bit; one that is finished leaves `transformer` as it was, too.
        other_data: resume even if the data are others than those of the checkpoint.

    Returns:
        The run's folder, which `pusa.lora.load_pusa` takes.

    Raises:
        ValueError, FileNotFoundError: the configuration, the data or the model do not fit together, or the folder holds
            a run already and `resume` is not set, or its checkpoint is of other data and `other_data` is not set.
        TrainingStoppedError: SIGTERM or SIGINT came; a checkpoint was written after the step. A second SIGINT
            interrupts at once.
        RuntimeError: ``max_nonfinite`` steps in a row were not finite.
    """
    processes = connect_processes(config.parallel.context_parallel)
    config = _with_fast_dtype(config, processes.device)
    folder = config.folder
    before = _stored_config(folder, resume=resume)
    if dataset is None:
        dataset = _read_dataset(config)
    if resume and not other_data:
        _check_same_data(config, dataset)
    processes.wait()  # all have looked before the first one writes
    training, held_out = dataset.split(config.data.held_out_share, config.seed)
    with deterministic(config, processes), _Signals() as signals:
        for expert in config.model.experts:
            if resume and processes.agree(_is_finished(folder, config, expert)):
                logger.info("%s is finished", config.expert_folder(folder, expert))
                continue
            model = transformer[expert] if isinstance(transformer, Mapping) else transformer
            if model is None:
                logger.info("loading %s of %s", expert, config.model.source)
                model = load_transformer(config, expert)
            config = config.resolved(base_of(model))
            context = RunContext(
                config, expert, folder, processes, dataset, training, held_out, on_validate, lambda: signals.received
            )
            shapes = sorted({*training.buckets, *held_out.buckets})
            is_begun = resume and processes.agree(bool(checkpoints(context.expert_folder)))
            parts = prepare(model, config, processes, shapes, expert=expert, is_begun=bool(is_begun))
            run = Run(context, *parts, resume=resume)
            _store_config(folder, config, before, processes)
            run.train()
            del model, run
    return folder


# ---- the run's folder and surroundings -----------------------------------------------------------------------------


def _with_fast_dtype(config: TrainConfig, device: torch.device) -> TrainConfig:
    """Replace bf16 by fp32 on a CPU that emulates bf16, where a step would take up to 80 times as long."""
    if config.model.dtype == "fp32" or is_bf16_fast(device.type):
        return config
    logger.warning("this CPU has no bf16 of its own: training in fp32, which is much faster here")
    return config.model_copy(update={"model": config.model.model_copy(update={"dtype": "fp32"})})


def _stored_config(folder: Path, *, resume: bool) -> TrainConfig | None:
    """Read the configuration of the run to resume. Raises ValueError if there is a run that is not to be resumed."""
    stored = folder / CONFIG_FILE
    if not stored.is_file():
        return None
    if not resume and any(folder.glob("**/checkpoints/step-*")):
        raise ValueError(f"{folder} holds a run already: go on with --resume, or give another name or output")
    return load_config(stored) if resume else None


def _check_same_data(config: TrainConfig, dataset: Data) -> None:
    """Compare the data with those of the checkpoints. Raises ValueError if they are others."""
    for expert in config.model.experts:
        folder = config.expert_folder(config.folder, expert)
        found = checkpoints(folder)
        if found and read_state(found[max(found)])["data_hash"] != dataset.hash:
            raise ValueError(
                f"the data are not those that {folder} was trained on up to step {max(found)} (clips were added, "
                f"removed or changed, or data.folders={', '.join(config.data.folders)} is another): give the data it "
                "was begun with, or --other-data (other_data=True) to go on with these"
            )


def _store_config(folder: Path, config: TrainConfig, before: TrainConfig | None, processes: Processes) -> None:
    """Store the configuration and log what changed in it."""
    if not processes.is_main:
        return
    if before is not None:
        old, new = (dict(leaves(json.loads(c.model_dump_json(exclude={"output"})))) for c in (before, config))
        changes = [
            f"{name} was {old.get(name)} and is {new.get(name)}" for name in old | new if old.get(name) != new.get(name)
        ]
        if changes:
            logger.warning("the configuration has changed since the run began: %s", "; ".join(changes))
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / CONFIG_FILE) as part:
        part.write_text(config.to_json())


def _read_dataset(config: TrainConfig) -> Data:
    if not config.data.folders:
        raise ValueError(NO_FOLDERS)
    from pusa.data.dataset import LatentDataset

    return LatentDataset(config.data.folders)


def _is_finished(folder: Path, config: TrainConfig, expert: Expert) -> bool:
    found = checkpoints(config.expert_folder(folder, expert))
    if not found or not result_path(folder, config, expert).exists():
        return False
    state = read_state(found[max(found)])
    return state["step"] >= config.steps if config.steps is not None else state["seconds"] >= (config.seconds or 0.0)


@contextmanager
def deterministic(config: TrainConfig, processes: Processes) -> Iterator[None]:
    """Use deterministic kernels on a GPU within the context, if the configuration wants it."""
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
    """End a run after its step on SIGTERM (as Slurm sends it) or the first SIGINT, at once on a second SIGINT."""

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
