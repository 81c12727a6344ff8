"""Run coroutines without an event loop, over an httpx client that blocks."""

from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

import httpx

T = TypeVar("T")


class BlockingResponse:
    """An `httpx.Response` that blocks, with the methods of one that does not."""

    def __init__(self, response: httpx.Response) -> None:
        self._response = response

    def __getattr__(self, name: str) -> Any:
        return getattr(self._response, name)

    async def aread(self) -> bytes:
        return self._response.read()

    async def aiter_bytes(self) -> AsyncIterator[bytes]:
        for chunk in self._response.iter_bytes():
            yield chunk

    async def aiter_lines(self) -> AsyncIterator[str]:
        for line in self._response.iter_lines():
            yield line

    async def aclose(self) -> None:
        self._response.close()


class BlockingHTTP:
    """An `httpx.Client` with the methods of `httpx.AsyncClient`."""

    def __init__(self, **options: Any) -> None:
        self._client = httpx.Client(**options)
        self.build_request = self._client.build_request

    async def send(self, request: httpx.Request, *, stream: bool) -> BlockingResponse:
        return BlockingResponse(self._client.send(request, stream=stream))

    async def aclose(self) -> None:
        self._client.close()


def result_of(coroutine: Awaitable[T]) -> T:
    """Run a coroutine that never waits for an event loop."""
    try:
        coroutine.__await__().send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    raise AssertionError("a blocking coroutine has waited for an event loop")
