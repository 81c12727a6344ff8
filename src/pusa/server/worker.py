"""The worker: claims a job, has it run, says how far it is, stores what was made. A thread of the server, or alone.

A worker may end at any moment without anything being lost. What it has stored counts once the queue's row says so, and
the row takes words only from the attempt that holds the lease (`pusa.server.jobs`).
"""

import errno
import itertools
import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from pusa.server.executor import Executor, ExecutorState, LocalExecutor
from pusa.server.files import FileStore, StorageFullError
from pusa.server.jobs import Job, JobQueue, LeaseLost, QueueUnavailable
from pusa.server.logs import log_context
from pusa.server.messages import (
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
from pusa.server.progress import Pace, Progress
from pusa.server.settings import ServerSettings

__all__ = ["Worker", "make_executor", "run_worker", "worker_name"]

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.25  # between two looks at what is to be beaten, cancelled or stopped
_BEAT_SECONDS = 2.0  # at most, so that a cancel is seen soon
_PRESENCE_SECONDS = 10.0  # at most, between two signs of life of an idle worker
_AGAIN_SECONDS = 2.0  # after a database or a store that did not answer
_FULL_SECONDS = 15.0  # after a full disk: the job waits, and with it its checkpoint

_numbers = itertools.count()


def worker_name() -> str:
    """Unique, and tells others on this machine whether the process still runs: ``host/boot/pid-start/n``."""
    process = psutil.Process()
    return f"{_this_machine()}/{process.pid}-{process.create_time():.2f}/{next(_numbers)}"


def _this_machine() -> str:
    """This boot of it, and this container: numbers of processes mean the same only there."""
    boot = f"{psutil.boot_time():.0f}"
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with suppress(OSError):
        boot += "-" + os.readlink("/proc/self/ns/pid").strip("pid:[]")
    return f"{socket.gethostname()[:60]}/{boot}"


def is_dead(name: str) -> bool:
    """Whether a worker was a process of this machine that is no more; of others, nothing is known."""
    machine, _, rest = name.rpartition("/")[0].rpartition("/")
    if machine != _this_machine():
        return False
    pid, _, started = rest.partition("-")
    try:
        return f"{psutil.Process(int(pid)).create_time():.2f}" != started
    except psutil.NoSuchProcess:
        return True
    except (ValueError, psutil.Error):
        return False


class Worker:
    """Runs the queue's jobs one after another.

    Args:
        settings: leases, intervals and limits are read from it.
        queue, files: where the jobs and their files are.
        executor: who runs them; started and closed here.
        name: unique among all workers of the queue.
    """

    def __init__(
        self,
        settings: ServerSettings,
        queue: JobQueue,
        files: FileStore,
        executor: Executor,
        *,
        name: str | None = None,
    ) -> None:
        self.settings, self.queue, self.files, self.executor = settings, queue, files, executor
        self.name = name or worker_name()
        self.pace = Pace()
        self._folder = settings.scratch_folder / self.name.replace("/", "_")
        self._attempt: _Attempt | None = None
        self._stop = threading.Event()
        self._ended = threading.Event()
        self._told: dict[str, Any] = {}
        self._told_at = 0.0

    @property
    def state(self) -> ExecutorState:
        return self.executor.state

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set; the job that runs then goes back into the queue, with its checkpoint."""
        self._stop = stop
        self._folder.mkdir(parents=True, exist_ok=True)
        pulse = threading.Thread(target=self._pulse, name="pusa-pulse", daemon=True)
        pulse.start()
        try:
            self._whenever_possible(self._say_presence)  # before the first claim: a name that is known can be buried
            self._whenever_possible(self._bury_the_dead)
            self._whenever_possible(self._learn)
            while not stop.is_set():
                self._turn()
        finally:
            self.executor.close()
            self._ended.set()
            pulse.join()
            with suppress(QueueUnavailable):
                self.queue.forget_worker(self.name)
            shutil.rmtree(self._folder, ignore_errors=True)

    # ---- before and between jobs -------------------------------------------------------------------------------------

    def _whenever_possible(self, do: Callable[[], None]) -> None:
        while not self._stop.is_set():
            try:
                do()
                return
            except QueueUnavailable as error:
                logger.warning("the queue does not answer: %s", error)
                self._stop.wait(_AGAIN_SECONDS)

    def _bury_the_dead(self) -> None:
        """Workers of this machine that were killed: their jobs wait again at once, and their scratch is removed."""
        for record in self.queue.workers():
            if record.name != self.name and is_dead(record.name):
                count = self.queue.release_leases_of(record.name, max_failures=self.settings.max_failures)
                logger.info("worker %s is gone: %d of its jobs wait again", record.name, count)
                self.queue.forget_worker(record.name)
                shutil.rmtree(self._folder.with_name(record.name.replace("/", "_")), ignore_errors=True)

    def _learn(self) -> None:
        jobs, _ = self.queue.page(limit=50)
        self.pace.learn_all(job.timings for job in reversed(jobs) if job.status == "completed")

    def _turn(self) -> None:
        """One job, or one look for one."""
        if not self.executor.state.ready:
            self.executor.start()
            self._stop.wait(min(_LOOK_SECONDS, self.settings.poll_seconds))
            return
        try:
            job = self.queue.claim(
                self.name, lease_seconds=self.settings.lease_seconds, max_failures=self.settings.max_failures
            )
        except QueueUnavailable as error:
            logger.warning("the queue does not answer: %s", error)
            self._stop.wait(_AGAIN_SECONDS)
            return
        if job is None:
            self._stop.wait(self.settings.poll_seconds)
            return
        with log_context(job=job.id):
            self._work(job)

    def _pulse(self) -> None:
        """Signs of life, also while a step takes long; and who asks the executor to end."""
        while not self._ended.wait(_LOOK_SECONDS):
            try:
                if self._attempt is not None:
                    self._attempt.look(self._stop.is_set())
                self._say_presence()
            except QueueUnavailable as error:
                logger.warning("the queue does not answer: %s", error)
            except Exception:  # the one thread that must not end
                logger.exception("a beat failed")

    def _say_presence(self) -> None:
        state, attempt = self.executor.state, self._attempt
        said = {
            "ready": state.ready,
            "stage": state.stage,
            "percent": state.percent,
            "model": state.model,
            "world_size": state.world_size,
            "error": state.error,
            "job": None if attempt is None else attempt.job.id,
        }
        now = time.monotonic()
        if said != self._told or now - self._told_at >= min(_PRESENCE_SECONDS, self.settings.lease_seconds / 3):
            self.queue.beat_worker(self.name, said)
            self._told, self._told_at = said, now

    # ---- a job -------------------------------------------------------------------------------------------------------

    def _work(self, job: Job) -> None:
        folder = self._folder / f"{job.id}-{job.attempt}"
        attempt = _Attempt(self, job, folder)
        logger.info("attempt %d of %s begins", job.attempt, job.id)
        try:
            folder.mkdir()
            self._attempt = attempt
            attempt.run()
        except LeaseLost:
            logger.warning("attempt %d of %s is no longer ours: dropped", job.attempt, job.id)
            attempt.remove_own_files()
        except QueueUnavailable as error:
            logger.warning("attempt %d of %s could not tell the queue how it ended: %s", job.attempt, job.id, error)
        except Exception as error:  # of the store, or a mistake of ours: the worker must go on with other jobs
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                self._released(job, f"the disk is full: {error}")
                self._stop.wait(_FULL_SECONDS)
                return
            logger.exception("attempt %d of %s failed in the worker", job.attempt, job.id)
            told = f"its files could not be stored or read ({type(error).__name__})"
            with suppress(LeaseLost, QueueUnavailable):
                self.queue.fail(job, "storage_error", told, retry=True, max_failures=self.settings.max_failures)
            self._stop.wait(min(_AGAIN_SECONDS, self.settings.lease_seconds))
        finally:
            self._attempt = None
            shutil.rmtree(folder, ignore_errors=True)

    def _released(self, job: Job, why: str) -> None:
        logger.warning("attempt %d of %s goes back into the queue: %s", job.attempt, job.id, why)
        with suppress(LeaseLost, QueueUnavailable):
            self.queue.release(job)


class _Attempt:
    """One attempt at one job. `run` belongs to the worker's thread, `look` to its pulse."""

    def __init__(self, worker: Worker, job: Job, folder: Path) -> None:
        self.worker, self.job, self.folder = worker, job, folder
        self.queue, self.files, self.settings = worker.queue, worker.files, worker.settings
        self.progress = Progress(worker.pace)
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
                cancel = self.queue.beat(
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
            self.worker.executor.cancel()

    def look(self, is_stopping: bool) -> None:
        """Beat if it is time, and end what is to end."""
        now = time.monotonic()
        if now - self.beaten_at >= min(_BEAT_SECONDS, self.settings.lease_seconds / 3) and not self.is_lost:
            try:
                self.beat()
            except LeaseLost:
                self.is_lost = True
        self.is_overdue = now - self.began > self.settings.job_seconds
        if is_stopping or self.is_to_cancel or self.is_lost or self.is_overdue:
            self.worker.executor.cancel()  # again at each look: the task may not have begun at the first

    def _surely(self, do: Callable[[], Any]) -> Any:
        """What ends an attempt is worth waiting for: the work is done, and the database will be back."""
        while True:
            try:
                return do()
            except QueueUnavailable as error:
                logger.warning("the queue does not answer: %s", error)
                if self.worker._stop.wait(_AGAIN_SECONDS):
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
        messages = self.worker.executor.run(task)
        try:
            yield from messages
        finally:
            if hasattr(messages, "close"):
                messages.close()

    def _task(self) -> Task:
        """With the inputs, and the checkpoint if there is one, on this machine."""
        job = self.job
        if job.checkpoint is not None:
            with suppress(FileNotFoundError):
                stored = self.files.fetch(job.checkpoint, self.folder)
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
        path = self.files.fetch(key, self.folder)
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
                with suppress(StorageFullError):  # it can be done without
                    self.files.put_bytes(self._preview_key, image)
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
        key = f"checkpoints/{self.job.id}/{self.job.attempt}{path.suffix}"
        try:
            self.files.put_file(key, path)
        except StorageFullError as error:
            logger.warning("no checkpoint after step %d: %s", step, error)  # the job itself goes on
            return
        self.beat(checkpoint=key, checkpoint_step=step)
        if self.checkpoint not in (None, key):
            self.files.delete(str(self.checkpoint))
        self.checkpoint = key

    def _finish(self, files: Mapping[str, Path], timings: Mapping[str, float]) -> None:
        results = {kind: f"{self._results_prefix}/{path.name}" for kind, path in files.items()}
        for kind, path in files.items():
            self.files.put_file(results[kind], path)
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
        self.worker.pace.learn(timings)
        logger.info("attempt %d of %s is completed", self.job.attempt, self.job.id)
        self._remove_intermediate(keep=set(results.values()))

    def _fail(self, error: Error) -> None:
        if self.worker._stop.is_set() and error.code == "worker_lost":
            self.worker._released(self.job, "the worker is stopping")
            return
        if error.code == "disk_full":
            raise StorageFullError(error.message)
        results = {}
        if error.latents is not None:
            results["latents"] = f"{self._results_prefix}/latents.safetensors"
            self.files.put_file(results["latents"], error.latents)
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

    def _ended_early(self) -> None:
        """Between two steps, or killed: why is known here."""
        if self.is_to_cancel:
            self._surely(lambda: self.queue.cancelled(self.job))
            logger.info("attempt %d of %s is cancelled", self.job.attempt, self.job.id)
            self._remove_intermediate()
        elif self.is_overdue:
            told = f"it took longer than job_seconds={self.settings.job_seconds:g}"
            self._fail(Error("timed_out", told, retry=True))
        else:
            self.worker._released(self.job, "the worker is stopping")

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


def make_executor(settings: ServerSettings) -> Executor:
    """As the settings say. Raises ImportError where Ray is asked for and not installed."""
    if settings.executor == "ray":
        from pusa.server.ray_executor import RayExecutor

        return RayExecutor(
            settings.model,
            settings.lora,
            address=settings.ray_address,
            gpus=settings.ray_gpus,
            grace_seconds=settings.cancel_seconds,
        )
    return LocalExecutor(
        settings.model,
        settings.lora,
        grace_seconds=settings.cancel_seconds,
        load_seconds=settings.load_seconds,
        stall_seconds=settings.stall_seconds,
    )


def run_worker(settings: ServerSettings, stop: threading.Event) -> None:
    """`settings.workers` workers (at least one) in this process until `stop` is set: the body of ``pusa worker``."""
    queue, files = JobQueue(settings.database_url), FileStore(settings.files_url)
    workers = [Worker(settings, queue, files, make_executor(settings)) for _ in range(max(1, settings.workers))]
    threads = [threading.Thread(target=worker.run, args=(stop,), name=worker.name) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    queue.close()
