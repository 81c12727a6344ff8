"""Call a `pusa serve`: `PusaClient` and, for asyncio, `AsyncPusaClient`.

It needs httpx, no torch and no server.
"""

from pusa.client.blocking import PusaClient
from pusa.client.client import AsyncPusaClient
from pusa.client.wire import (
    Estimate,
    Event,
    JobFailedError,
    Keyframe,
    Page,
    PusaError,
    Readiness,
    ServerUnreachableError,
    StoredFile,
    Video,
    WaitTimeoutError,
)

__all__ = [
    "AsyncPusaClient",
    "Estimate",
    "Event",
    "JobFailedError",
    "Keyframe",
    "Page",
    "PusaClient",
    "PusaError",
    "Readiness",
    "ServerUnreachableError",
    "StoredFile",
    "Video",
    "WaitTimeoutError",
]
