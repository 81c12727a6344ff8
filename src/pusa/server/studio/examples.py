"""Define the examples of every tab, which make a video with one click from files of the package."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pusa.request import preset_alpha, preset_noise
from pusa.server.studio.forms import Form, FormDefaults, Tab, format_list, spread_positions

PICTURES = Path(__file__).parents[2] / "mini" / "pictures"
CLIPS = Path(__file__).parent / "examples"
"""Videos made by the embedded model (``pusa.demo``, seed 0), and a frame of each for the page."""


@dataclass(frozen=True)
class Example:
    """Fill a form with `values`; the page shows the files `shows` of the package."""

    name: str
    tab: Tab
    values: dict[str, Any]
    shows: tuple[Path, ...]

    @property
    def prompt(self) -> str:
        return self.values["prompt"]

    def for_model(self, defaults: FormDefaults) -> "Example | None":
        """Return the example for a model: where that reads no text without its prompt; None if nothing is left."""
        if defaults.generation.has_text:
            return self
        return None if self.tab == "text" else replace(self, values={**self.values, "prompt": ""})


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
    # This prompt describes little of the picture: guidance would only make it coarse.
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
    """Return the example of a name. Raises KeyError."""
    try:
        return next(example for example in EXAMPLES if example.name == name)
    except StopIteration:
        raise KeyError(name) from None


def form_of(example: Example, defaults: FormDefaults) -> Form:
    """Fill a form with an example, and the other fields with their defaults."""
    values: dict[str, Any] = {
        "positions": defaults.positions,
        "multipliers": defaults.multipliers,
        "video_positions": defaults.video_positions,
        "video_multipliers": defaults.video_multipliers,
        "noise": defaults.noise,
        **(example.for_model(defaults) or example).values,
    }
    preset = values.get("preset", "balanced")
    if example.tab == "images":
        count = len(values["images"])
        if count > 2:
            spread = spread_positions(count, defaults.latents_of(defaults.generation.num_frames))
            values["positions"] = format_list(spread)
        values["multipliers"] = format_list(preset_noise(preset, "image", count, defaults.generation))
    return Form(tab=example.tab, alpha=preset_alpha(preset, defaults.alpha), **values)


def public_files() -> dict[str, Path]:
    """Return the pictures and clips of the examples by the names under which the page may fetch them."""
    return {path.name: path for example in EXAMPLES for path in example.shows}
