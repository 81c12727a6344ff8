from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def picture(tmp_path: Path) -> str:
    """The name of a red picture in the working folder."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "cat.png")
    return "cat.png"
