"""Call a `pusa serve` and block until it answers.

    from pusa.client import PusaClient

    with PusaClient("http://127.0.0.1:7860") as client:
        video = client.create_and_wait("a balloon rises in the sky", num_inference_steps=4)
        client.download(video.id, to="balloon.mp4")

The methods are written once, in `AsyncPusaClient`. `PusaClient` runs their coroutines over an httpx client that blocks,
so they never wait for an event loop and run to their end in one step.
"""

import functools
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from types import GenericAlias
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, get_args

import httpx

from pusa.client.client import AsyncPusaClient

T = TypeVar("T")
P = ParamSpec("P")


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
        self.timeout = self._client.timeout

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


class _BlockingMethods(AsyncPusaClient):
    """The methods of `AsyncPusaClient` as coroutines that block and never wait for an event loop."""

    _http_class = BlockingHTTP

    async def _sleep(self, seconds: float) -> None:
        time.sleep(seconds)


def _blocking(
    method: Callable[Concatenate[Any, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Any, P], T]:
    @functools.wraps(method)
    def call(self: "PusaClient", *args: P.args, **kwargs: P.kwargs) -> T:
        return result_of(method(self._methods, *args, **kwargs))

    return call


def _blocking_iterator(
    method: Callable[Concatenate[Any, P], AsyncIterator[T]],
) -> Callable[Concatenate[Any, P], Iterator[T]]:
    @functools.wraps(method)
    def iterate(self: "PusaClient", *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        items: Any = method(self._methods, *args, **kwargs)
        try:
            while True:
                yield result_of(anext(items))
        except StopAsyncIteration:
            return
        finally:
            result_of(items.aclose())

    signature = inspect.signature(method)  # for `help`
    items_type = GenericAlias(Iterator, get_args(signature.return_annotation))
    vars(iterate)["__signature__"] = signature.replace(return_annotation=items_type)
    return iterate


class PusaClient:
    """Call a server and block until it answers. Threads may share one client."""

    def __init__(self, base_url: str = "http://127.0.0.1:7860", api_key: str | None = None, **options: Any) -> None:
        """Take the arguments of `AsyncPusaClient`."""
        self._methods = _BlockingMethods(base_url, api_key, **options)
        self.base_url = self._methods.base_url

    create = _blocking(AsyncPusaClient.create)
    estimate = _blocking(AsyncPusaClient.estimate)
    create_and_wait = _blocking(AsyncPusaClient.create_and_wait)
    retrieve = _blocking(AsyncPusaClient.retrieve)
    wait = _blocking(AsyncPusaClient.wait)
    page = _blocking(AsyncPusaClient.page)
    remix = _blocking(AsyncPusaClient.remix)
    final = _blocking(AsyncPusaClient.final)
    extend = _blocking(AsyncPusaClient.extend)
    edit = _blocking(AsyncPusaClient.edit)
    cancel = _blocking(AsyncPusaClient.cancel)
    retry = _blocking(AsyncPusaClient.retry)
    delete = _blocking(AsyncPusaClient.delete)
    restore = _blocking(AsyncPusaClient.restore)
    download = _blocking(AsyncPusaClient.download)
    upload_file = _blocking(AsyncPusaClient.upload_file)
    delete_file = _blocking(AsyncPusaClient.delete_file)
    models = _blocking(AsyncPusaClient.models)
    ready = _blocking(AsyncPusaClient.ready)
    wait_until_ready = _blocking(AsyncPusaClient.wait_until_ready)
    list = _blocking_iterator(AsyncPusaClient.list)
    events = _blocking_iterator(AsyncPusaClient.events)
    stream = _blocking_iterator(AsyncPusaClient.stream)

    def close(self) -> None:
        result_of(self._methods.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
