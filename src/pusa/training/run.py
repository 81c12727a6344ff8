"""Run the training loop of one transformer, from its first step or a checkpoint to its result."""

import json
import logging
import math
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from pusa import __version__
from pusa.models.bases import base_of
from pusa.resources import readable_time
from pusa.training.batches import Batch, BatchPlan, Data, Loader, Reader, held_out_batches
from pusa.training.checkpoint import (
    Tensors,
    checkpoints,
    folder_name,
    optimizer_tensors,
    random_states,
    read_process_state,
    read_state,
    restore_optimizers,
    restore_random_states,
    write_checkpoint,
)
from pusa.training.config import Expert, TrainConfig
from pusa.training.disk import check_disk, disk_need, explaining_full_disk
from pusa.training.distributed import Processes
from pusa.training.export import write_result
from pusa.training.model import Updater, kernels, lr_factor, make_optimizers, precision
from pusa.training.objective import LossBins, clip_losses, frame_errors
from pusa.training.reports import Reporter, check_tracker

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
_SILENCE_SECONDS = 20.0  # at most, while held-out clips are computed

Validate = Callable[[int, Any], Path | None]


class TrainingStoppedError(RuntimeError):
    """Raised when a signal ends a run early; its state is on disk."""


@dataclass
class RunProgress:
    """Count what a run has done so far; stored with each checkpoint."""

    step: int = 0
    seconds: float = 0.0  # spent in training steps, without evaluation and checkpoints
    waited_seconds: float = 0.0
    clips: int = 0
    skipped: int = 0
    skipped_in_row: int = 0


@dataclass(frozen=True)
class RunContext:
    """Hold the inputs of one transformer's training.

    Attributes:
        folder: of the whole run; with two experts each has its own inside.
        dataset, training, held_out: all clips, and the two parts of them.
        is_stopping: returns True once the run is to end after the current step.
    """

    config: TrainConfig
    expert: Expert
    folder: Path
    processes: Processes
    dataset: Data
    training: Data
    held_out: Data
    on_validate: Validate | None
    is_stopping: Callable[[], bool]

    @property
    def expert_folder(self) -> Path:
        """The folder of this expert's checkpoints and metrics."""
        return self.config.expert_folder(self.folder, self.expert)


class Run:
    """Train one transformer.

    Args:
        model: prepared by `pusa.training.model.prepare`.
        parameters: its trained parameters by name.
        resume: go on from the last checkpoint, if there is one. Nothing is written before `train`.

    Raises:
        ValueError: the checkpoint does not fit the model, the method or the settings.
    """

    def __init__(self, context: RunContext, model: Any, parameters: dict[str, Tensor], *, resume: bool = False) -> None:
        config, noise_range = context.config, context.config.model.experts[context.expert]
        self.context, self.config, self.processes = context, config, context.processes
        self.model, self.parameters, self.base = model, parameters, base_of(model)
        self.plan = BatchPlan(context.training.buckets, config, context.processes.data_parallel)
        self.reader = Reader(context.training, config, noise_range, self.base)
        self.held_out = Reader(context.held_out, config, noise_range, self.base)
        optimizers = make_optimizers(parameters, config.optimizer)
        self.updater = Updater(model, parameters, optimizers, ema_decay=config.ema_decay)
        self.average = self.updater.average
        self.progress = RunProgress()
        self.frames = max(shape[1] for data in (context.training, context.held_out) for shape in data.buckets)
        self.bins = LossBins(self.frames)
        self.losses: list[float] = []  # of the steps since the last log entry
        self.norms: list[float] = []
        self.seconds_before = 0.0  # spent in the last step after processes agreed on its time
        self.reporter: Reporter | None = None
        self.checkpoint = self._last_checkpoint() if resume else None
        if self.checkpoint is not None:
            self._resume_from(self.checkpoint)
        check_tracker(config)
        self.disk_need = disk_need(config, sum(p.numel() for p in parameters.values()))
        check_disk(config, self.disk_need, context.expert_folder)

    # ---- the loop --------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Train to the end and write the result. Raises as `trainer.train`."""
        with explaining_full_disk(self.context.expert_folder, "the log or the result", self.disk_need.result):
            self._train()

    def _train(self) -> None:
        if self.processes.is_main:
            self.reporter = Reporter(self.context.expert_folder, self.config, self.progress.step)
            self._write_facts()
        try:
            if self.progress.step == 0 and self.config.report.held_out_every:
                self._evaluate()
            self._loop(written_step=self.progress.step if self.checkpoint else None)
            if not self._is_done():
                raise TrainingStoppedError(
                    f"stopped after step {self.progress.step}, whose state is written: go on with --resume"
                )
            self._evaluate()
            if self.config.report.validate_every:
                self._validate()
            self._finish()
        finally:
            if self.reporter is not None:
                self.reporter.close()

    def _last_checkpoint(self) -> Path | None:
        found = checkpoints(self.context.expert_folder)
        step = self.processes.agree(max(found, default=-1))
        if step < 0:
            logger.info("%s has no checkpoint: the run begins", self.context.expert_folder)
        return None if step < 0 else self.context.expert_folder / "checkpoints" / folder_name(step)

    def _loop(self, written_step: int | None) -> None:
        """Train until the run is done or a signal stops it, and write a last checkpoint."""
        config, progress = self.config, self.progress
        every_seconds, written_seconds = config.checkpoint.every_seconds, progress.seconds
        logged = progress.seconds, progress.waited_seconds, progress.clips
        device, rank = self.processes.device, self.processes.data_rank
        stopping = False
        with Loader(self.reader, self.plan, data_rank=rank, first_step=progress.step, device=device) as loader:
            while not self._is_done() and not stopping:
                stopping = self.train_step(loader)
                step, is_done = progress.step, self._is_done()
                if step % config.report.log_every == 0 or is_done:
                    self._log(*logged)
                    logged = progress.seconds, progress.waited_seconds, progress.clips
                if _is_due(config.report.held_out_every, step) and not is_done:
                    self._evaluate()
                if _is_due(config.report.validate_every, step) and not is_done:
                    self._validate()
                late = every_seconds is not None and progress.seconds - written_seconds >= every_seconds
                if _is_due(config.checkpoint.every_steps, step) or late or stopping or is_done:
                    self._write()
                    written_step, written_seconds = step, progress.seconds
        if written_step != progress.step:  # the run was done already
            self._write()

    def _is_done(self) -> bool:
        if self.config.steps is not None:
            return self.progress.step >= self.config.steps
        return self.progress.seconds >= (self.config.seconds or 0.0)

    def _share_done(self) -> float:
        if self.config.steps is not None:
            return self.progress.step / self.config.steps
        return self.progress.seconds / (self.config.seconds or 1.0)

    def train_step(self, loader: Loader) -> bool:
        """Take one optimizer step. Returns True if a process received a signal to stop."""
        began, waited = time.monotonic(), loader.waited_seconds
        processes, progress = self.processes, self.progress
        self.updater.scale_rates(lr_factor(self.config.schedule, progress.step, self._share_done()))
        loss, clips = 0.0, 0
        with kernels(self.config, self.model):
            for _ in range(self.plan.accumulation):
                batch = loader.next()
                clips += batch.counted
                losses, errors = self._losses(batch)
                part = losses.mean()
                # Gradients are averaged over all processes; those that share a clip each hold a part of its gradient.
                (part * processes.context_parallel / self.plan.accumulation).backward()
                loss += float(part.detach()) / self.plan.accumulation
                self.bins.add(errors.detach().cpu(), batch.sigmas.cpu())
        spent = self.seconds_before + time.monotonic() - began
        numbers = [loss, float(self.context.is_stopping()), spent, loader.waited_seconds - waited]
        if self.config.parallel.fsdp:  # FSDP has reduced the gradients itself
            loss, stop, spent, lost = processes.mean(numbers)
        else:
            loss, stop, spent, lost = processes.average(self.updater.gradients, numbers)
        agreed = time.monotonic()
        clipped = self.updater.clip(self.config.optimizer.max_gradient_norm)
        norm = float(clipped.full_tensor() if isinstance(clipped, DTensor) else clipped)
        if math.isfinite(loss) and math.isfinite(norm):
            self.updater.update(progress.step)
            progress.skipped_in_row = 0
            self.losses.append(loss)
            self.norms.append(norm)
        else:
            self._skip(loss, norm)
        self.updater.clear()
        progress.step += 1
        progress.clips += clips * processes.data_parallel
        progress.seconds += spent
        progress.waited_seconds += lost
        self.seconds_before = time.monotonic() - agreed
        return stop > 0

    def _losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Compute the loss of each clip, ``[B]``, and the errors of its frames, ``[B, F]``."""
        clean, noise, sigmas, base = batch.latents, batch.noise, batch.sigmas, self.base
        x = base.add_noise(clean, noise, sigmas)
        with precision(self.config, self.processes.device):
            output = self.model(
                hidden_states=x,
                timestep=base.timesteps_of(sigmas),
                return_dict=False,
                **base.text_inputs(batch.embeds, x),
            )[0]
        errors = frame_errors(base.prediction(output, clean.shape[1]), base.target(clean, noise))
        losses = clip_losses(errors, sigmas, self.config.objective)
        return losses + base.further_loss(output, clean, noise, x, sigmas), errors

    def _skip(self, loss: float, norm: float) -> None:
        progress = self.progress
        progress.skipped += 1
        progress.skipped_in_row += 1
        clips = sorted(set(self.plan.step(progress.step).clips))
        if self.processes.is_main:
            logger.warning(
                "step %d is skipped: loss %g, gradient %g (clips %s)",
                *(progress.step, loss, norm, ", ".join(map(str, clips[:8]))),
            )
        if progress.skipped_in_row > self.config.max_nonfinite:
            raise RuntimeError(
                f"{progress.skipped_in_row} steps in a row were not finite (the last: loss {loss:g}, gradient "
                f"{norm:g}, clips {clips[:8]}): lower optimizer.lr, or look at these clips; the last checkpoint is "
                "intact"
            )

    # ---- reports --------------------------------------------------------------------------------------------------

    def _log(self, seconds: float, waited_seconds: float, clips: int) -> None:
        """Log an entry about the steps since a progress of so many seconds, seconds waited and clips."""
        progress = self.progress
        bins = LossBins(self.frames)
        bins.sums = self.processes.sum(self.bins.sums)
        self.bins = LossBins(self.frames)
        spent = max(progress.seconds - seconds, 1e-9)
        entry = {
            "loss": _mean(self.losses),
            "error": bins.mean(),
            "gradient_norm": _mean(self.norms),
            "learning_rate": self.updater.optimizers[-1].param_groups[0]["lr"],
            "seconds": progress.seconds,
            "clips": progress.clips,
            "clips_per_second": (progress.clips - clips) / spent,
            "data_share": (progress.waited_seconds - waited_seconds) / spent,
            "skipped": progress.skipped,
            "error_by_level": bins.by_level(),
            "error_by_frame": bins.by_frame(),
        }
        self.losses, self.norms = [], []
        if self.reporter is not None:
            self.reporter.log(progress.step, entry)
            logger.info(
                "step %d%s  loss %.4f  %.2f clips/s  %.1f %% of the time waiting for data%s",
                *(progress.step, f"/{self.config.steps}" if self.config.steps else "", entry["loss"]),
                *(entry["clips_per_second"], 100 * entry["data_share"], self._time_left()),
            )

    def _time_left(self) -> str:
        done = self._share_done()
        if not 0 < done < 1:
            return ""
        return f"  {readable_time(self.progress.seconds * (1 - done) / done)} left"

    def _evaluate(self) -> None:
        """Log the held-out loss, by level and frame too; of the moving average if there is one."""
        if not len(self.held_out.data):
            return
        processes, bins, total = self.processes, LossBins(self.frames), torch.zeros(2)
        reported = time.monotonic()
        draws = len(self.held_out.data) * self.config.report.held_out_draws
        share = math.ceil(draws / processes.data_parallel)
        batches = held_out_batches(self.held_out, data_rank=processes.data_rank, data_parallel=processes.data_parallel)
        with self._evaluation_weights(), torch.no_grad(), kernels(self.config, self.model):
            for batch in batches:
                losses, errors = self._losses(batch.to(processes.device))
                bins.add(errors[: batch.counted].cpu(), batch.sigmas[: batch.counted])
                total += torch.stack([losses[: batch.counted].sum().cpu(), torch.tensor(float(batch.counted))])
                if self.reporter is not None and time.monotonic() - reported > _SILENCE_SECONDS:
                    reported = time.monotonic()
                    logger.info("held-out loss: %d of %d clips here", total[1], share)
        bins.sums = processes.sum(bins.sums)
        loss, count = processes.sum(total).tolist()
        if self.reporter is not None:
            entry = {
                "held_out_loss": loss / count,
                "held_out_error": bins.mean(),
                "held_out_error_by_level": bins.by_level(),
                "held_out_error_by_frame": bins.by_frame(),
            }
            self.reporter.log(self.progress.step, entry)
            logger.info("step %d  held-out loss %.4f", self.progress.step, entry["held_out_loss"])

    def _validate(self) -> None:
        if self.context.on_validate is None:
            return
        states = random_states()
        logger.info("step %d  making validation videos", self.progress.step)
        with self._evaluation_weights(), torch.no_grad():
            image = self.context.on_validate(self.progress.step, self.model)
        if image is not None and self.reporter is not None:
            self.reporter.show(self.progress.step, image)
        restore_random_states(states)
        self.processes.wait()

    @contextmanager
    def _evaluation_weights(self) -> Iterator[None]:
        self.model.eval()
        with self.average.applied() if self.average is not None else nullcontext():
            yield
        self.model.train()

    # ---- results --------------------------------------------------------------------------------------------------

    def _layout(self) -> dict[str, Any]:
        """Return what must stay the same for a resumed run to give the same bits."""
        return {
            "processes": self.processes.world,
            "context_parallel": self.processes.context_parallel,
            "fsdp": self.config.parallel.fsdp,
            "device": self.processes.device.type,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }

    def _write(self) -> None:
        tensors = {
            "weights": self.parameters.items(),
            "average": self.average.averages.items() if self.average is not None else (),
            "optimizer": optimizer_tensors(self.updater.optimizers, self.parameters),
        }
        write_checkpoint(
            self.context.expert_folder,
            self.progress.step,
            state={**asdict(self.progress), "layout": self._layout(), "data_hash": self.context.dataset.hash},
            tensors=tensors,
            process_state={"bins": self.bins.sums, "losses": self.losses, "norms": self.norms},
            processes=self.processes,
            rule=self.config.checkpoint,
            need_bytes=self.disk_need.checkpoint,
        )

    def _resume_from(self, checkpoint: Path) -> None:
        state = read_state(checkpoint)
        layout, data_hash = state.pop("layout"), state.pop("data_hash")
        self.progress.__dict__.update(state)
        weights = Tensors(checkpoint, "weights")
        for name, parameter in self.parameters.items():
            weights.into(name, parameter)
        restore_optimizers(self.updater.optimizers, self.parameters, Tensors(checkpoint, "optimizer"))
        if self.average is not None:
            averages = Tensors(checkpoint, "average")
            for name, average in self.average.averages.items():
                (averages if name in averages else weights).into(name, average)
        process_state = read_process_state(checkpoint, self.processes.rank)
        if process_state:
            restore_random_states(process_state["random"])
            if process_state["bins"].shape == self.bins.sums.shape:
                self.bins.sums = process_state["bins"]
            self.losses, self.norms = process_state["losses"], process_state["norms"]
        if self.processes.is_main:
            changes = [f"{k} was {v} and is {self._layout()[k]}" for k, v in layout.items() if self._layout()[k] != v]
            if data_hash != self.context.dataset.hash:
                changes.append("the data have changed")
            logger.info("going on after step %d", self.progress.step)
            if changes:
                logger.warning(
                    "the run goes on, but not to the same bits as if it had not been stopped: %s", "; ".join(changes)
                )

    def _write_facts(self) -> None:
        trained = sum(p.numel() for p in self.parameters.values())
        facts = {
            "base_model": self.config.model.source,
            "expert": self.context.expert,
            "noise_range": list(self.held_out.noise_range),
            "method": self.config.method.kind,
            "trained_parameters": trained,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "clips": len(self.context.training),
            "held_out_clips": len(self.held_out.data),
            "data_hash": self.context.dataset.hash,
            "clips_per_step": len(self.plan.step(0).clips),
            "layout": self._layout(),
            "versions": {
                "pusa": __version__,
                **{name: version(name) for name in ("torch", "diffusers", "peft", "accelerate")},
            },
            "python": platform.python_version(),
        }
        (self.context.expert_folder / RUN_FILE).write_text(json.dumps(facts, indent=2) + "\n")

    def _finish(self) -> None:
        self.model.eval()
        if self.average is not None:
            self.average.swap()
        write_result(
            self.context.folder,
            self.model,
            self.parameters,
            config=self.config,
            expert=self.context.expert,
            step=self.progress.step,
            data_hash=self.context.dataset.hash,
            writes=self.processes.is_main,
        )
        self.processes.wait()


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _is_due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
