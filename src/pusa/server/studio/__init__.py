"""The studio: a Gradio page over the server's durable jobs.

`mount` puts it into the server's app. Nothing is generated here: a click becomes a row of the queue through
`VideoService`, and the page asks for the row's state until it has ended. So a reload, or a restart of the server, loses
nothing. Importing this package loads no Gradio; `mount` does.
"""

from typing import Any

from fastapi import FastAPI

__all__ = ["mount"]


def mount(app: FastAPI, service: Any, settings: Any) -> FastAPI:
    """Serve the studio at ``/`` of `app`, see `pusa.server.studio.mounting`."""
    from pusa.server.studio.mounting import mount_studio

    return mount_studio(app, service, settings)
