"""Convert jobs to the API's videos."""

from pusa.server.http.schemas import VideoError, VideoObject
from pusa.server.jobs.queue import Job


def video_from_job(job: Job, position: int | None = None) -> VideoObject:
    """Convert a job for clients. Typed clients know four statuses: ``cancelled`` becomes the code of a failure."""
    error = None
    if job.status == "cancelled":
        error = VideoError(code="cancelled", message="it was cancelled")
    elif job.status == "failed":
        error = VideoError(code=job.error_code or "internal_error", message=job.error_message or "it failed")
    timings = dict(job.timings)
    return VideoObject(
        id=job.id,
        model=job.model,
        status="failed" if job.status == "cancelled" else job.status,
        progress=100 if job.status == "completed" else max(0, min(99, int(job.progress))),
        created_at=int(job.created_at),
        completed_at=None if job.completed_at is None else int(job.completed_at),
        expires_at=None if job.expires_at is None else int(job.expires_at),
        prompt=job.prompt,
        remixed_from_video_id=job.parent,
        seconds=job.seconds,
        size=job.size,
        error=error,
        stage=job.stage,
        step=job.step,
        steps=job.steps,
        seconds_left=None if job.seconds_left is None else round(job.seconds_left, 1),
        queue_position=position,
        notes=list(job.notes),
        seed=job.request.get("seed"),
        peak_memory_mb=timings.pop("peak_memory_mb", None),
        stage_durations=timings,
        inference_time_s=round(sum(s for stage, s in timings.items() if stage != "queue"), 4) if timings else None,
    )
