"""The folder that is carried beside the tracked files to a card without a network, and the way back of its results.

    python benchmarks/carry.py carry                    # make it: wheels for CPython 3.12 on x86-64, and the pictures
    python benchmarks/carry.py carry --pictures PACK    # the pictures from a file of `pusa mini pictures`
    python benchmarks/carry.py carry --check            # is it complete, and small enough?
    python benchmarks/carry.py unpack OUT FOLDER        # rebuild what `card.sh train OUT` has brought back

The card is expected to have `CARD_HAS`, with what these need. The wheels have the versions that are installed here:
those that the tests ran with.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from email.parser import HeaderParser
from importlib.metadata import version
from pathlib import Path

from _results import unpack
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
MOST_BYTES = 64 * 2**20
PICTURES = "pictures.safetensors"
CARD_HAS = (
    *("accelerate", "click", "filelock", "jinja2", "numpy", "peft", "pillow", "psutil", "requests", "safetensors"),
    *("sentencepiece", "tokenizers", "torch", "tqdm", "transformers", "typing-extensions", "zipp"),
)
CARRIED = (  # the three that the card has as well are newer here
    *("annotated-types", "click", "diffusers", "ftfy", "importlib-metadata", "lazy-importer", "pydantic"),
    *("pydantic-core", "typing-extensions", "typing-inspection", "wcwidth", "zipp"),
)
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
_CARD_PYTHON = {"python_version": "3.12", "python_full_version": "3.12.3", "sys_platform": "linux", "extra": ""}


def download_wheels(folder: Path) -> None:
    """Download the wheels into `folder`, in place of those that are there.

    Raises:
        RuntimeError: pip could not.
    """
    wanted = [f"{name}=={version(name)}" for name in CARRIED]
    platforms = [word for platform in _PLATFORMS for word in ("--platform", platform)]
    with tempfile.TemporaryDirectory() as fresh:
        options = ["--no-deps", "--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp", *platforms]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        done = subprocess.run([*command, *options, "--dest", fresh, *wanted], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"pip could not download the wheels: {done.stderr.strip()}")
        for old in folder.glob("*.whl"):
            old.unlink()
        for wheel in Path(fresh).glob("*.whl"):
            shutil.move(wheel, folder / wheel.name)


def make_pictures(pack: Path, *, source: Path | None = None) -> None:
    """Copy the pack of pictures, or make it."""
    if source is not None:
        shutil.copyfile(source, pack)
        return
    command = [sys.executable, "-m", "pusa", "mini", "pictures", str(pack)]
    cache = ROOT / "pictures_cache"
    done = subprocess.run([*command, "--cache", str(cache)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the pictures could not be made: {done.stderr.strip()}")


def check(folder: Path) -> dict[str, int]:
    """The size of all that travels.

    Raises:
        ValueError: a wheel is missing, there are two of one name, they do not fit together, or all is too large.
        FileNotFoundError: the pictures are missing.
    """
    remedy = f"make it anew: python benchmarks/carry.py {folder}"
    wheels: dict[str, Path] = {}
    for wheel in sorted(folder.glob("*.whl")):
        name = parse_wheel_filename(wheel.name)[0]
        if name in wheels:
            raise ValueError(f"{folder} has two wheels of {name}: {remedy}")
        wheels[name] = wheel
    lacking = sorted(set(CARRIED) - set(wheels))
    if lacking:
        raise ValueError(f"{folder} lacks the wheels of {', '.join(lacking)}: {remedy}")
    _check_requirements(wheels)
    if not (folder / PICTURES).is_file():
        raise FileNotFoundError(f"{folder / PICTURES} is not there: {remedy}")
    sizes = tracked_sizes() | {f"{folder.name}/{f.name}": f.stat().st_size for f in folder.rglob("*") if f.is_file()}
    total = sum(sizes.values())
    if total > MOST_BYTES:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:5]
        named = ", ".join(f"{name} ({sizes[name] / 1e6:.1f} MB)" for name in largest)
        raise ValueError(f"{total} bytes would travel and {MOST_BYTES} may; the largest files: {named}")
    return sizes


def _check_requirements(wheels: Mapping[str, Path]) -> None:
    """Check that all requirements of the wheels are among them, in a version that fits, or on the card."""
    versions = {name: parse_wheel_filename(wheel.name)[1] for name, wheel in wheels.items()}
    for name, wheel in wheels.items():
        for requirement in requirements_of(wheel):
            needed = canonicalize_name(requirement.name)
            found: Version | None = versions.get(needed)
            if found is not None and not requirement.specifier.contains(found, prereleases=True):
                raise ValueError(f"{name} needs {requirement} and the wheel carried is {found}")
            if found is None and needed not in {
                *CARD_HAS,
                "huggingface-hub",
                "regex",
            }:  # the two come with transformers
                raise ValueError(f"{name} needs {needed}, which neither is carried nor on the card: add it to CARRIED")


def requirements_of(wheel: Path) -> list[Requirement]:
    """Read the requirements of a wheel on the card's Python, without its extras."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    found = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    return [r for r in found if r.marker is None or r.marker.evaluate(_CARD_PYTHON)]


def tracked_sizes() -> dict[str, int]:
    """Bytes of every tracked file."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    paths = [path for path in listed.stdout.split("\0") if path and (ROOT / path).is_file()]
    return {path: (ROOT / path).stat().st_size for path in paths}


def main() -> None:
    if sys.argv[1:2] == ["unpack"]:
        parser = argparse.ArgumentParser(prog="carry.py unpack", description=unpack.__doc__)
        parser.add_argument("out", type=Path, help="what card.sh train has written")
        parser.add_argument("folder", type=Path, help="a new one")
        options = parser.parse_args(sys.argv[2:])
        left_out = unpack(options.out, options.folder)
        print(f"{options.folder}: every file has its hash; {len(left_out)} stayed on the card, the largest first:")
        for path, size in sorted(left_out.items(), key=lambda item: -item[1])[:10]:
            print(f"{size:>12,}  {path}")
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pictures", type=Path, help="a file that `pusa mini pictures` has made; without it, make one")
    parser.add_argument("--check", action="store_true", help="only look at a folder that is there")
    options = parser.parse_args()
    if not options.check:
        options.folder.mkdir(parents=True, exist_ok=True)
        download_wheels(options.folder)
        make_pictures(options.folder / PICTURES, source=options.pictures)
    sizes = check(options.folder)
    carried = {name: size for name, size in sizes.items() if name.startswith(f"{options.folder.name}/")}
    for name, size in {**carried, "the tracked files": sum(sizes.values()) - sum(carried.values())}.items():
        print(f"{size:>12,}  {name}")
    print(f"{sum(sizes.values()):>12,}  together, of {MOST_BYTES:,}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"carry.py: {error}")
