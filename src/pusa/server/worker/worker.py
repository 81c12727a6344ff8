"""Claim jobs, run them, report their progress and store their results, in a thread of the server or a process.

A worker may die at any moment and nothing is lost: a stored file counts once the queue's row names it, and only the
attempt that holds the lease changes the row (`pusa.server.jobs.queue`).
"""

import logging
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from pusa.fsutil import is_full, private_folder
from pusa.server.jobs.queue import Job, JobQueue, LeaseLost, QueueUnavailable
from pusa.server.jobs.store import FileStore
from pusa.server.logs import log_context
from pusa.server.plans import machine_as_json
from pusa.server.settings import ServerSettings
from pusa.server.worker.attempt import Attempt, Delays
from pusa.server.worker.engine_process import LOAD_WORDS, PUSA_ENGINE
from pusa.server.worker.executor import Executor, ExecutorState
from pusa.server.worker.local import LocalExecutor
from pusa.server.worker.placement import place
from pusa.server.worker.progress import StageRatios
from pusa.worker_names import is_dead, worker_name

__all__ = ["Worker", "is_dead", "make_executor", "run_worker", "worker_name"]

logger = logging.getLogger(__name__)

_TICK_SECONDS = 0.25  # interval of the supervising thread
_RECORD_SECONDS = 10.0  # at most, between two records of an unchanged state


class Worker:
    """Run the queue's jobs one after another.

    Args:
        settings: leases, intervals and limits.
        queue, files: the jobs and their files.
        executor: runs the jobs; the worker starts and closes it.
        name: unique among all workers of the queue; None makes one.
        delays: before the queue, the store, a full disk or dead workers are looked at again.
    """

    def __init__(
        self,
        settings: ServerSettings,
        queue: JobQueue,
        files: FileStore,
        executor: Executor,
        *,
        name: str | None = None,
        delays: Delays | None = None,
    ) -> None:
        self.settings, self.queue, self.files, self.executor = settings, queue, files, executor
        self.name = name or worker_name()
        self.delays = delays or Delays()
        self.ratios = StageRatios()
        self._folder = settings.scratch_folder / self.name.replace("/", "_")
        self._attempt: Attempt | None = None
        self._stop = threading.Event()
        self._ended = threading.Event()
        self._recorded: dict[str, Any] = {}
        self._recorded_at = self._reclaimed_at = 0.0

    @property
    def state(self) -> ExecutorState:
        return self.executor.state

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set; then return the running job to the queue, with its checkpoint."""
        self._stop = stop
        self._folder.mkdir(parents=True, exist_ok=True)
        supervisor = threading.Thread(target=self._supervise, name="pusa-supervisor", daemon=True)
        supervisor.start()
        try:
            self._retry(self._record_state)  # before the first claim: others reclaim jobs of recorded workers only
            self._retry(self._reclaim_dead_workers)
            self._retry(self._learn_durations)
            while not stop.is_set():
                try:
                    self._run_next_job()
                except Exception:  # such as no memory for a new process: the next try may succeed
                    logger.exception("worker %s goes on after an error", self.name)
                    stop.wait(self.delays.queue_seconds)
        finally:
            self.executor.close()
            self._ended.set()
            supervisor.join()
            with suppress(QueueUnavailable):
                self.queue.forget_worker(self.name)
            shutil.rmtree(self._folder, ignore_errors=True)

    # ---- before and between jobs -------------------------------------------------------------------------------------

    def _retry(self, call: Callable[[], None]) -> None:
        while not self._stop.is_set():
            try:
                call()
                return
            except QueueUnavailable as error:
                logger.warning("the queue does not answer: %s", error)
                self._stop.wait(self.delays.queue_seconds)

    def _reclaim_dead_workers(self) -> None:
        """Return the jobs of killed workers of this machine to the queue and remove their scratch folders."""
        self._reclaimed_at = time.monotonic()
        for record in self.queue.workers():
            if record.name != self.name and is_dead(record.name):
                count = self.queue.release_leases_of(record.name, max_failures=self.settings.max_failures)
                logger.info("worker %s is gone: %d of its jobs wait again", record.name, count)
                self.queue.forget_worker(record.name)
                shutil.rmtree(self._folder.with_name(record.name.replace("/", "_")), ignore_errors=True)

    def _learn_durations(self) -> None:
        jobs, _ = self.queue.page(limit=50)
        self.ratios.learn_all(job.timings for job in reversed(jobs) if job.status == "completed")

    def _run_next_job(self) -> None:
        """Claim and run one job, or wait a moment if there is none or the model is not loaded."""
        if not self.executor.state.ready:
            self.executor.start()
            self._stop.wait(min(_TICK_SECONDS, self.settings.poll_seconds))
            return
        try:
            job = self.queue.claim(
                self.name, lease_seconds=self.settings.lease_seconds, max_failures=self.settings.max_failures
            )
            if job is None and time.monotonic() - self._reclaimed_at > self.delays.reclaim_seconds:
                self._reclaim_dead_workers()
        except QueueUnavailable as error:
            logger.warning("the queue does not answer: %s", error)
            self._stop.wait(self.delays.queue_seconds)
            return
        if job is None:
            self._stop.wait(self.settings.poll_seconds)
            return
        with log_context(job=job.id):
            self._work(job)

    def _supervise(self) -> None:
        """Send heartbeats, also during a long step, and cancel the attempt when it must end."""
        while not self._ended.wait(_TICK_SECONDS):
            try:
                if self._attempt is not None:
                    self._attempt.supervise()
                self._record_state()
            except QueueUnavailable as error:
                logger.warning("the queue does not answer: %s", error)
            except Exception:  # this thread must not end
                logger.exception("a heartbeat failed")

    def _record_state(self) -> None:
        state, attempt = self.executor.state, self._attempt
        record = {
            "ready": state.ready,
            "stage": state.stage,
            "percent": state.percent,
            "model": state.model,
            "world_size": state.world_size,
            "pids": list(state.pids),
            "machine": None if state.machine is None else machine_as_json(state.machine),
            "error": state.error,
            "error_code": state.error_code,
            "job": None if attempt is None else attempt.job.id,
        }
        now = time.monotonic()
        if record != self._recorded or now - self._recorded_at >= min(_RECORD_SECONDS, self.settings.lease_seconds / 3):
            self.queue.record_worker(self.name, record)
            self._recorded, self._recorded_at = record, now

    # ---- a job -------------------------------------------------------------------------------------------------------

    def _work(self, job: Job) -> None:
        folder = self._folder / f"{job.id}-{job.attempt}"
        attempt = Attempt(
            self.settings, self.queue, self.files, self.executor, job, folder, self.ratios, self._stop, self.delays
        )
        logger.info("attempt %d of %s begins", job.attempt, job.id)
        try:
            folder.mkdir()
            self._attempt = attempt
            attempt.run()
        except LeaseLost:
            logger.warning("attempt %d of %s is no longer ours: dropped", job.attempt, job.id)
            attempt.remove_results()
        except QueueUnavailable as error:
            logger.warning("attempt %d of %s could not tell the queue how it ended: %s", job.attempt, job.id, error)
        except Exception as error:  # of the store, or a bug: the worker must go on with other jobs
            if is_full(error):
                attempt.release(f"the disk is full: {error}")
                self._stop.wait(self.delays.disk_full_seconds)
                return
            if self._stop.is_set():
                attempt.release(f"the worker is stopping, after {type(error).__name__}")
                return
            logger.exception("attempt %d of %s failed in the worker", job.attempt, job.id)
            attempt.fail("storage_error", f"its files could not be stored or read ({type(error).__name__})")
            self._stop.wait(min(self.delays.queue_seconds, self.settings.lease_seconds))
        finally:
            self._attempt = None
            shutil.rmtree(folder, ignore_errors=True)


def make_executor(settings: ServerSettings, number: int = 0, *, target: str = PUSA_ENGINE) -> Executor:
    """Make the executor that the settings name.

    Args:
        number: of the worker among those of this process, which decides which cards it has.
        target: another engine, for tests and benchmarks.

    Raises:
        ImportError: Ray is not installed and the settings name it.
    """
    limits: dict[str, Any] = {
        "grace_seconds": settings.cancel_seconds,
        "load_seconds": settings.load_seconds,
        "stall_seconds": settings.stall_seconds,
    }
    # Defaults too: the process inherits these variables, and the command line may have said otherwise.
    words = {name: getattr(settings, name) for name in LOAD_WORDS}
    load = {f"PUSA_{name.upper()}": str(word) for name, word in {**words, "gpus": settings.gpus}.items()}
    if settings.executor == "ray":
        from pusa.server.worker.ray import RayExecutor

        return RayExecutor(
            settings.model,
            settings.lora,
            target=target,
            address=settings.ray_address,
            gpus=settings.ray_gpus,
            env=load,
            **limits,
        )
    env = {
        "PUSA_LOG_FORMAT": settings.log_format,
        "PUSA_LOG_LEVEL": settings.log_level,
        "PUSA_RANK_SECONDS": str(settings.rank_seconds),
        **load,
    }
    return LocalExecutor(
        settings.model,
        settings.lora,
        target=target,
        env=env,
        place=partial(place, settings, number),
        silent_seconds=settings.rank_seconds,
        **limits,
    )


def run_worker(settings: ServerSettings, stop: threading.Event) -> None:
    """Run `settings.workers` workers (at least one) in this process until `stop` is set, for ``pusa worker``."""
    private_folder(settings.data_folder)
    queue, files = JobQueue(settings.database_url), FileStore(settings.files_url)
    numbers = range(max(1, settings.workers))
    workers = [Worker(settings, queue, files, make_executor(settings, number)) for number in numbers]
    threads = [threading.Thread(target=worker.run, args=(stop,), name=worker.name) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    queue.close()
