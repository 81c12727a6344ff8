"""Run one attempt at a job: send the task to the executor and apply its messages to the queue and the store."""

import errno
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pusa.codes import CodedText, detail_of
from pusa.events import Checkpoint, Done, Frames, Note, Planned, Preview, Resolved, Stage, Step
from pusa.server.jobs.queue import FileDigest, Job, JobQueue, LeaseLost, QueueUnavailable
from pusa.server.jobs.store import FileStore, StorageFullError, fragment_key
from pusa.server.settings import ServerSettings
from pusa.server.worker.executor import Executor
from pusa.server.worker.messages import CHECKPOINT_FILE, Cancelled, Error, Message, Task
from pusa.server.worker.progress import AttemptProgress, StageRatios

logger = logging.getLogger(__name__)

_HEARTBEAT_SECONDS = 2.0  # at most, so that the worker learns of a cancel soon


@dataclass(frozen=True)
class Delays:
    """Set the seconds that a worker waits before it tries again."""

    queue_seconds: float = 2.0  # after the queue was unavailable
    store_seconds: tuple[float, ...] = (2.0, 4.0, 8.0, 16.0, 32.0)  # between tries to reach the store
    disk_full_seconds: float = 15.0  # after a full disk; the job waits with its checkpoint
    reclaim_seconds: float = 5.0  # between two searches of an idle worker for dead workers of this machine


class _DamagedInputError(Exception):
    """Report that an input is not what was stored."""


class Attempt:
    """Run a claimed job to its end. The worker's thread calls `run`, its supervising thread `supervise`.

    Args:
        job: the claimed job.
        folder: scratch folder of this attempt on this machine; the caller removes it.
        ratios: stage durations of earlier jobs; learns from this one.
        stop: set when the worker must stop; the job then returns to the queue.
        delays: before the queue or the store is tried again.
    """

    def __init__(
        self,
        settings: ServerSettings,
        queue: JobQueue,
        files: FileStore,
        executor: Executor,
        job: Job,
        folder: Path,
        ratios: StageRatios,
        stop: threading.Event,
        delays: Delays,
    ) -> None:
        self.settings, self.queue, self.files, self.executor = settings, queue, files, executor
        self.job, self.folder, self.ratios, self.stop, self.delays = job, folder, ratios, stop, delays
        self.progress = AttemptProgress(
            ratios, job.checkpoint_step / job.steps if job.checkpoint and job.steps else 0.0
        )
        self.notes, self.note_details = list(job.notes), list(job.note_details)
        self.checkpoint = job.checkpoint
        self.heartbeat_at = self.started_at = time.monotonic()
        self.lease_lost = self.cancel_requested = self.timed_out = False
        self._fragments = self._streamed_bytes = 0  # of a video that is made piece by piece
        self._pending: dict[str, Any] = {}
        self._lock = threading.Lock()

    def _note(self, detail: dict[str, Any]) -> None:
        self.notes.append(detail["message"])
        self.note_details.append(detail)

    # ---- queue -------------------------------------------------------------------------------------------------------

    def heartbeat(self, **changes: Any) -> None:
        """Extend the lease and report changes; keep them for a later heartbeat if the queue is unavailable.

        Raises LeaseLost.
        """
        with self._lock:
            self._pending |= changes
            try:
                cancel = self.queue.heartbeat(
                    self.job,
                    lease_seconds=self.settings.lease_seconds,
                    progress=self.progress.percent,
                    seconds_left=self.progress.seconds_left,
                    **self._pending,
                )
            except QueueUnavailable as error:
                logger.warning("the queue does not answer: %s", error)
                return
            self._pending = {}
            self.heartbeat_at = time.monotonic()
        if cancel and not self.cancel_requested:
            self.cancel_requested = True
            self.executor.cancel()

    def supervise(self) -> None:
        """Send a heartbeat if it is due, and cancel the task if the attempt must end."""
        now = time.monotonic()
        if now - self.heartbeat_at >= min(_HEARTBEAT_SECONDS, self.settings.lease_seconds / 3) and not self.lease_lost:
            try:
                self.heartbeat()
            except LeaseLost:
                self.lease_lost = True
        self.timed_out = now - self.started_at > self.settings.job_seconds
        if self.stop.is_set() or self.cancel_requested or self.lease_lost or self.timed_out:
            self.executor.cancel()  # each time: the task may not have begun at the first

    def _retry_queue(self, call: Callable[[], Any]) -> Any:
        """Call the queue until it answers or the worker stops, so that the end of an attempt is not lost."""
        while True:
            try:
                return call()
            except QueueUnavailable as error:
                logger.warning("the queue does not answer: %s", error)
                if self.stop.wait(self.delays.queue_seconds):
                    raise

    # ---- task --------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run the task and handle its messages. Raises LeaseLost, QueueUnavailable and the store's errors."""
        for message in self._messages():
            if self.lease_lost:
                raise LeaseLost(self.job)
            self._handle(message)

    def _messages(self) -> Iterator[Message]:
        try:
            task = self._task()
        except FileNotFoundError:
            yield Error("input_gone", "an input of this job is no longer stored: send it again", retry=False)
            return
        except _DamagedInputError:
            yield Error("input_damaged", "an input of this job is damaged on the disk: send it again", retry=False)
            return
        messages = self.executor.run(task)
        try:
            yield from messages
        finally:
            if hasattr(messages, "close"):
                messages.close()

    def _task(self) -> Task:
        """Make the task, with its inputs and its checkpoint (if any) on this machine."""
        job = self.job
        if job.checkpoint is not None:
            self._fetch_checkpoint(job.checkpoint)
        request = dict(job.resolved or job.request)
        return Task(
            job_id=job.id,
            attempt=job.attempt,
            request={**request, "metadata": self.settings.limit_metadata(request.get("metadata"))},
            folder=self.folder,
            inputs={key: self._input(key) for key in dict.fromkeys(job.inputs)},
            checkpoint_every=self.settings.checkpoint_steps,
            checkpoint_seconds=self.settings.checkpoint_seconds,
            preview_seconds=self.settings.preview_seconds,
            preview_decoder=self.settings.preview_decoder_file,
            marks=self.settings.marks,
        )

    def _fetch_checkpoint(self, key: str) -> None:
        """Fetch the checkpoint; without an intact one start the job from the beginning, with a note."""
        try:
            stored = self._retry_store(lambda: self.files.fetch(key, self.folder))
            if self._is_intact(key, stored):
                shutil.copyfile(stored, self.folder / CHECKPOINT_FILE)
                return
            problem = "was damaged"
        except FileNotFoundError:
            problem = "was gone"
        step = self.job.checkpoint_step
        note = CodedText(
            "checkpoint_lost",
            f"its checkpoint of step {step} {problem}: it was made again from the beginning",
            step=step,
        )
        logger.error("%s of %s %s", key, self.job.id, problem)
        self._retry_queue(lambda: self.queue.drop_checkpoint(self.job, note))
        self._note(detail_of(note))
        self.checkpoint = None
        self.progress = AttemptProgress(self.ratios, 0.0)
        self._try_optional("checkpoint", lambda: self.files.delete(key))

    def _is_intact(self, key: str, path: Path) -> bool:
        """Compare a fetched file of this job with what was recorded of it."""
        expected = self._retry_queue(lambda: self.queue.digest(self.job.id, key))
        return expected is None or FileDigest.of(path) == expected

    def _input(self, key: str) -> Path:
        """Fetch an input under its own name, which the video's metadata holds, whatever the store is.

        Raises _DamagedInputError.
        """
        path = self._retry_store(lambda: self.files.fetch(key, self.folder))
        if not self._is_intact(key, path):
            raise _DamagedInputError
        name = key.rpartition("/")[2]
        return path if path.name == name else path.rename(self.folder / name)

    def _handle(self, message: Message) -> None:
        match message:
            case Stage(stage):
                self.progress.stage(stage)
                self.heartbeat(stage=stage)
            case Step(stage="load"):
                pass  # it shows that the process works
            case Step(stage="encode"):
                self.heartbeat(stage="encode")  # a job's steps are those of denoising
            case Step(step, steps, seconds_left):
                self.progress.step(step, steps, seconds_left)
                self.heartbeat(stage="denoise", step=step, steps=steps)
            case Note(text, code=code, values=values):
                if text not in self.notes:
                    self._note({"code": code, "values": values, "message": text})
                    self.heartbeat(notes=self.notes, note_details=self.note_details)
            case Planned(summary):
                self.heartbeat(plan=summary)
            case Resolved(request):
                if self.job.resolved is None:
                    self.heartbeat(resolved=request)
            case Preview(image):
                self._try_optional("preview", lambda: self.files.put_bytes(self._preview_key, image))
            case Frames(path=Path() as path):
                self._keep_fragment(path)
            case Checkpoint(path, step):
                self._keep_checkpoint(path, step)
            case Done(files, timings):
                self._finish(files, timings)
            case Error():
                self._fail(message)
            case Cancelled():
                self._handle_cancelled()

    # ---- checkpoints and results -------------------------------------------------------------------------------------

    @property
    def _preview_key(self) -> str:
        return f"previews/{self.job.id}.webp"

    @property
    def _results_prefix(self) -> str:
        return f"results/{self.job.id}/{self.job.attempt}"

    def _keep_fragment(self, path: Path) -> None:
        """Write what a growing video has gained to the store, for those who watch it."""
        try:
            with path.open("rb") as file:
                file.seek(self._streamed_bytes)
                data = file.read()
        except FileNotFoundError:  # it is complete by now
            return
        key = fragment_key(self.job.id, self.job.attempt, self._fragments)
        if data and self._try_optional("part of the video", lambda: self.files.put_bytes(key, data)):
            self._streamed_bytes += len(data)
            self._fragments += 1

    def _keep_checkpoint(self, path: Path, step: int) -> None:
        """Write a checkpoint to the store, then to the row; then remove the one of an earlier attempt."""
        kept = self.folder / f"kept-{step}{path.suffix}"
        try:
            os.link(path, kept)  # the engine replaces or removes its file at any moment
        except FileNotFoundError:
            return
        digest = FileDigest.of(kept)
        # A key of its own: until the row names it the earlier checkpoint must stay as the row describes it.
        key = f"checkpoints/{self.job.id}/{self.job.attempt}-{step}{path.suffix}"
        is_stored = self._try_optional("checkpoint", lambda: self.files.put_file(key, kept))
        kept.unlink()
        if not is_stored:
            return
        self.heartbeat(checkpoint=key, checkpoint_step=step, checkpoint_digest=digest)
        if self._pending:
            return  # the row still names the earlier one
        earlier, self.checkpoint = self.checkpoint, key
        if earlier not in (None, key):
            self._try_optional("checkpoint", lambda: self.files.delete(str(earlier)))

    def _try_optional(self, what: str, call: Callable[[], Any]) -> bool:
        """Call the store for something that the job can do without; log an error and return False."""
        try:
            call()
        except Exception as error:  # a full disk, or a store's own errors, which are of any type
            logger.warning("%s of %s: %s: %s", what, self.job.id, type(error).__name__, error)
            return False
        return True

    def _retry_store(self, call: Callable[[], Any]) -> Any:
        """Call the store, with retries for about a minute; then raise its error. Heartbeats go on meanwhile."""
        for seconds in self.delays.store_seconds:
            try:
                return call()
            except (FileNotFoundError, StorageFullError):
                raise
            except Exception as error:  # a store's own errors are of any type
                logger.warning("the store does not answer: %s: %s", type(error).__name__, error)
                if self.stop.wait(seconds):
                    raise
            if self.lease_lost:
                raise LeaseLost(self.job)
        return call()

    def _finish(self, files: Mapping[str, Path], timings: Mapping[str, float]) -> None:
        results = {kind: f"{self._results_prefix}/{path.name}" for kind, path in files.items()}
        digests = {results[kind]: FileDigest.of(path) for kind, path in files.items()}
        for kind, path in files.items():
            self._retry_store(partial(self.files.put_file, results[kind], path))
            if self.lease_lost:
                raise LeaseLost(self.job)
        waited = max(0.0, (self.job.started_at or self.job.created_at) - self.job.created_at)
        keep_seconds = self.settings.keep_seconds
        self._retry_queue(
            lambda: self.queue.finish(
                self.job,
                results=results,
                timings={**timings, "queue": round(waited, 4)},
                expires_at=None if keep_seconds is None else time.time() + keep_seconds,
                digests=digests,
            )
        )
        self.ratios.learn(timings)
        logger.info("attempt %d of %s is completed", self.job.attempt, self.job.id)
        self._remove_intermediate(keep=set(results.values()))

    def _fail(self, error: Error) -> None:
        if self.stop.is_set() and error.code == "worker_lost":
            self.release("the worker is stopping")
            return
        if error.code == "disk_full":
            raise StorageFullError(errno.ENOSPC, error.message)
        results, digests = {}, {}
        if error.latents is not None:
            results["latents"] = f"{self._results_prefix}/latents.safetensors"
            digests[results["latents"]] = FileDigest.of(error.latents)
            self._retry_store(partial(self.files.put_file, results["latents"], error.latents))
        message = error.message
        if results:
            message += f"; the denoised latents are kept as {results['latents']}: finish them with `pusa decode`"
        status = self._retry_queue(
            lambda: self.queue.fail(
                self.job,
                error.code,
                message,
                values=error.values,
                retry=error.retry,
                max_failures=self.settings.max_failures,
                retry_seconds=self.settings.backoff_seconds,
                results=results or None,
                digests=digests,
            )
        )
        attempt = f"attempt {self.job.attempt} of {self.job.id}"
        logger.warning("%s failed (%s: %s): %s", attempt, error.code, message, status)
        if status != "queued":
            self._remove_intermediate(keep=set(results.values()))

    def release(self, reason: str) -> None:
        """Return the job to the queue without counting a failure, if the queue answers."""
        logger.warning("attempt %d of %s goes back into the queue: %s", self.job.attempt, self.job.id, reason)
        with suppress(LeaseLost, QueueUnavailable):
            self.queue.release(self.job)

    def fail(self, code: str, message: str) -> None:
        """Report a failure that another attempt may avoid, if the queue answers."""
        with suppress(LeaseLost, QueueUnavailable):
            self.queue.fail(
                self.job,
                code,
                message,
                retry=True,
                max_failures=self.settings.max_failures,
                retry_seconds=self.settings.backoff_seconds,
            )

    def _handle_cancelled(self) -> None:
        """End an attempt whose task was cancelled, by the reason for which `supervise` cancelled it."""
        if self.cancel_requested:
            self._retry_queue(lambda: self.queue.confirm_cancel(self.job))
            logger.info("attempt %d of %s is cancelled", self.job.attempt, self.job.id)
            self._remove_intermediate()
        elif self.timed_out:
            message = f"it took longer than job_seconds={self.settings.job_seconds:g}"
            self._fail(Error("timed_out", message, retry=True, values={"seconds": self.settings.job_seconds}))
        else:
            self.release("the worker is stopping")

    def remove_results(self) -> None:
        """Remove the results of this attempt, which has lost its lease, so that no row will name them."""
        try:
            self.files.delete_prefix(self._results_prefix)
            if self.queue.get(self.job.id) is None:  # deleted while this attempt was writing
                self._remove_intermediate()
        except Exception:  # a store's own errors are of any type; housekeeping removes the rest
            logger.exception("files of attempt %d of %s were not removed", self.job.attempt, self.job.id)

    def _remove_intermediate(self, keep: Collection[str] = ()) -> None:
        """Remove the files that an ended job does not need, including those of killed attempts."""
        try:
            self.files.delete_prefix(f"checkpoints/{self.job.id}")
            self.files.delete(self._preview_key)
            self.files.delete_prefix(f"previews/{self.job.id}")
            for key, _ in list(self.files.keys(f"results/{self.job.id}")):
                if key not in keep:
                    self.files.delete(key)
        except Exception:  # the job has ended already; housekeeping removes the rest
            logger.exception("files of %s were not removed", self.job.id)
