"""Fixtures shared by all tests: where the recorded numbers and real inputs are, and tiny seeded components."""

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("PUSA_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def _folder(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"{folder.name}/ (recorded data beside the repository) is not here; set PUSA_SHARED to its parent")
    return folder


@pytest.fixture(scope="session")
def golden() -> Path:
    """Tensors recorded from the original implementation."""
    return _folder("golden")


@pytest.fixture(scope="session")
def inputs() -> Path:
    """Real images and a real video."""
    return _folder("inputs")
