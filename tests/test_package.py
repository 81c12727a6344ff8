"""The package holds everything that it needs, nothing else, and all notices."""

import re
from pathlib import Path

import pytest
from paths import ROOT

from pusa.mini.world.pictures import CREDITS

LARGEST_BYTES = 64_000_000


def files_of(target: str) -> dict[str, int]:
    """Path inside the distribution -> bytes, as the build backend would take them. Nothing is built."""
    from hatchling.builders.sdist import SdistBuilder
    from hatchling.builders.wheel import WheelBuilder

    builder = {"wheel": WheelBuilder, "sdist": SdistBuilder}[target](str(ROOT))
    return {f.distribution_path: Path(f.path).stat().st_size for f in builder.recurse_included_files()}


@pytest.mark.parametrize("target", ["wheel", "sdist"])
def test_the_package_holds_the_model_and_its_pictures_in_64_mb(target: str) -> None:
    files = files_of(target)
    for name in (path.relative_to(ROOT / "src") for path in (ROOT / "src" / "pusa" / "mini").rglob("*")):
        if (ROOT / "src" / name).is_file() and name.parent.name != "__pycache__":
            assert any(path.endswith(name.as_posix()) for path in files), name
    assert any(path.endswith("pusa/mini/pictures/rabbit.png") for path in files)
    assert any(path.endswith("pusa/cli/root.py") for path in files)
    assert sum(files.values()) < LARGEST_BYTES
    assert not [path for path in files if path.endswith((".pt", ".pyc", ".part")) or "/.venv/" in path]


def test_the_notices_are_published_with_it() -> None:
    from hatchling.metadata.core import ProjectMetadata
    from hatchling.plugin.manager import PluginManager

    metadata = ProjectMetadata(str(ROOT), PluginManager())
    assert metadata.core.license_files == ["LICENSE", "THIRD_PARTY.md"]


def test_everything_trained_on_is_credited() -> None:
    notices = (ROOT / "THIRD_PARTY.md").read_text()
    for kind, what, licence in CREDITS:
        told = what.partition(" (")[0] if kind.startswith("photo") else licence.replace("-1.0", " 1.0")
        for name in re.split(r"[:,;] ", told):
            assert name in notices, f"{what}: {name}"
    for holder in ("Microsoft Corporation", "2023 LobeHub", "2019 Mu-An Chiou"):
        assert f"Copyright (c) {holder}." in notices
