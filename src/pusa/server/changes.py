"""Cancel, remove, restore, mark, move and repeat jobs for clients; a part of `pusa.server.service`."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from pusa.server.errors import ServiceError
from pusa.server.http.reference_schemas import ID_PATTERN
from pusa.server.http.validation import invalid_value
from pusa.server.jobs.housekeeping import remove_files
from pusa.server.jobs.queue import Job, JobQueue, QueueFull
from pusa.server.jobs.store import FileStore
from pusa.server.settings import ServerSettings
from pusa.server.submit import in_thread, queue_full


class JobChanges:
    """The part of `VideoService` that changes jobs. Each call raises ServiceError (404) if there is no such job."""

    settings: ServerSettings
    queue: JobQueue
    files: FileStore

    async def cancel(self, id: str, owner: str | None = "") -> Job:
        """Cancel a job: at once if it is queued, after its current step if it runs; an ended job is left alone."""
        return await self._change(id, partial(self.queue.cancel, id, owner))

    async def cancel_all(self, owner: str = "") -> list[Job]:
        """Cancel all unfinished jobs of an owner; return them."""
        return await in_thread(self.queue.cancel_all, owner)

    async def retry(self, id: str, owner: str | None = "") -> Job:
        """Queue a failed or cancelled job once more, from the beginning, with the same inputs and seed.

        Raises:
            ServiceError: 404 if there is no such job, 409 if it has not failed, 429 if the queue is full.
        """
        total, per_key = self.settings.queue_limit, self.settings.key_queue_limit if owner else None
        try:
            job = await self._change(id, partial(self.queue.restart, id, owner, total_limit=total, key_limit=per_key))
        except QueueFull as full:
            raise queue_full(full) from None
        if job.status not in ("queued", "in_progress"):
            message = f"{id} is {job.status}: only a failed video can be made once more"
            raise ServiceError(409, "not_failed", message, values={"status": job.status})
        return job

    async def delete(self, id: str, owner: str | None = "", *, undo_seconds: float = 0.0) -> Job:
        """Remove a job, and stop it if it runs; its files go with it, or once `undo_seconds` have passed."""
        if undo_seconds:
            return await self._change(id, partial(self.queue.remove, id, owner, undo_seconds=undo_seconds))
        job = await self._change(id, partial(self.queue.delete, id, owner))
        await in_thread(remove_files, self.queue, self.files, [job])
        return job

    async def restore(self, id: str, owner: str | None = "") -> Job:
        """Undo a removal while the job's files are there; one that was not removed stays as it is."""
        return await self._change(id, partial(self.queue.restore, id, owner))

    async def update(self, id: str, owner: str | None = "", **values: Any) -> Job:
        """Change what an owner notes of a job: `favourite` and `batch`."""
        return await self._change(id, partial(self.queue.update, id, owner, **values))

    async def move(self, id: str, owner: str | None = "", *, before: str | None) -> Job:
        """Put a waiting job before another one of its owner, None: behind all of them.

        Raises:
            ServiceError: 404 if there is no such job, 409 if one of the two does not wait any more, 400 if `before`
                names no job.
        """
        if not is_video_id(id):
            raise not_found(id)
        try:
            return await in_thread(partial(self.queue.move, id, owner, before=before))
        except KeyError as error:
            wanted = str(error.args[0])
        job = await in_thread(self.queue.get, wanted, owner)
        if job is None and wanted == before:
            raise invalid_value(f"before={wanted[:60]!r} is no video: name one that waits, or null", "before")
        if job is None:
            raise not_found(id)
        message = f"{wanted} is {job.status}: only videos that wait can change places"
        param = "id" if wanted == id else "before"
        raise ServiceError(409, "not_waiting", message, param, values={"status": job.status})

    async def _change(self, id: str, change: Callable[[], Job]) -> Job:
        if not is_video_id(id):
            raise not_found(id)
        try:
            return await in_thread(change)
        except KeyError:
            raise not_found(id) from None


def is_video_id(text: str) -> bool:
    return re.fullmatch(ID_PATTERN, text) is not None


def not_found(id: str) -> ServiceError:
    """Return the error for a job that does not exist, or is another owner's."""
    return ServiceError(404, "video_not_found", f"there is no video {id[:60]!r}: see GET /v1/videos", "id")
