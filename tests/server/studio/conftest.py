"""Fixtures of the tests of the studio."""

from collections.abc import Iterator
from typing import Any

import pytest
from gallery_samples import Filled, Looker
from studio_samples import chromium


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def looker(browser: Any, site: Filled) -> Iterator[Looker]:
    """Somebody before the module's `site`, whose page must make no errors."""
    looker = Looker(browser, site.url)
    yield looker
    looker.close()
    assert not looker.errors
