"""Fixtures of the tests of the studio."""

from collections.abc import Iterator

import pytest
from page_samples import KEYS
from site_samples import Site, open_site


@pytest.fixture(scope="module", params=["with keys", "without keys"])
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with open_site(tmp_path_factory.mktemp("site"), KEYS if request.param == "with keys" else ()) as site:
        yield site
