"""Build an environment with only what a card's machine has, and the folder that is carried to it."""

import sysconfig
import venv
import zipfile
from collections.abc import Iterable
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image
from world_samples import make_sprites

from pusa.mini.world import picture_pack


def closure(names: Iterable[str], *, without: Iterable[str]) -> dict[str, Distribution]:
    """The installed distributions of these names with all that they need, but for some."""
    installed = {canonicalize_name(found.metadata["Name"]): found for found in distributions()}
    found: dict[str, Distribution] = {}
    left = [canonicalize_name(name) for name in names]
    while left:
        name = left.pop()
        if name in found or name in without or name not in installed:
            continue
        found[name] = installed[name]
        for text in installed[name].requires or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                left.append(canonicalize_name(requirement.name))
    return found


def make_environment(folder: Path, contents: Iterable[Distribution]) -> Path:
    """A virtual environment that links to these distributions and has nothing else; returns its ``bin``."""
    venv.EnvBuilder(symlinks=True, with_pip=False).create(folder)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    for found in contents:
        for top in {Path(file).parts[0] for file in found.files or []}:
            source = Path(str(found.locate_file(top)))
            if top not in ("..", "__pycache__") and source.exists() and not (site / top).exists():
                (site / top).symlink_to(source)
    return folder / "bin"


def make_wheel(name: str, folder: Path) -> Path:
    """Pack an installed distribution into a wheel again, for the Python that runs this."""
    found = distribution(name)
    files = {
        str(file): Path(str(found.locate_file(file)))
        for file in found.files or []
        if file.parts[0] != ".." and file.suffix != ".pyc"
    }
    info = next(path.split("/")[0] for path in files if path.endswith(".dist-info/METADATA"))
    dropped = {f"{info}/{name}" for name in ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json")}
    tag = next(line for line in (found.read_text("WHEEL") or "").splitlines() if line.startswith("Tag: "))
    wheel = folder / f"{info.removesuffix('.dist-info')}-{tag.removeprefix('Tag: ')}.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        kept = sorted(path for path in files if path not in dropped)
        for path in kept:
            archive.write(files[path], path)
        archive.writestr(f"{info}/RECORD", "".join(f"{path},,\n" for path in [*kept, f"{info}/RECORD"]))
    return wheel


def make_tiny_pack(path: Path, *, things: int = 40) -> None:
    """Discs and noise in place of the pictures."""
    generator = torch.Generator().manual_seed(0)

    def noise(height: int, width: int) -> Image.Image:
        pixels = torch.randint(0, 255, (height // 16, width // 16, 3), dtype=torch.uint8, generator=generator)
        return Image.fromarray(pixels.numpy()).resize((width, height))

    images = {"panorama 00": noise(256, 512), "photograph noise": noise(256, 384)}
    picture_pack.write_pack(path, make_sprites(32)[:things], images)
