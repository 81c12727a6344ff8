"""Fixtures of the tests of the studio."""

from collections.abc import Iterator
from typing import Any

import pytest
from gallery_samples import Filled, Looker
from studio_samples import Running, chromium, studio


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with studio(tmp_path_factory.mktemp("studio")) as running:
        yield running


@pytest.fixture
def looker(browser: Any, site: Filled) -> Iterator[Looker]:
    """Somebody before the module's `site`, whose page must make no errors."""
    looker = Looker(browser, site.url)
    yield looker
    looker.close()
    assert not looker.errors
