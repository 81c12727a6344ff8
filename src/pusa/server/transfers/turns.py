"""Take turns between owners, so that what many calls of one wait for does not hold up those of all others."""

import asyncio
from collections.abc import Callable
from typing import TypeVar
from weakref import WeakValueDictionary

import anyio
import anyio.to_thread

__all__ = ["Turns"]

T = TypeVar("T")


class Turns:
    """Run blocking calls in threads, so many at once; one owner's calls wait behind each other, not before others'.

    Args:
        at_once: calls of all owners; one owner alone may have them all.
    """

    def __init__(self, at_once: int) -> None:
        self._at_once, self._threads = at_once, anyio.CapacityLimiter(at_once)
        self._own: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def run(self, owner: str, function: Callable[[], T]) -> T:
        """Call a function when it is its owner's turn, and return what it returns."""
        own = self._own.setdefault(owner, asyncio.Semaphore(self._at_once))
        async with own:
            return await anyio.to_thread.run_sync(function, limiter=self._threads)
