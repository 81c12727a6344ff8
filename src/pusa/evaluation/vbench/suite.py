"""Read the prompts and images of VBench-I2V from the user's checkout of VBench, and choose among them."""

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pusa.evaluation.vbench.totals import DIMENSIONS, check_dimensions
from pusa.media import MediaError, probe_image

CAMERA = "camera_motion"
VIDEOS_PER_PROMPT = 5
RATIOS = {"1-1": 1.0, "8-5": 8 / 5, "7-4": 7 / 4, "16-9": 16 / 9}
"""Folders of cropped images that the suite ships, with width / height."""

_PACKAGE = "vbench2_beta_i2v"
_INFO = "vbench2_i2v_full_info.json"
_REPOSITORY = "https://github.com/Vchitect/VBench"
_IMAGES = "its script vbench2_beta_i2v/download_data.sh fetches them from Google Drive (crop.zip)"


@dataclass(frozen=True)
class SuitePrompt:
    """Hold one of the suite's prompts.

    Attributes:
        text: what the model reads and the videos are named by.
        image: file name of the image it begins with.
        dimensions: scored dimensions that its videos count for, by the names of `DIMENSIONS`.
    """

    text: str
    image: str
    dimensions: tuple[str, ...]


@dataclass(frozen=True)
class Suite:
    """Hold the prompts in the suite's order, and where its images are.

    Attributes:
        data: folder that holds `crop`; it need not exist.
        sha256: of the list of prompts.
    """

    prompts: tuple[SuitePrompt, ...]
    data: Path
    sha256: str

    def find_images(self, ratio: str, prompts: Iterable[SuitePrompt]) -> dict[str, Path]:
        """Find the images that prompts begin with, by file name.

        Args:
            ratio: one of `RATIOS`, or the name of another folder beside them, such as ``5-4``.

        Raises:
            FileNotFoundError: the folder is missing, or images; the message names the first.
            ValueError: an image does not open.
        """
        folder = self.data / "crop" / ratio
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is missing: {_IMAGES}{self._near(ratio)}")
        found = {prompt.image: folder / prompt.image for prompt in prompts}
        missing = [path for path in found.values() if not path.is_file()]
        if missing:
            more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise FileNotFoundError(f"image {str(missing[0])!r} is missing{more}: {_IMAGES}")
        for path in found.values():
            status = path.stat()
            _check_image(path, status.st_size, status.st_mtime_ns)
        return found

    def _near(self, ratio: str) -> str:
        """Return what is there in place of a ratio's folder, for an error."""
        crops = self.data / "crop"
        there = sorted(path.name for path in crops.iterdir() if path.is_dir()) if crops.is_dir() else []
        if there:
            return f"; {crops} has {', '.join(there)}"
        if (self.data / "origin").is_dir():
            return f"; {self.data / 'origin'} has whole images, which scores do not compare with"
        return ""


@cache
def _check_image(path: Path, size_bytes: int, mtime_ns: int) -> None:
    """Read an image once, with these facts of its file; a sweep prepares many runs of the same ones."""
    try:
        probe_image(path)
    except MediaError as error:
        raise ValueError(f"image {str(path)!r} does not open ({error}): unpack crop.zip again") from None


def read_suite(path: Path) -> Suite:
    """Read the suite from a checkout of VBench, its folder `vbench2_beta_i2v`, or any folder with its list and data.

    Raises:
        FileNotFoundError: the path or the list of prompts is missing; the message says where it can be had.
        ValueError: the list is damaged or of something else.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"--suite {str(path)!r} is no folder: give a checkout of {_REPOSITORY}")
    places = (path / _PACKAGE, path)
    info = next((place / _INFO for place in places if (place / _INFO).is_file()), None)
    if info is None:
        raise FileNotFoundError(
            f"{path} has no {_INFO}: give a checkout of {_REPOSITORY} (the package on PyPI leaves that file out)"
        )
    content = info.read_bytes()
    datas = [place for parent in (info.parent, *places) for place in (parent / "data", parent)]
    data = next((place for place in datas if (place / "crop").is_dir()), info.parent / "data")
    return Suite(_prompts(info, content), data.resolve(), hashlib.sha256(content).hexdigest())


def _prompts(info: Path, content: bytes) -> tuple[SuitePrompt, ...]:
    try:
        prompts = tuple(_prompt(entry) for entry in json.loads(content))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{info} is no list of VBench-I2V's prompts ({type(error).__name__}: {error})") from None
    if not prompts:
        raise ValueError(f"{info} has no prompts")
    return prompts


def _prompt(entry: Any) -> SuitePrompt:
    text, image = entry["prompt_en"], entry["image_name"]
    if not (isinstance(text, str) and isinstance(image, str)) or "/" in image or image.startswith("."):
        raise ValueError(f"prompt {text!r} with image {image!r}")
    return SuitePrompt(text, image, tuple(name for name in DIMENSIONS if name in entry["dimension"]))


def choose_prompts(
    prompts: Sequence[SuitePrompt], dimensions: Collection[str] = tuple(DIMENSIONS), count: int | None = None
) -> list[SuitePrompt]:
    """Choose the prompts that count for any of some dimensions, in the suite's order.

    Args:
        count: of each kind at most (subject, background and camera are the suite's kinds), drawn by a hash of their
            texts, so that a smaller choice is part of a greater one; None: all.

    Raises:
        ValueError: a name is no dimension, there is none, or no prompt counts for any.
    """
    check_dimensions(dimensions)
    if not dimensions:
        raise ValueError(f"no dimensions: give at least one of {', '.join(DIMENSIONS)}")
    chosen = [prompt for prompt in prompts if set(prompt.dimensions) & set(dimensions)]
    if not chosen:
        raise ValueError(f"the suite has no prompts for {', '.join(dimensions)}")
    if count is None:
        return chosen
    kinds: dict[tuple[str, ...], list[SuitePrompt]] = {}
    for prompt in sorted(chosen, key=lambda prompt: hashlib.sha256(prompt.text.encode()).digest()):
        kinds.setdefault(prompt.dimensions, []).append(prompt)
    drawn = {prompt.text for kind in kinds.values() for prompt in kind[:count]}
    return [prompt for prompt in chosen if prompt.text in drawn]


def nearest_ratio(width: int, height: int) -> str:
    """Return which of `RATIOS` is nearest to a size: 832x480 is nearer to 7-4 than to 16-9."""
    return min(RATIOS, key=lambda name: abs(math.log(RATIOS[name] * height / width)))


def parse_ratio(name: str) -> float:
    """Return width / height of a ratio's folder. Raises ValueError."""
    width, _, height = name.partition("-")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise ValueError(f"{name[:40]!r} is no ratio: give {', '.join(RATIOS)}")
    return int(width) / int(height)
