"""Examples for every tab: one click makes the video. What they start from lies in the package."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pusa.positions import latent_frames
from pusa.request import preset_alpha
from pusa.server.studio.forms import Form, FormDefaults, Tab, joined, preset_noise, spread

PICTURES = Path(__file__).parents[2] / "mini" / "pictures"
CLIPS = Path(__file__).parent / "examples"
"""Videos that the embedded model has made itself (``pusa.demo``, seed 0), and a frame of each for the page."""


@dataclass(frozen=True)
class Example:
    """`shows` is what is seen of it on the page: files of the package. `values` are fields of a `Form`."""

    name: str
    tab: Tab
    values: dict[str, Any]
    shows: tuple[Path, ...]

    @property
    def prompt(self) -> str:
        return self.values["prompt"]


def _picture(name: str, prompt: str, file: str, **values: Any) -> Example:
    path = PICTURES / file
    return Example(name, "image", {"prompt": prompt, "image": str(path), **values}, (path,))


def _clip(name: str, mode: str, prompt: str, *files: str, **values: Any) -> Example:
    inputs = dict(zip(("video", "second_video"), (str(CLIPS / f"{file}.mp4") for file in files), strict=False))
    shows = tuple(CLIPS / f"{file}.webp" for file in files or ("fish",))
    return Example(name, "video", {"mode": mode, "prompt": prompt, **inputs, **values}, shows)


def _words(name: str, prompt: str) -> Example:
    return Example(name, "text", {"prompt": prompt}, (CLIPS / f"{name}.webp",))


_START, _END = PICTURES / "star-start.png", PICTURES / "star-end.png"

_ALL = (
    _picture("penguin", "a penguin slides to the right at the beach", "penguin.png", noise=0.0, preset="faithful"),
    # What the words add to a picture they do not describe is little, and guidance makes it coarse.
    _picture("view", "a photo, the camera zooms in", "view.jpg", guidance=1.0),
    Example(
        "star",
        "images",
        {"prompt": "a star slides to the right in autumn", "images": (str(_START), str(_END)), "preset": "faithful"},
        (_START, _END),
    ),
    Example(
        "star-back",
        "images",
        {"prompt": "a star in autumn", "images": (str(_START), str(_END), str(_START)), "preset": "faithful"},
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
EXAMPLES = tuple(example for example in _ALL if all(path.is_file() for path in example.shows))


def find(name: str) -> Example:
    """Raises KeyError."""
    try:
        return next(example for example in EXAMPLES if example.name == name)
    except StopIteration:
        raise KeyError(name) from None


def form_of(example: Example, defaults: FormDefaults) -> Form:
    """The form as the example fills it: what it leaves open is as on an untouched page."""
    values: dict[str, Any] = {
        "positions": defaults.positions,
        "multipliers": defaults.multipliers,
        "video_positions": defaults.video_positions,
        "video_multipliers": defaults.video_multipliers,
        "noise": defaults.noise,
        **example.values,
    }
    preset = values.get("preset", "balanced")
    if example.tab == "images":
        count = len(values["images"])
        if count > 2:
            values["positions"] = joined(spread(count, latent_frames(defaults.known.num_frames)))
        values["multipliers"] = joined(preset_noise(preset, "image", count))
    return Form(tab=example.tab, alpha=preset_alpha(preset, defaults.alpha), **values)


def public_files() -> dict[str, Path]:
    """What the page may fetch by name: the pictures and clips of the examples, and nothing else."""
    return {path.name: path for example in EXAMPLES for path in example.shows}
