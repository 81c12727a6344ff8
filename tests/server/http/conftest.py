"""Fixtures of the tests of the HTTP API, for modules that need a server and nothing special of it."""

from collections.abc import Iterator

import pytest
from api_samples import Served, clip, serving


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("server")) as served:
        yield served


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return clip(tmp_path_factory.mktemp("clip")).read_bytes()
