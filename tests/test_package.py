"""The package holds everything that it needs, nothing else, and all notices."""

import hashlib
import re
from pathlib import Path

import pytest
from paths import ROOT

from pusa.mini.world.pictures import CREDITS
from pusa.server.studio.page import WEB

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


@pytest.mark.parametrize("target", ["wheel", "sdist"])
def test_the_package_holds_the_page_of_the_studio(target: str) -> None:
    files = files_of(target)
    for path in filter(Path.is_file, WEB.rglob("*")):
        name = path.relative_to(ROOT / "src").as_posix()
        assert any(held.endswith(name) for held in files), name


def test_the_libraries_of_the_page_are_unchanged_and_credited() -> None:
    notices = (ROOT / "THIRD_PARTY.md").read_text()
    vendor = WEB / "vendor"
    listed = dict[str, str]()
    for line in (vendor / "README.md").read_text().splitlines():
        if row := re.fullmatch(r"\| (\S+\.js) \| (\S+ \S+) \((\S+)\) \| \S+ \| ([0-9a-f]{64}) \|", line):
            file, package, licence, digest = row.groups()
            listed[file] = digest
            assert [licence in told for told in notices.splitlines() if package in told] == [True], package
    assert listed == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in vendor.glob("*.js")}
    for text in vendor.glob("LICENSE.*"):
        assert f"`{text.name}`" in notices
    for file in re.findall(r"LICENSE\.\S+\.txt", notices):
        assert (vendor / file).is_file(), file


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
