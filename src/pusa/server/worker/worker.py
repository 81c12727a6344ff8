"""The worker: claims a job, has it run, says how far it is, stores what was made. A thread of the server, or alone.

A worker may end at any moment without anything being lost. What it has stored counts once the queue's row says so, and
the row takes words only from the attempt that holds the lease (`pusa.server.jobs.queue`).
"""

import itertools
import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from pusa.fsutil import is_full
from pusa.server.jobs.queue import Job, JobQueue, LeaseLost, QueueUnavailable
from pusa.server.jobs.store import FileStore
from pusa.server.logs import log_context
from pusa.server.settings import ServerSettings
from pusa.server.worker.attempt import AGAIN_SECONDS, Attempt
from pusa.server.worker.engine_process import PUSA_ENGINE
from pusa.server.worker.executor import Executor, ExecutorState, LocalExecutor
from pusa.server.worker.progress import Pace

__all__ = ["Worker", "make_executor", "run_worker", "worker_name"]

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.25  # between two looks at what is to be beaten, cancelled or stopped
_PRESENCE_SECONDS = 10.0  # at most, between two signs of life of an idle worker
_BURY_SECONDS = 5.0  # between two looks of an idle worker for those of this machine that were killed
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
        self._attempt: Attempt | None = None
        self._stop = threading.Event()
        self._ended = threading.Event()
        self._told: dict[str, Any] = {}
        self._told_at = self._buried_at = 0.0

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
                try:
                    self._turn()
                except Exception:  # such as no memory for a new process: the next turn may do better
                    logger.exception("worker %s goes on after an error", self.name)
                    stop.wait(AGAIN_SECONDS)
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
                self._stop.wait(AGAIN_SECONDS)

    def _bury_the_dead(self) -> None:
        """Workers of this machine that were killed: their jobs wait again at once, and their scratch is removed."""
        self._buried_at = time.monotonic()
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
            if job is None and time.monotonic() - self._buried_at > _BURY_SECONDS:
                self._bury_the_dead()
        except QueueUnavailable as error:
            logger.warning("the queue does not answer: %s", error)
            self._stop.wait(AGAIN_SECONDS)
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
                    self._attempt.look()
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
            self.queue.record_worker(self.name, said)
            self._told, self._told_at = said, now

    # ---- a job -------------------------------------------------------------------------------------------------------

    def _work(self, job: Job) -> None:
        folder = self._folder / f"{job.id}-{job.attempt}"
        attempt = Attempt(self.settings, self.queue, self.files, self.executor, job, folder, self.pace, self._stop)
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
            if is_full(error):
                attempt.release(f"the disk is full: {error}")
                self._stop.wait(_FULL_SECONDS)
                return
            if self._stop.is_set():
                attempt.release(f"the worker is stopping, after {type(error).__name__}")
                return
            logger.exception("attempt %d of %s failed in the worker", job.attempt, job.id)
            attempt.fail("storage_error", f"its files could not be stored or read ({type(error).__name__})")
            self._stop.wait(min(AGAIN_SECONDS, self.settings.lease_seconds))
        finally:
            self._attempt = None
            shutil.rmtree(folder, ignore_errors=True)


def make_executor(settings: ServerSettings, *, target: str = PUSA_ENGINE) -> Executor:
    """As the settings say; `target` is another engine, for tests and benchmarks.

    Raises ImportError where Ray is asked for and not installed.
    """
    limits: dict[str, Any] = {
        "grace_seconds": settings.cancel_seconds,
        "load_seconds": settings.load_seconds,
        "stall_seconds": settings.stall_seconds,
    }
    if settings.executor == "ray":
        from pusa.server.worker.ray import RayExecutor

        return RayExecutor(
            settings.model,
            settings.lora,
            target=target,
            address=settings.ray_address,
            gpus=settings.ray_gpus,
            **limits,
        )
    logs = {"PUSA_LOG_FORMAT": settings.log_format, "PUSA_LOG_LEVEL": settings.log_level}
    return LocalExecutor(settings.model, settings.lora, target=target, env=logs, **limits)


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
