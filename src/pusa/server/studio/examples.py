"""Define the examples of every tab, which make a video with one click from files of the package."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

PICTURES = Path(__file__).parents[2] / "mini" / "pictures"
CLIPS = Path(__file__).parent / "examples"
"""Videos made by the embedded model (``pusa.demo``, seed 0), and a frame of each for the page."""


@dataclass(frozen=True)
class Example:
    """Fill the form: `values` are its fields, `files` its pictures or clips; `shows` are the pictures of its button."""

    name: str
    tab: str
    values: dict[str, Any]
    files: tuple[Path, ...]
    shows: tuple[Path, ...]


def _picture(name: str, prompt: str, file: str, **values: Any) -> Example:
    path = PICTURES / file
    return Example(name, "image", {"prompt": prompt, **values}, (path,), (path,))


def _clip(name: str, mode: str, prompt: str, *files: str, **values: Any) -> Example:
    clips = tuple(CLIPS / f"{file}.mp4" for file in files)
    shows = tuple(CLIPS / f"{file}.webp" for file in files or ("fish",))
    return Example(name, "video", {"mode": mode, "prompt": prompt, **values}, clips, shows)


def _words(name: str, prompt: str) -> Example:
    return Example(name, "text", {"prompt": prompt}, (), (CLIPS / f"{name}.webp",))


_START, _END = PICTURES / "star-start.png", PICTURES / "star-end.png"
_FAITHFUL = {"preset": "faithful"}

_ALL = (
    _picture("penguin", "a penguin slides to the right at the beach", "penguin.png", noise=0.0, **_FAITHFUL),
    # This prompt describes little of the picture: guidance would only make it coarse.
    _picture("view", "a photo, the camera zooms in", "view.jpg", guidance=1.0),
    Example(
        "star",
        "images",
        {"prompt": "a star slides to the right in autumn", **_FAITHFUL},
        (_START, _END),
        (_START, _END),
    ),
    Example(
        "star-back",
        "images",
        {"prompt": "a star in autumn", **_FAITHFUL},
        (_START, _END, _START),
        (_START, _END, _START),
    ),
    _clip("complete", "complete", "a red apple bounces on the grass", "apple"),
    _clip("extend", "extend", "a red apple bounces on the grass", "apple"),
    _clip("transition", "transition", "a bus slides to the right in the desert", "apple", "bus"),
    _clip("loop", "loop", "a fish swings under the sea", overlap=5),
    _words("apple", "a red apple bounces on the grass"),
    _words("bus", "a bus slides to the right in the desert"),
    _words("ghost", "a ghost fades away in the forest"),
)
# An installation without the embedded model has none of its pictures.
EXAMPLES = tuple(example for example in _ALL if all(path.is_file() for path in (*example.files, *example.shows)))


def public_files() -> dict[str, Path]:
    """Return the pictures and clips of the examples by the names under which the page may fetch them."""
    return {path.name: path for example in EXAMPLES for path in (*example.files, *example.shows)}


def as_json() -> list[dict[str, Any]]:
    """Return all examples for the page: names of `public_files` stand for their files."""
    return [
        {
            "name": example.name,
            "tab": example.tab,
            "values": example.values,
            "files": [path.name for path in example.files],
            "shows": [path.name for path in example.shows],
        }
        for example in EXAMPLES
    ]
