"""Call a `pusa serve` from asyncio; `pusa.client.blocking` has the same methods for code that blocks.

It needs httpx, no torch and no server. Jobs live in the server and outlast a client: `retrieve` or `wait` with the id
that `create` returned takes one up again.
"""

import asyncio
import os
import random
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self, cast

try:
    import httpx
except ImportError as missing:
    raise ImportError("pusa.client needs httpx: pip install httpx, or pip install 'pusa[server]'") from missing

from pusa.client.wire import (
    Estimate,
    Event,
    EventReader,
    File,
    JobFailedError,
    Keyframe,
    Page,
    PusaError,
    Readiness,
    ServerUnreachableError,
    StoredFile,
    Variant,
    Video,
    WaitTimeoutError,
    creation_of,
    error_of,
    is_away,
    key_header,
    number_of,
    size_text,
    source_videos,
    typed,
    upload_of,
    video_of,
)

RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
LONGEST_PAUSE_SECONDS = 30.0  # a server that asks for more is busy for so long that the caller should know

Progress = Callable[[Video], object]


class AsyncPusaClient:
    """Call a server from asyncio."""

    _http_class: Callable[..., Any] = httpx.AsyncClient

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:7860",
        api_key: str | None = None,
        *,
        max_retries: int = 5,
        timeout_seconds: float = 60.0,
        **http_options: Any,
    ) -> None:
        """
        Args:
            base_url: of the server, with ``/v1`` or without.
            api_key: if the server wants one; ``PUSA_API_KEY`` of the environment unless given.
            max_retries: after a lost connection, a full queue or a server that is restarting.
            timeout_seconds: for the server to begin an answer.
            http_options: of `httpx.Client` (``verify``, ``proxy``, ``transport``...).

        Raises:
            ValueError: `base_url` is no address.
        """
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"{base_url!r} is no address of a server: write http://HOST:PORT")
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self.max_retries = max_retries
        key = os.environ.get("PUSA_API_KEY") if api_key is None else api_key
        headers = {"User-Agent": "pusa-client"} | ({"Authorization": f"Bearer {key}"} if key else {})
        timeout = httpx.Timeout(timeout_seconds, connect=5.0)
        self._http = type(self)._http_class(headers=headers, timeout=timeout, **http_options)

    async def create(
        self,
        prompt: str = "",
        *,
        image: File | None = None,
        keyframes: Sequence[Keyframe] = (),
        video: File | None = None,
        model: str | None = None,
        seconds: float | str | None = None,
        size: str | tuple[int, int] | None = None,
        idempotency_key: str | None = None,
        **options: Any,
    ) -> Video:
        """Create the job of a video; it is on the server's disk when this returns.

        Args:
            image: the first frame.
            keyframes: images at places of their own, with `image` or without.
            video: a piece of video to keep; `cond_positions` and `noise_multipliers` say what of it.
            size: ``"832x480"``, or (width, height).
            idempotency_key: two calls with the same key make one job. By default each call has its own, so a retry
                after a lost answer makes no second job.
            options: fields of the request, as the server's guide lists them (``num_frames``, ``seed``...).

        Raises:
            PusaError: the server refuses; `param` names the field.
            ServerUnreachableError: the server does not answer.
        """
        fields = {"model": model, "seconds": seconds, "size": size, **options}
        with ExitStack() as files:
            body = creation_of(files, prompt, image=image, keyframes=keyframes, video=video, **fields)
            response = await self._request("POST", "/v1/videos", **body, **key_header(idempotency_key))
        return video_of(response)

    async def estimate(self, prompt: str = "", **options: Any) -> Estimate:
        """Tell what `create` with the same arguments would need, and how the model would run; no job is made."""
        with ExitStack() as files:
            response = await self._request("POST", "/v1/videos/estimate", **creation_of(files, prompt, **options))
        return typed(Estimate, response.json())

    async def create_and_wait(
        self,
        prompt: str = "",
        *,
        on_progress: Progress | None = None,
        timeout_seconds: float | None = None,
        **options: Any,
    ) -> Video:
        """Call `create` with its options, then `wait`."""
        video = await self.create(prompt, **options)
        return await self.wait(video.id, on_progress=on_progress, timeout_seconds=timeout_seconds)

    async def retrieve(self, video_id: str) -> Video:
        """Return the job as it is now."""
        return video_of(await self._request("GET", f"/v1/videos/{video_id}"))

    async def wait(
        self,
        video_id: str,
        *,
        on_progress: Progress | None = None,
        timeout_seconds: float | None = None,
        outage_seconds: float = 300.0,
    ) -> Video:
        """Poll until the video is there, as often as the server asks for.

        Jobs outlast a restart of the server, so this waits up to `outage_seconds` for one that does not answer.

        Args:
            on_progress: called with the job whenever its status or progress changed.

        Raises:
            JobFailedError: the job ended without a video, or was cancelled.
            WaitTimeoutError: after `timeout_seconds`; the job goes on.
        """
        start = seen = time.monotonic()
        last: tuple[str, int] | None = None
        while True:
            pause = 1.0
            try:
                response = await self._request("GET", f"/v1/videos/{video_id}")
            except PusaError as error:
                if not is_away(error) or time.monotonic() - seen > outage_seconds:
                    raise
            else:
                seen = time.monotonic()
                video = video_of(response)
                pause = number_of(response.headers.get("openai-poll-after-ms"), 1000) / 1000
                if on_progress is not None and (video.status, video.progress) != last:
                    on_progress(video)
                last = (video.status, video.progress)
                if video.ended:
                    if video.status != "completed":
                        raise JobFailedError(video)
                    return video
            if timeout_seconds is not None and time.monotonic() - start > timeout_seconds:
                raise WaitTimeoutError(f"{video_id} has not ended after {timeout_seconds:g} seconds; it goes on")
            await self._sleep(min(max(pause, 0.05), LONGEST_PAUSE_SECONDS))

    async def page(
        self,
        *,
        after: str | None = None,
        limit: int = 20,
        order: Literal["asc", "desc"] = "desc",
        status: str | None = None,
    ) -> Page:
        """Return at most `limit` videos after the id `after`, newest first unless `order` is ``asc``.

        Args:
            status: ``queued``, ``in_progress``, ``completed`` or ``failed``; None for all.
        """
        given = {"after": after, "status": status}
        query = {"limit": limit, "order": order} | {name: value for name, value in given.items() if value}
        answer = (await self._request("GET", "/v1/videos", params=query)).json()
        data = tuple(typed(Video, item) for item in answer["data"])
        last = answer.get("last_id") or (data[-1].id if data else None)
        return Page(data=data, has_more=bool(answer.get("has_more")) and last is not None, last_id=last)

    async def remix(self, video_id: str, prompt: str, *, idempotency_key: str | None = None) -> Video:
        """Create the job of the same request with another prompt."""
        path = f"/v1/videos/{video_id}/remix"
        return video_of(await self._request("POST", path, json={"prompt": prompt}, **key_header(idempotency_key)))

    async def final(
        self,
        video_id: str,
        *,
        noise_multiplier: float | None = None,
        size: str | tuple[int, int] | None = None,
        num_inference_steps: int | None = None,
        idempotency_key: str | None = None,
    ) -> Video:
        """Create the job of the final of a finished draft: the same scene and motion in full quality.

        Args:
            noise_multiplier: how far the final may depart from the draft, 0..1; None takes the server's default.
            size: ``"832x480"``, or (width, height); None takes the model's, or twice the draft's.
            num_inference_steps: None takes the model's times `noise_multiplier`.

        Raises:
            PusaError: 409 before the draft is completed, 400 if the video is no draft.
        """
        given = {
            "noise_multiplier": noise_multiplier,
            "size": size_text(size),
            "num_inference_steps": num_inference_steps,
        }
        body = {name: value for name, value in given.items() if value is not None}
        path = f"/v1/videos/{video_id}/final"
        return video_of(await self._request("POST", path, json=body, **key_header(idempotency_key)))

    async def extend(
        self,
        video: File,
        prompt: str,
        seconds: float | str | None = None,
        *,
        idempotency_key: str | None = None,
        **options: Any,
    ) -> Video:
        """Create a video that begins with this one and goes on for `seconds`. `video`: the id of a job, or a file."""
        fields = {"prompt": prompt, "seconds": seconds, **options}
        return await self._from_video("/v1/videos/extensions", video, fields, idempotency_key)

    async def edit(
        self, video: str | File, prompt: str, *, idempotency_key: str | None = None, **options: Any
    ) -> Video:
        """Create a video that keeps parts of this one. `video`: the id of a job, or a file."""
        fields = {"prompt": prompt, **options}
        return await self._from_video("/v1/videos/edits", video, fields, idempotency_key)

    async def cancel(self, video_id: str) -> Video:
        """Cancel a job that waits or runs; one that ended stays as it is."""
        return video_of(await self._request("POST", f"/v1/videos/{video_id}/cancel"))

    async def retry(self, video_id: str) -> Video:
        """Make a failed or cancelled job once more, from the beginning, with the same inputs and seed."""
        return video_of(await self._request("POST", f"/v1/videos/{video_id}/retry"))

    async def delete(self, video_id: str, *, undo_seconds: int = 0) -> None:
        """Delete a job and its files, and stop it if it runs.

        Args:
            undo_seconds: how long `restore` can bring it back, up to 86400; 0: not at all.
        """
        params = {"undo_seconds": undo_seconds} if undo_seconds else None
        await self._request("DELETE", f"/v1/videos/{video_id}", params=params)

    async def restore(self, video_id: str) -> Video:
        """Bring back a job that was deleted with `undo_seconds`; one that was stopped comes back cancelled."""
        return video_of(await self._request("POST", f"/v1/videos/{video_id}/restore"))

    async def download(
        self, video_id: str, variant: Variant = "video", *, to: str | os.PathLike[str] | None = None
    ) -> Any:
        """Download the video, or a picture of it: ``thumbnail`` or ``spritesheet``.

        Args:
            to: a file, which appears only when it is whole, or a folder, in which the file is named after the video.

        Returns:
            the bytes, or the path that was written.
        """
        path, query = f"/v1/videos/{video_id}/content", {"variant": variant}
        if to is None:
            return (await self._request("GET", path, params=query)).content
        target = Path(to)
        if target.is_dir():
            target /= f"{video_id}.mp4" if variant == "video" else f"{video_id}_{variant}.webp"
        part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
        try:
            with part.open("xb") as file:
                await self._request("GET", path, params=query, to=file)
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)
        return target

    async def upload_file(self, file: File, *, filename: str | None = None) -> StoredFile:
        """Keep a picture or a video on the server, to name it in requests; the same content is the same file.

        Args:
            file: of any kind; or the id of a video, or ``{"video_id": ..., "input": 0}`` for one of its inputs.
            filename: a name for people; that of the file by default.
        """
        with ExitStack() as files:
            response = await self._request("POST", "/v1/files", **upload_of(files, file, filename))
        return typed(StoredFile, response.json())

    async def delete_file(self, file_id: str) -> None:
        """Remove a file that the server keeps; videos have copies of what they were made from."""
        await self._request("DELETE", f"/v1/files/{file_id}")

    async def models(self) -> Sequence[Mapping[str, Any]]:
        """List the models that the server offers."""
        return tuple((await self._request("GET", "/v1/models")).json()["data"])

    async def ready(self) -> Readiness:
        """Return whether the model is loaded, and the progress of loading."""
        return typed(Readiness, (await self._request("GET", "/ready", accepted=(503,))).json())

    async def wait_until_ready(
        self, *, timeout_seconds: float = 600.0, on_progress: Callable[[Readiness], object] | None = None
    ) -> Readiness:
        """Wait for the server to answer and for its model to be loaded.

        Raises:
            WaitTimeoutError: after `timeout_seconds`.
        """
        start = time.monotonic()
        state: Readiness | None = None
        while True:
            try:
                found = await self.ready()
            except PusaError as error:
                if not is_away(error):
                    raise
                state_text = str(error)
            else:
                state_text = f"{found.stage} {found.percent:.0f} %"
                if on_progress is not None and found != state:
                    on_progress(found)
                state = found
                if found.ready:
                    return found
            if time.monotonic() - start > timeout_seconds:
                raise WaitTimeoutError(f"the server is not ready after {timeout_seconds:g} seconds: {state_text}")
            await self._sleep(0.5)

    async def list(
        self, *, page_size: int = 20, order: Literal["asc", "desc"] = "desc", status: str | None = None
    ) -> AsyncIterator[Video]:
        """Iterate over all videos, page by page, newest first unless `order` is ``asc``; see `page`."""
        page = await self.page(limit=page_size, order=order, status=status)
        while True:
            for video in page.data:
                yield video
            if not page.has_more:
                return
            page = await self.page(after=page.last_id, limit=page_size, order=order, status=status)

    async def events(self, video_id: str) -> AsyncIterator[Event]:
        """Iterate over what happens to a job until it ends or is deleted; reconnect when the connection is lost."""
        reader = EventReader(self.max_retries)
        while not reader.done:
            try:
                path, arguments = reader.request(video_id)
                response = await self._open("GET", path, **arguments)
                try:
                    if not response.is_success:
                        await response.aread()
                    reader.opened(response)
                    async for line in response.aiter_lines():
                        if (event := reader.feed(line)) is not None:
                            yield event
                finally:
                    await response.aclose()
            except httpx.TransportError as error:
                reader.lost(error)
            if not reader.done:
                await self._sleep(reader.pause_seconds)

    async def stream(self, video_id: str, *, silent_seconds: float = 3600.0) -> AsyncIterator[bytes]:
        """Iterate over the pieces of a video while it is made (``schedule="wave"``): an MP4 that grows.

        It begins when the first frames are finished and ends with the job; it may lack the last frames, which
        `download` has.

        Args:
            silent_seconds: how long nothing may come, as while the job waits for its turn.

        Raises:
            PusaError: 409 for a video that is made as a whole, or is not being made any more.
            ServerUnreachableError: the connection was lost; pieces that have come cannot be sent again.
        """
        timeout = httpx.Timeout(**{**self._http.timeout.as_dict(), "read": silent_seconds})
        response = await self._answer("GET", f"/v1/videos/{video_id}/stream", timeout=timeout)
        try:
            async for piece in response.aiter_bytes():
                yield piece
        except httpx.TransportError as lost:
            raise self._unreachable(lost) from lost
        finally:
            await response.aclose()

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _from_video(
        self, path: str, video: File | Sequence[File], fields: dict[str, Any], key: str | None
    ) -> Video:
        videos = list(video) if isinstance(video, list | tuple) else [video]
        with ExitStack() as files:
            body = source_videos(files, fields, videos)
            return video_of(await self._request("POST", path, **body, **key_header(key)))

    async def _request(
        self, method: str, path: str, *, to: BinaryIO | None = None, accepted: Sequence[int] = (), **arguments: Any
    ) -> httpx.Response:
        """Send a request as `_answer` does and read the response; the body of a success goes into `to`, if given."""

        async def read(response: httpx.Response) -> None:
            try:
                if to is None or not response.is_success:
                    await response.aread()
                else:
                    to.seek(0)
                    to.truncate()
                    async for chunk in response.aiter_bytes():
                        to.write(chunk)
            finally:
                await response.aclose()

        return await self._answer(method, path, accepted=accepted, read=read, **arguments)

    async def _answer(
        self,
        method: str,
        path: str,
        *,
        accepted: Sequence[int] = (),
        read: Callable[[httpx.Response], Awaitable[None]] | None = None,
        **arguments: Any,
    ) -> httpx.Response:
        """Send a request, again if that may help; return the response unless it is an error.

        Sending again is safe: requests that make jobs carry a key.

        Args:
            read: reads the body, as a part of the attempt; None leaves that of a success to the caller.
        """
        for attempt in range(self.max_retries + 1):
            try:
                response = await self._open(method, path, **arguments)
                if read is not None:
                    await read(response)
                elif not response.is_success:
                    await response.aread()
                    await response.aclose()
            except httpx.TransportError as lost:
                error: PusaError = self._unreachable(lost)
            else:
                if response.is_success or response.status_code in accepted:
                    return response
                error = error_of(response)
                again = {"true": True, "false": False}.get(response.headers.get("x-should-retry", ""))
                if not (response.status_code in RETRIED if again is None else again):
                    raise error
            pause = error.retry_after_seconds
            if attempt == self.max_retries or (pause or 0) > LONGEST_PAUSE_SECONDS:
                raise error
            await self._sleep(min(0.5 * 2**attempt, 8) * random.uniform(0.75, 1) if pause is None else pause)
        raise AssertionError("the last attempt returns or raises")

    def _unreachable(self, lost: httpx.TransportError) -> ServerUnreachableError:
        return ServerUnreachableError(f"no answer from {self.base_url}: {lost or type(lost).__name__}")

    async def _open(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        """Send one request; return the response before its body."""
        request = self._http.build_request(method, self.base_url + path, **arguments)
        return cast("httpx.Response", await self._http.send(request, stream=True))

    async def _sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
