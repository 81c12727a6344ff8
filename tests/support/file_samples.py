"""Keep files on a server, and read what it draws of them or gives a job."""

import io
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from api_samples import Served
from PIL import Image


def keep(server: Served, content: bytes, name: str = "a file", http: httpx.Client | None = None) -> dict[str, Any]:
    answer = (http or server.http).post("/v1/files", files={"file": (name, content)})
    assert answer.status_code == 200, answer.text
    return answer.json()


def picture(answer: httpx.Response) -> Image.Image:
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "image/webp"
    return Image.open(io.BytesIO(answer.content)).convert("RGB")


def grey(answer: httpx.Response) -> int:
    return int(np.asarray(picture(answer)).mean())


def input_of(server: Served, id: str, number: int = 0) -> bytes:
    return server.service.files.get_bytes(server.job(id).inputs[number])


def spooled(server: Served) -> list[Path]:
    return list(server.service.spool.folder.iterdir())


def input_of_stream(server: Served, id: str) -> io.BytesIO:
    return io.BytesIO(input_of(server, id))
