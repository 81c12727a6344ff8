"""Fixtures of the tests that start ranks."""

from pathlib import Path

import pytest
from rank_samples import write_inputs


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder, which is the current one, with two pictures and a video."""
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    return tmp_path
