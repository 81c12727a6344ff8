"""A client of a `pusa serve`, with the same verbs blocking (`PusaClient`) and for asyncio (`AsyncPusaClient`).

    from pusa.client import PusaClient

    with PusaClient("http://127.0.0.1:7860") as client:
        video = client.create_and_wait("a balloon rises in the sky", num_inference_steps=4)
        client.download(video.id, to="balloon.mp4")

It needs httpx, no torch and no server. Jobs live in the server and outlast a client: `retrieve` or `wait` with the id
that `create` gave takes one up again.

The verbs are written once, in `pusa.client.flows`; the two classes differ only in how they fetch and how they sleep.
"""

import asyncio
import functools
import inspect
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, Concatenate, Literal, ParamSpec, Self, TypeVar, get_args

try:
    import httpx
except ImportError as missing:
    raise ImportError("pusa.client needs httpx: pip install httpx, or pip install 'pusa[server]'") from missing

from pusa.client.flows import Flow, Send, Verbs
from pusa.client.wire import (
    Event,
    EventReader,
    JobFailedError,
    Keyframe,
    Page,
    PusaError,
    Readiness,
    ServerUnreachableError,
    Video,
    WaitTimeoutError,
)

__all__ = [
    "AsyncPusaClient",
    "Event",
    "JobFailedError",
    "Keyframe",
    "Page",
    "PusaClient",
    "PusaError",
    "Readiness",
    "ServerUnreachableError",
    "Video",
    "WaitTimeoutError",
]

T = TypeVar("T")
P = ParamSpec("P")


def _blocking(flow: Callable[Concatenate[Verbs, P], Flow[T]]) -> Callable[Concatenate[Any, P], T]:
    @functools.wraps(flow)
    def verb(self: "PusaClient", *args: P.args, **kwargs: P.kwargs) -> T:
        return self._run(flow(self._verbs, *args, **kwargs))

    return _with_result_of(flow, verb)


def _awaited(
    flow: Callable[Concatenate[Verbs, P], Flow[T]],
) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]:
    @functools.wraps(flow)
    async def verb(self: "AsyncPusaClient", *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._run(flow(self._verbs, *args, **kwargs))

    return _with_result_of(flow, verb)


def _with_result_of(flow: Callable[..., Any], verb: T) -> T:
    """For `help`: a verb returns what its flow ends with."""
    signature = inspect.signature(flow)
    result = get_args(signature.return_annotation)[-1]
    verb.__signature__ = signature.replace(return_annotation=result)  # type: ignore[attr-defined]
    return verb


class _Client:
    """What both have: where the server is, and what is sent with every request."""

    _make: Callable[..., Any]
    _http: Any

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
        """
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        key = os.environ.get("PUSA_API_KEY") if api_key is None else api_key
        headers = {"User-Agent": "pusa-client"} | ({"Authorization": f"Bearer {key}"} if key else {})
        timeout = httpx.Timeout(timeout_seconds, connect=5.0)
        self._http = type(self)._make(headers=headers, timeout=timeout, **http_options)
        self._verbs = Verbs(max_retries)

    def _request(self, wish: Send) -> httpx.Request:
        request: httpx.Request = self._http.build_request(wish.method, self.base_url + wish.path, **wish.arguments)
        return request


class PusaClient(_Client):
    """The verbs, blocking. Threads may share one client."""

    _make = httpx.Client
    _http: httpx.Client

    create = _blocking(Verbs.create)
    create_and_wait = _blocking(Verbs.create_and_wait)
    retrieve = _blocking(Verbs.retrieve)
    wait = _blocking(Verbs.wait)
    page = _blocking(Verbs.page)
    remix = _blocking(Verbs.remix)
    extend = _blocking(Verbs.extend)
    edit = _blocking(Verbs.edit)
    cancel = _blocking(Verbs.cancel)
    delete = _blocking(Verbs.delete)
    download = _blocking(Verbs.download)
    models = _blocking(Verbs.models)
    ready = _blocking(Verbs.ready)
    wait_until_ready = _blocking(Verbs.wait_until_ready)

    def list(self, *, page_size: int = 20, order: Literal["asc", "desc"] = "desc") -> Iterator[Video]:
        """All videos, page by page, newest first unless `order` is ``asc``."""
        page = self.page(limit=page_size, order=order)
        yield from page.data
        while page.has_more:
            page = self.page(after=page.last_id, limit=page_size, order=order)
            yield from page.data

    def events(self, video_id: str) -> Iterator[Event]:
        """What happens to a job, as it happens, until it ended or was deleted; a lost connection is taken up again."""
        reader = EventReader(self._verbs.max_retries)
        while not reader.done:
            try:
                response = self._http.send(self._request(Send("GET", *reader.request(video_id))), stream=True)
                try:
                    if not response.is_success:
                        response.read()
                    reader.opened(response)
                    for line in response.iter_lines():
                        if (event := reader.feed(line)) is not None:
                            yield event
                finally:
                    response.close()
            except httpx.TransportError as error:
                reader.lost(error)
            if not reader.done:
                time.sleep(reader.pause_seconds)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, flow: Flow[T]) -> T:
        answer = None
        try:
            while True:
                wish = flow.send(answer)
                if isinstance(wish, Send):
                    answer = self._fetch(wish)
                else:
                    time.sleep(wish.seconds)
        except StopIteration as end:
            return end.value
        finally:
            flow.close()  # an interrupted flow takes its half file away

    def _fetch(self, wish: Send) -> "httpx.Response | httpx.TransportError":
        try:
            response = self._http.send(self._request(wish), stream=True)
            try:
                if wish.to is None or not response.is_success:
                    response.read()
                else:
                    wish.to.seek(0)
                    wish.to.truncate()
                    for chunk in response.iter_bytes():
                        wish.to.write(chunk)
            finally:
                response.close()
        except httpx.TransportError as error:
            return error
        return response


class AsyncPusaClient(_Client):
    """The verbs, for asyncio."""

    _make = httpx.AsyncClient
    _http: httpx.AsyncClient

    create = _awaited(Verbs.create)
    create_and_wait = _awaited(Verbs.create_and_wait)
    retrieve = _awaited(Verbs.retrieve)
    wait = _awaited(Verbs.wait)
    page = _awaited(Verbs.page)
    remix = _awaited(Verbs.remix)
    extend = _awaited(Verbs.extend)
    edit = _awaited(Verbs.edit)
    cancel = _awaited(Verbs.cancel)
    delete = _awaited(Verbs.delete)
    download = _awaited(Verbs.download)
    models = _awaited(Verbs.models)
    ready = _awaited(Verbs.ready)
    wait_until_ready = _awaited(Verbs.wait_until_ready)

    async def list(self, *, page_size: int = 20, order: Literal["asc", "desc"] = "desc") -> AsyncIterator[Video]:
        """As `PusaClient.list`."""
        page = await self.page(limit=page_size, order=order)
        while True:
            for video in page.data:
                yield video
            if not page.has_more:
                return
            page = await self.page(after=page.last_id, limit=page_size, order=order)

    async def events(self, video_id: str) -> AsyncIterator[Event]:
        """As `PusaClient.events`."""
        reader = EventReader(self._verbs.max_retries)
        while not reader.done:
            try:
                response = await self._http.send(self._request(Send("GET", *reader.request(video_id))), stream=True)
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
                await asyncio.sleep(reader.pause_seconds)

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _run(self, flow: Flow[T]) -> T:
        answer = None
        try:
            while True:
                wish = flow.send(answer)
                if isinstance(wish, Send):
                    answer = await self._fetch(wish)
                else:
                    await asyncio.sleep(wish.seconds)
        except StopIteration as end:
            return end.value
        finally:
            flow.close()

    async def _fetch(self, wish: Send) -> "httpx.Response | httpx.TransportError":
        try:
            response = await self._http.send(self._request(wish), stream=True)
            try:
                if wish.to is None or not response.is_success:
                    await response.aread()
                else:
                    wish.to.seek(0)
                    wish.to.truncate()
                    async for chunk in response.aiter_bytes():
                        wish.to.write(chunk)
            finally:
                await response.aclose()
        except httpx.TransportError as error:
            return error
        return response
