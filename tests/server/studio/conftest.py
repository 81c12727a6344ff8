"""Fixtures of the tests of the studio."""

from collections.abc import Iterator
from typing import Any

import pytest
from page_samples import KEYS
from site_samples import Site, open_site
from studio_samples import chromium


@pytest.fixture(scope="module", params=["with keys", "without keys"])
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with open_site(tmp_path_factory.mktemp("site"), KEYS if request.param == "with keys" else ()) as site:
        yield site


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened
