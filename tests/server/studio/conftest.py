"""Fixtures of the tests of the studio."""

from collections.abc import Iterator
from typing import Any

import pytest
from studio_samples import chromium


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened
