from collections.abc import Iterator
from pathlib import Path

import pytest
from server_samples import House, quick_settings


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    """A queue and a store with quick settings, and no worker yet."""
    found = House(quick_settings(tmp_path / "data"))
    yield found
    found.dismiss()
    found.queue.close()
