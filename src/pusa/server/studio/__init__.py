"""Serve the studio, a Gradio page over the server's durable jobs.

Nothing is generated here: a click submits a job through `VideoService`, and the page polls the job's state until it
ends. So nothing is lost when the page is loaded again or the server restarts. Importing this package loads no Gradio;
`mount` does.
"""

from typing import Any

from fastapi import FastAPI

__all__ = ["mount"]


def mount(app: FastAPI, service: Any, settings: Any) -> FastAPI:
    """Serve the studio at ``/`` of `app`, see `pusa.server.studio.mounting`."""
    from pusa.server.studio.mounting import mount_studio

    return mount_studio(app, service, settings)
