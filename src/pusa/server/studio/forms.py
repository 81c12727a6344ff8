"""From what the page holds to a request of the service: pure functions, so that every rule can be tested alone."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ValidationError

from pusa import zoo
from pusa.numerals import parse_number, parse_whole
from pusa.positions import latent_frames
from pusa.request import PRESETS, GenerationRequest, Position, explain
from pusa.zoo import GenerationDefaults

Tab = Literal["image", "images", "video", "text"]
TABS: tuple[Tab, ...] = get_args(Tab)
Mode = Literal["complete", "extend", "transition", "loop"]

ORIGINAL_FRAMES = 81  # what the original always makes, and what its positions are meant for
MAX_PLACES = 512  # as in a `ConditionSpec`
_IMAGES_NOISE = (0.2, 0.5)  # the original's, for a first picture and for the later ones
_VIDEO_NOISE = (0.0, 0.3, 0.4, 0.5)  # the original's, for positions 0..3; later ones as the last
_FREER = PRESETS["creative"].noise - PRESETS["balanced"].noise


class FormError(ValueError):
    """What somebody has to put right, as the key of a text and the values in it, or as words."""

    def __init__(self, key: str = "", *, text: str = "", **values: Any) -> None:
        super().__init__(text or f"{key} {values}")
        self.key, self.text, self.values = key, text, values

    def as_json(self) -> dict[str, Any]:
        return {"text": self.text} if self.text else {"key": self.key, "values": self.values}


@dataclass(frozen=True, kw_only=True)
class Form:
    """All that the page holds when Generate is pressed. Files are paths; texts are as they were typed.

    Of the inputs only those of the open `tab` (and, in the video tab, of the `mode`) count. None, or an empty text,
    leaves a knob to the model.
    """

    tab: Tab = "text"
    mode: Mode = "complete"
    prompt: str = ""
    image: str | None = None
    noise: float = 0.2
    images: Sequence[str] = ()
    positions: str = ""
    multipliers: str = ""
    video: str | None = None
    second_video: str | None = None
    video_positions: str = ""
    video_multipliers: str = ""
    loop_image: str | None = None
    preset: str = "balanced"
    alpha: float | None = None
    alpha_2: float | None = None
    steps: int | None = None
    negative_prompt: str | None = None
    seed: str = ""
    size: str = ""
    frames: int | None = None
    guidance: float | None = None
    shift: float | None = None
    overlap: int | None = None
    fps: float | None = None
    fit: str = "crop"

    @property
    def task(self) -> str:
        return self.mode if self.tab == "video" and self.mode != "complete" else "generate"


@dataclass(frozen=True, kw_only=True)
class FormDefaults:
    """What the page shows before anybody has touched it: the original's values on Wan's length, else the model's."""

    model: str
    known: GenerationDefaults
    positions: str = field(init=False)
    multipliers: str = "0.2,0.5"
    video_positions: str = "0,1,2,3"
    video_multipliers: str = "0,0.3,0.4,0.5"
    noise: float = 0.2

    def __post_init__(self) -> None:
        last = latent_frames(self.known.num_frames) - 1
        object.__setattr__(self, "positions", f"0,{last}" if self.known.num_frames == ORIGINAL_FRAMES else "0,last")

    @property
    def alpha(self) -> float:
        return self.known.alpha["transformer"] if isinstance(self.known.alpha, Mapping) else self.known.alpha

    @property
    def alpha_2(self) -> float | None:
        return self.known.alpha.get("transformer_2") if isinstance(self.known.alpha, Mapping) else None

    @property
    def sizes(self) -> list[str]:
        """The model's size in three shapes, and 720p where a model is made for large pictures."""
        width, height = self.known.width, self.known.height
        if width == height:
            half = round(width * 2 / 3 / 16) * 16
            return [f"{width}x{height}", f"{width}x{half}", f"{half}x{width}"]
        square = round((width * height) ** 0.5 / 16) * 16
        larger = ["1280x720", "720x1280"] if width >= 832 else []
        return [f"{width}x{height}", f"{height}x{width}", f"{square}x{square}", *larger]

    @classmethod
    def of(cls, model: str) -> "FormDefaults":
        return cls(model=model, known=zoo.defaults_of(model))


# ---- presets -------------------------------------------------------------------------------------------------------


def preset_noise(preset: str, kind: Literal["image", "video"], count: int) -> list[float]:
    """Noise multipliers of a preset: "balanced" has the original's, "faithful" none, "creative" larger ones."""
    if preset == "faithful":
        return [0.0] * count
    original = _IMAGES_NOISE if kind == "image" else _VIDEO_NOISE
    more = _FREER if preset == "creative" else 0.0
    return [round(min(1.0, original[min(i, len(original) - 1)] + more), 3) for i in range(count)]


# ---- positions and multipliers as people write them ------------------------------------------------------------------


def parse_positions(text: str) -> list[Position]:
    """Raises FormError for what is no position, and for more of them than a request may have."""
    try:
        return [Position.parse(part) for part in _some(_parts(text))]
    except ValueError as error:
        raise FormError(text=str(error)) from None


def parse_multipliers(text: str) -> list[float]:
    """Raises FormError for what is no number from 0 to 1, and for more of them than a request may have."""
    parts = _some(_parts(text))
    if unbounded := next((part for part in parts if part.lower().strip("+-") in ("nan", "inf", "infinity")), None):
        raise FormError("error.multiplier", value=unbounded)
    try:
        values = [parse_number(part) for part in parts]
    except ValueError:
        raise FormError("error.multiplier_text", value=text[:100]) from None
    for value in values:
        if not 0 <= value <= 1:
            raise FormError("error.multiplier", value=f"{value:g}")
    return values


def parse_size(text: str) -> tuple[int, int] | None:
    """Raises FormError; None for an empty text."""
    if not text.strip():
        return None
    match = re.fullmatch(r"\s*([0-9]{1,5})\s*[xX×*]\s*([0-9]{1,5})\s*", text)
    if match is None:
        raise FormError("error.size", value=text[:100])
    return parse_whole(match[1]), parse_whole(match[2])


def parse_seed(text: str) -> int | None:
    """Raises FormError; None for an empty text."""
    if not text.strip():
        return None
    if not re.fullmatch(r"\s*[0-9]{1,19}\s*", text):
        raise FormError("error.seed", value=text[:100])
    return parse_whole(text)


def joined(values: Sequence[Any]) -> str:
    """Positions or multipliers as the text fields hold them."""
    return ",".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)


def spread(count: int, latents: int) -> list[Position]:
    """Places for `count` pictures, evenly over the clip: the first at its beginning, the last at its end."""
    if count == 1:
        return [Position("latent", 0)]
    places = [round(i * (latents - 1) / (count - 1)) for i in range(count)]
    return [Position("latent", -1 if place == latents - 1 else place) for place in places]


def _some(parts: list[str]) -> list[str]:
    if len(parts) > MAX_PLACES:
        raise FormError(text=f"{len(parts)} values are too many: give at most {MAX_PLACES}")
    return parts


def _parts(text: str) -> list[str]:
    return [part for part in re.split(r"[,;，、\s]+", text.strip()) if part]


def _per_place(multipliers: list[float], places: int) -> list[list[float] | None]:
    if not multipliers:
        return [None] * places
    if len(multipliers) not in (1, places):
        raise FormError("error.multiplier_count", multipliers=len(multipliers), positions=places)
    return [[m] for m in (multipliers * places if len(multipliers) == 1 else multipliers)]


# ---- the request -----------------------------------------------------------------------------------------------------


def request_of(form: Form, model: str) -> tuple[dict[str, Any], dict[str, Path]]:
    """The request for a service that runs `model`, and the files it names.

    Raises:
        FormError: something is missing or not understood.
    """
    conditions, files = _conditions(form)
    size = parse_size(form.size)
    values: dict[str, Any] = {
        "task": form.task,
        "prompt": form.prompt.strip(),
        "negative_prompt": form.negative_prompt,
        "conditions": conditions,
        "preset": form.preset,
        "width": size and size[0],
        "height": size and size[1],
        "seed": parse_seed(form.seed),
        "overlap": form.overlap or None,
    }
    for name in ("frames", "steps"):
        values[name] = None if getattr(form, name) is None else int(getattr(form, name))
    for name in ("guidance", "shift", "alpha", "alpha_2", "fps"):
        values[name] = None if getattr(form, name) is None else float(getattr(form, name))
    request = {name: value for name, value in values.items() if value is not None}
    try:
        GenerationRequest.model_validate_json(json.dumps(request)).resolved(zoo.defaults_of(model))
    except ValidationError as error:
        raise FormError(text=explain(error)) from None
    except ValueError as error:
        raise FormError(text=str(error)) from None
    return request, files


def _conditions(form: Form) -> tuple[list[dict[str, Any]], dict[str, Path]]:
    match form.tab, form.mode:
        case "image", _:
            if not form.image:
                raise FormError("error.no_image")
            return _given(form, [("image", form.image, [0], [float(form.noise)])])
        case "images", _:
            return _given(form, _pictures(form))
        case "video", "complete":
            if not form.video:
                raise FormError("error.no_video")
            places = parse_positions(form.video_positions)
            if not places:
                raise FormError("error.no_positions")
            noise = parse_multipliers(form.video_multipliers)
            _per_place(noise, len(places))
            return _given(form, [("video", form.video, [str(p) for p in places], noise or None)])
        case "video", "extend" | "transition":
            videos = [form.video] if form.mode == "extend" else [form.video, form.second_video]
            if not form.video:
                raise FormError("error.no_video")
            if not all(videos):
                raise FormError("error.no_second_video")
            return _given(form, [("video", file, [], None) for file in videos if file])
        case "video", "loop" if form.loop_image:
            return _given(form, [("image", form.loop_image, [0], [float(form.noise)])])
    return [], {}


def _pictures(form: Form) -> list[tuple[str, str, list[Any], list[float] | None]]:
    if not form.images:
        raise FormError("error.no_images")
    places = parse_positions(form.positions)
    if len(places) != len(form.images):
        raise FormError("error.position_count", pictures=len(form.images), positions=len(places))
    noise = _per_place(parse_multipliers(form.multipliers), len(places))
    return [("image", f, [str(p)], n) for f, p, n in zip(form.images, places, noise, strict=True)]


def _given(
    form: Form, what: Sequence[tuple[str, str, list[Any], list[float] | None]]
) -> tuple[list[dict[str, Any]], dict[str, Path]]:
    conditions, files = [], {}
    for number, (kind, file, positions, noise) in enumerate(what):
        name = f"{number}{Path(file).suffix.lower()}"
        files[name] = Path(file)
        condition = {"kind": kind, "file": name, "positions": positions, "noise": noise, "fit": form.fit}
        conditions.append({key: value for key, value in condition.items() if value not in (None, [])})
    return conditions, files
