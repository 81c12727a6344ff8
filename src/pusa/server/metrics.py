"""Export Prometheus metrics, named after those of vLLM and sglang: ``pusa:num_requests_running`` and so on.

Gauges are read from the database at each scrape, so that they are correct after a restart. Counters and histograms
start with the process and count the jobs of all workers, on any machine. No label holds an id or a prompt.
"""

from collections.abc import Iterable

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pusa.server.jobs.queue import Job
from pusa.server.service import VideoService

CONTENT_TYPE = CONTENT_TYPE_LATEST
COUNT_SECONDS = 5.0
"""Interval at which `Metrics.count_ended` is to be called."""

_OLDEST = 50  # unfinished jobs beyond the newest, read one by one
_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000)
_STEP_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)


class Metrics:
    """Count and measure the jobs of one server.

    Args:
        service: the queue to read.
        newest_jobs: number of jobs read at once.
    """

    def __init__(self, service: VideoService, *, newest_jobs: int = 200) -> None:
        self._queue, self._newest_jobs = service.queue, newest_jobs
        self.registry = CollectorRegistry()
        self.registry.register(_Gauges(service))
        ProcessCollector(registry=self.registry)
        labels = ("model_name",)
        self.ended = Counter(
            "pusa:request_success",
            "Jobs that have ended, by how.",
            (*labels, "finished_reason"),
            registry=self.registry,
        )
        self.recovered = Counter(
            "pusa:jobs_recovered", "Attempts that followed on one that was lost.", labels, registry=self.registry
        )
        self.e2e = self._histogram("pusa:e2e_request_latency_seconds", "From acceptance to the end.")
        self.queued = self._histogram("pusa:request_queue_time_seconds", "From acceptance to the first attempt.")
        self.inference = self._histogram("pusa:request_inference_time_seconds", "Of the attempt that completed it.")
        self.decode = self._histogram("pusa:vae_decode_seconds", "Decoding of a video, encoding of its file included.")
        self.step = self._histogram("pusa:denoise_step_seconds", "A denoising step, mean of a video.", _STEP_SECONDS)
        self._open: dict[str, int] = {}  # id -> seq of jobs that have not ended
        self._last_seq = -1

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
        return Histogram(name, help, ("model_name",), buckets=buckets, registry=self.registry)

    def start(self) -> None:
        """Exclude the jobs that have ended before now. Reads the database."""
        jobs, _ = self._queue.page(limit=self._newest_jobs)
        self._remember(jobs)

    def count_ended(self) -> None:
        """Count the jobs that have ended since the last call. Reads the database."""
        jobs, _ = self._queue.page(limit=self._newest_jobs)
        read = {job.id for job in jobs}
        older = sorted((id for id in self._open if id not in read), key=self._open.__getitem__)[:_OLDEST]
        for id in older:
            job = self._queue.get(id)
            if job is None:
                del self._open[id]
            else:
                jobs.append(job)
        for job in jobs:
            if job.ended and (job.id in self._open or job.seq > self._last_seq):
                self.observe(job)
        self._remember(jobs)

    def _remember(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            self._last_seq = max(self._last_seq, job.seq)
            if job.ended:
                self._open.pop(job.id, None)
            else:
                self._open[job.id] = job.seq

    def observe(self, job: Job) -> None:
        """Count one ended job."""
        name, timings = job.model, job.timings
        self.ended.labels(name, job.status).inc()
        self.recovered.labels(name).inc(max(0, job.attempt - 1))
        if job.completed_at is not None:
            self.e2e.labels(name).observe(max(0.0, job.completed_at - job.created_at))
        if job.started_at is not None:
            self.queued.labels(name).observe(max(0.0, job.started_at - job.created_at))
        if job.status != "completed":
            return
        self.inference.labels(name).observe(job.inference_seconds)
        self.decode.labels(name).observe(timings.get("decode", 0.0))
        if job.steps and job.attempt == 1:  # a later attempt does only the rest of the steps
            self.step.labels(name).observe(timings.get("denoise", 0.0) / job.steps)

    def text(self) -> bytes:
        """Format all metrics for Prometheus. Reads the database."""
        return generate_latest(self.registry)


class _Gauges(Collector):
    def __init__(self, service: VideoService) -> None:
        self._service = service

    def describe(self) -> Iterable[Metric]:
        return []  # registering must not read the database

    def collect(self) -> Iterable[Metric]:
        state = self._service.readiness()
        for name, help, value in (
            ("pusa:num_requests_running", "Jobs that are being made.", state.running),
            ("pusa:num_requests_waiting", "Jobs that wait.", state.queued),
            ("pusa:num_workers", "Workers that have said something lately.", state.workers),
            ("pusa:num_ranks", "Processes of all workers that hold the model, or load it.", state.ranks),
            ("pusa:model_ready", "1 if a worker has the model in memory.", int(state.ready)),
        ):
            family = GaugeMetricFamily(name, help, labels=["model_name"])
            family.add_metric([state.model], value)
            yield family
        wrong = CounterMetricFamily("pusa:wrong_api_keys", "Requests with a wrong API key.")
        wrong.add_metric([], self._service.wrong_keys.total)
        yield wrong
