"""One attempt at one job: the task for the executor, what its messages mean for the row and the store, and the end."""

import errno
import logging
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from pusa.server.jobs.queue import Job, JobQueue, LeaseLost, QueueUnavailable
from pusa.server.jobs.store import FileStore, StorageFullError
from pusa.server.settings import ServerSettings
from pusa.server.worker.executor import Executor
from pusa.server.worker.messages import (
    CHECKPOINT_FILE,
    Cancelled,
    Checkpoint,
    Done,
    Error,
    Message,
    Note,
    Preview,
    Resolved,
    Stage,
    Step,
    Task,
)
from pusa.server.worker.progress import Pace, Progress

logger = logging.getLogger(__name__)

AGAIN_SECONDS = 2.0  # after a database or a store that did not answer
_STORE_WAITS_SECONDS = (2.0, 4.0, 8.0, 16.0, 32.0)  # between tries to reach a store
_BEAT_SECONDS = 2.0  # at most, so that a cancel is seen soon


class Attempt:
    """From the claim to the end. `run` belongs to the worker's thread, `look` to its pulse.

    Args:
        job: claimed.
        folder: of this attempt alone, on this machine; the caller removes it.
        pace: what earlier jobs took; learns from this one.
        stop: set when the worker is to end: the job goes back into the queue.
    """

    def __init__(
        self,
        settings: ServerSettings,
        queue: JobQueue,
        files: FileStore,
        executor: Executor,
        job: Job,
        folder: Path,
        pace: Pace,
        stop: threading.Event,
    ) -> None:
        self.settings, self.queue, self.files, self.executor = settings, queue, files, executor
        self.job, self.folder, self.pace, self.stop = job, folder, pace, stop
        self.progress = Progress(pace, job.checkpoint_step / job.steps if job.checkpoint and job.steps else 0.0)
        self.notes = list(job.notes)
        self.checkpoint = job.checkpoint
        self.beaten_at = self.began = time.monotonic()
        self.is_lost = self.is_to_cancel = self.is_overdue = False
        self._unsaid: dict[str, Any] = {}
        self._lock = threading.Lock()

    # ---- the row -----------------------------------------------------------------------------------------------------

    def beat(self, **said: Any) -> None:
        """The lease, and what is new; what cannot be said now is said by a later beat. Raises LeaseLost."""
        with self._lock:
            self._unsaid |= said
            try:
                cancel = self.queue.heartbeat(
                    self.job,
                    lease_seconds=self.settings.lease_seconds,
                    progress=self.progress.percent,
                    seconds_left=self.progress.seconds_left,
                    **self._unsaid,
                )
            except QueueUnavailable as error:
                logger.warning("the queue does not answer: %s", error)
                return
            self._unsaid = {}
            self.beaten_at = time.monotonic()
        if cancel and not self.is_to_cancel:
            self.is_to_cancel = True
            self.executor.cancel()

    def look(self) -> None:
        """Beat if it is time, and end what is to end."""
        now = time.monotonic()
        if now - self.beaten_at >= min(_BEAT_SECONDS, self.settings.lease_seconds / 3) and not self.is_lost:
            try:
                self.beat()
            except LeaseLost:
                self.is_lost = True
        self.is_overdue = now - self.began > self.settings.job_seconds
        if self.stop.is_set() or self.is_to_cancel or self.is_lost or self.is_overdue:
            self.executor.cancel()  # again at each look: the task may not have begun at the first

    def _surely(self, do: Callable[[], Any]) -> Any:
        """What ends an attempt is worth waiting for: the work is done, and the database will be back."""
        while True:
            try:
                return do()
            except QueueUnavailable as error:
                logger.warning("the queue does not answer: %s", error)
                if self.stop.wait(AGAIN_SECONDS):
                    raise

    # ---- from the claim to the end -----------------------------------------------------------------------------------

    def run(self) -> None:
        for message in self._messages():
            if self.is_lost:
                raise LeaseLost(self.job)
            self._take(message)

    def _messages(self) -> Iterator[Message]:
        try:
            task = self._task()
        except FileNotFoundError:
            yield Error("invalid_request", "an input of this job is no longer stored: send it again", retry=False)
            return
        messages = self.executor.run(task)
        try:
            yield from messages
        finally:
            if hasattr(messages, "close"):
                messages.close()

    def _task(self) -> Task:
        """With the inputs, and the checkpoint if there is one, on this machine."""
        job = self.job
        if job.checkpoint is not None:
            key = job.checkpoint
            with suppress(FileNotFoundError):
                stored = self._patiently(lambda: self.files.fetch(key, self.folder))
                shutil.copyfile(stored, self.folder / CHECKPOINT_FILE)
        return Task(
            job_id=job.id,
            attempt=job.attempt,
            request=dict(job.resolved or job.request),
            folder=self.folder,
            inputs={key: self._input(key) for key in dict.fromkeys(job.inputs)},
            checkpoint_every=self.settings.checkpoint_steps,
            checkpoint_seconds=self.settings.checkpoint_seconds,
            preview_seconds=self.settings.preview_seconds,
        )

    def _input(self, key: str) -> Path:
        """Under its own name, which is stored in the video: the same whatever the store is."""
        path = self._patiently(lambda: self.files.fetch(key, self.folder))
        name = key.rpartition("/")[2]
        return path if path.name == name else path.rename(self.folder / name)

    def _take(self, message: Message) -> None:
        match message:
            case Stage(stage):
                self.progress.stage(stage)
                self.beat(stage=stage)
            case Step(step, steps, seconds_left):
                self.progress.step(step, steps, seconds_left)
                self.beat(stage="denoise", step=step, steps=steps)
            case Note(text):
                if text not in self.notes:
                    self.notes.append(text)
                    self.beat(notes=self.notes)
            case Resolved(request):
                if self.job.resolved is None:
                    self.beat(resolved=request)
            case Preview(image):
                self._as_far_as_possible("preview", lambda: self.files.put_bytes(self._preview_key, image))
            case Checkpoint(path, step):
                self._keep_checkpoint(path, step)
            case Done(files, timings):
                self._finish(files, timings)
            case Error():
                self._fail(message)
            case Cancelled():
                self._ended_early()

    # ---- checkpoints and results -------------------------------------------------------------------------------------

    @property
    def _preview_key(self) -> str:
        return f"previews/{self.job.id}.webp"

    @property
    def _results_prefix(self) -> str:
        return f"results/{self.job.id}/{self.job.attempt}"

    def _keep_checkpoint(self, path: Path, step: int) -> None:
        """In the store, then in the row; the one of an earlier attempt is removed after that."""
        if not path.exists():
            return  # the video is made by now, and its checkpoint was removed before we came to it
        key = f"checkpoints/{self.job.id}/{self.job.attempt}{path.suffix}"
        if not self._as_far_as_possible("checkpoint", lambda: self.files.put_file(key, path)):
            return
        self.beat(checkpoint=key, checkpoint_step=step)
        if self._unsaid:
            return  # the row still names the one before
        before, self.checkpoint = self.checkpoint, key
        if before not in (None, key):
            self._as_far_as_possible("checkpoint", lambda: self.files.delete(str(before)))

    def _as_far_as_possible(self, what: str, do: Callable[[], Any]) -> bool:
        """Whether it could be done; a job does not end for want of what it can do without."""
        try:
            do()
        except Exception as error:  # a full disk, or a store's own errors, which are of any kind
            logger.warning("%s of %s: %s: %s", what, self.job.id, type(error).__name__, error)
            return False
        return True

    def _patiently(self, do: Callable[[], Any]) -> Any:
        """A store may be out of reach for a minute; then its error is raised. The pulse holds the lease meanwhile."""
        for seconds in _STORE_WAITS_SECONDS:
            try:
                return do()
            except (FileNotFoundError, StorageFullError):
                raise
            except Exception as error:  # a store's own errors are of any kind
                logger.warning("the store does not answer: %s: %s", type(error).__name__, error)
                if self.stop.wait(seconds):
                    raise
            if self.is_lost:
                raise LeaseLost(self.job)
        return do()

    def _finish(self, files: Mapping[str, Path], timings: Mapping[str, float]) -> None:
        results = {kind: f"{self._results_prefix}/{path.name}" for kind, path in files.items()}
        for kind, path in files.items():
            self._patiently(partial(self.files.put_file, results[kind], path))
            if self.is_lost:
                raise LeaseLost(self.job)
        waited = max(0.0, (self.job.started_at or self.job.created_at) - self.job.created_at)
        keep_seconds = self.settings.keep_seconds
        self._surely(
            lambda: self.queue.finish(
                self.job,
                results=results,
                timings={**timings, "queue": round(waited, 4)},
                expires_at=None if keep_seconds is None else time.time() + keep_seconds,
            )
        )
        self.pace.learn(timings)
        logger.info("attempt %d of %s is completed", self.job.attempt, self.job.id)
        self._remove_intermediate(keep=set(results.values()))

    def _fail(self, error: Error) -> None:
        if self.stop.is_set() and error.code == "worker_lost":
            self.release("the worker is stopping")
            return
        if error.code == "disk_full":
            raise StorageFullError(errno.ENOSPC, error.message)
        results = {}
        if error.latents is not None:
            results["latents"] = f"{self._results_prefix}/latents.safetensors"
            self._patiently(partial(self.files.put_file, results["latents"], error.latents))
        told = error.message
        if results:
            told += f"; the denoised latents are kept as {results['latents']}: finish them with `pusa decode`"
        status = self._surely(
            lambda: self.queue.fail(
                self.job,
                error.code,
                told,
                retry=error.retry,
                max_failures=self.settings.max_failures,
                results=results or None,
            )
        )
        logger.warning("attempt %d of %s failed (%s: %s): %s", self.job.attempt, self.job.id, error.code, told, status)
        if status != "queued":
            self._remove_intermediate(keep=set(results.values()))

    def release(self, why: str) -> None:
        """Back into the queue, with no failure counted."""
        logger.warning("attempt %d of %s goes back into the queue: %s", self.job.attempt, self.job.id, why)
        with suppress(LeaseLost, QueueUnavailable):
            self.queue.release(self.job)

    def fail(self, code: str, message: str) -> None:
        """As far as the queue answers: another attempt may do better."""
        with suppress(LeaseLost, QueueUnavailable):
            self.queue.fail(self.job, code, message, retry=True, max_failures=self.settings.max_failures)

    def _ended_early(self) -> None:
        """Between two steps, or killed: why is known here."""
        if self.is_to_cancel:
            self._surely(lambda: self.queue.confirm_cancel(self.job))
            logger.info("attempt %d of %s is cancelled", self.job.attempt, self.job.id)
            self._remove_intermediate()
        elif self.is_overdue:
            told = f"it took longer than job_seconds={self.settings.job_seconds:g}"
            self._fail(Error("timed_out", told, retry=True))
        else:
            self.release("the worker is stopping")

    def remove_own_files(self) -> None:
        """What this attempt has stored and, its lease being lost, nobody is going to name."""
        try:
            self.files.delete_prefix(self._results_prefix)
            if self.queue.get(self.job.id) is None:  # deleted, while this attempt was still writing
                self._remove_intermediate()
        except Exception:  # a store's own errors are of any kind; housekeeping finds what is left
            logger.exception("files of attempt %d of %s were not removed", self.job.attempt, self.job.id)

    def _remove_intermediate(self, keep: Collection[str] = ()) -> None:
        """What is of no use once the job has ended, also of attempts that were killed."""
        try:
            self.files.delete_prefix(f"checkpoints/{self.job.id}")
            self.files.delete(self._preview_key)
            for key, _ in list(self.files.keys(f"results/{self.job.id}")):
                if key not in keep:
                    self.files.delete(key)
        except Exception:  # the job has ended well or badly already; housekeeping finds what is left
            logger.exception("files of %s were not removed", self.job.id)
