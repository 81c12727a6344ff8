"""Build a request from the values of the page's fields.

All functions are pure: every rule can be tested without a page.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ValidationError

from pusa import zoo
from pusa.defaults import GenerationDefaults
from pusa.numerals import is_noise_multiplier, parse_numbers, parse_size, parse_whole, split_list
from pusa.positions import latent_frames, nearest_of
from pusa.request import (
    GenerationRequest,
    Position,
    Task,
    draft_size,
    draft_steps,
    explain,
    parse_positions,
    placeholder_request,
    preset_alpha,
    preset_noise,
    prompt_lines,
)

Tab = Literal["image", "images", "video", "text"]
TABS: tuple[Tab, ...] = get_args(Tab)
Mode = Literal["complete", "extend", "transition", "loop"]

_ORIGINAL_FRAMES = 81
"""The only length of the original demo: its default positions are meant for it."""


class FormError(ValueError):
    """Report a mistake in the form, as the key of a translated text with its values, or as a text."""

    def __init__(self, key: str = "", *, text: str = "", **values: Any) -> None:
        super().__init__(text or f"{key} {values}")
        self.key, self.text, self.values = key, text, values

    def as_json(self) -> dict[str, Any]:
        return {"text": self.text} if self.text else {"key": self.key, "values": self.values}


@dataclass(frozen=True, kw_only=True)
class Form:
    """Hold the values of the page's fields. Files are paths; texts are as the visitor typed them.

    Only the inputs of the open `tab` count, and in the video tab those of the `mode`. None, or an empty text, stands
    for the model's default.
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
    exact: bool = False
    metadata: str | None = None
    fast: bool = False
    draft: bool = False
    schedule: str = "even"
    prompts: str = ""

    @property
    def task(self) -> Task:
        return self.mode if self.tab == "video" and self.mode != "complete" else "generate"


@dataclass(frozen=True, kw_only=True)
class FormDefaults:
    """Give the fields' first values: the inputs of the original demo, and the model's defaults for the rest."""

    generation: GenerationDefaults
    positions: str = field(init=False)
    multipliers: str = field(init=False)
    video_positions: str = "0,1,2,3"
    video_multipliers: str = field(init=False)
    noise: float = field(init=False)

    def __post_init__(self) -> None:
        last = self.latents_of(self.generation.num_frames) - 1
        positions = f"0,{last}" if self.generation.num_frames == _ORIGINAL_FRAMES else "0,last"
        object.__setattr__(self, "positions", positions)
        noise = preset_noise("balanced", "image", 2, self.generation)
        object.__setattr__(self, "noise", noise[0])
        object.__setattr__(self, "multipliers", format_list(noise))
        object.__setattr__(
            self, "video_multipliers", format_list(preset_noise("balanced", "video", 4, self.generation))
        )

    @property
    def alpha(self) -> float:
        alpha = self.generation.alpha
        return alpha["transformer"] if isinstance(alpha, Mapping) else alpha

    @property
    def alpha_2(self) -> float | None:
        alpha = self.generation.alpha
        return alpha.get("transformer_2") if isinstance(alpha, Mapping) else None

    @property
    def sizes(self) -> list[str]:
        """List the model's size in three shapes, and 720p for models of large pictures."""
        width, height, multiple = self.generation.width, self.generation.height, self.generation.size_multiple
        if width == height:
            half = nearest_of(round(width * 2 / 3), multiple)
            return [f"{width}x{height}", f"{width}x{half}", f"{half}x{width}"]
        square = nearest_of(round((width * height) ** 0.5), multiple)
        larger = ["1280x720", "720x1280"] if 832 <= width < 1280 else []
        return [f"{width}x{height}", f"{height}x{width}", f"{square}x{square}", *larger]

    def latents_of(self, frames: int) -> int:
        """Count the model's latent frames of so many frames."""
        return latent_frames(frames, self.generation.frames_per_latent)

    @classmethod
    def of(cls, model: str) -> "FormDefaults":
        return cls(generation=zoo.defaults_of(model))


# ---- texts of the fields ---------------------------------------------------------------------------------------------


def read_positions(text: str) -> list[Position]:
    """Parse the positions of a field; none in an empty one. Raises FormError."""
    if not text.strip():
        return []
    try:
        return parse_positions(text)
    except ValueError as error:
        raise FormError(text=str(error)) from None


def read_noise(text: str) -> list[float]:
    """Parse the noise multipliers of a field; none in an empty one. Raises FormError."""
    if not text.strip():
        return []
    try:
        parts = split_list(text)
    except ValueError as error:
        raise FormError(text=str(error)) from None
    if infinite := next((part for part in parts if part.lower().strip("+-") in ("nan", "inf", "infinity")), None):
        raise FormError("error.multiplier", value=infinite)
    try:
        values = parse_numbers(text)
    except ValueError:
        raise FormError("error.multiplier_text", value=text[:100]) from None
    for value in values:
        if not is_noise_multiplier(value):
            raise FormError("error.multiplier", value=f"{value:g}")
    return values


def read_size(text: str) -> tuple[int, int] | None:
    """Parse the size of a field; None for an empty one. Raises FormError."""
    try:
        return parse_size(text) if text.strip() else None
    except ValueError:
        raise FormError("error.size", value=text[:100]) from None


def read_seed(text: str) -> int | None:
    """Parse the seed of a field; None for an empty one. Raises FormError."""
    if not text.strip():
        return None
    if not re.fullmatch(r"\s*[0-9]{1,19}\s*", text):
        raise FormError("error.seed", value=text[:100])
    return parse_whole(text)


def format_list(values: Sequence[Any]) -> str:
    """Write positions or noise multipliers as a field's text."""
    return ",".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)


def spread_positions(count: int, latents: int) -> list[Position]:
    """Space `count` images evenly over a clip of `latents` latent frames, from its first to its last."""
    if count == 1:
        return [Position("latent", 0)]
    places = [round(i * (latents - 1) / (count - 1)) for i in range(count)]
    return [Position("latent", -1 if place == latents - 1 else place) for place in places]


def with_fast(form: Form, defaults: FormDefaults) -> Form:
    """Set steps, guidance and shift to those of the model's fast mode, or to its own where that is off."""
    generation = defaults.generation
    fast = generation.fast if form.fast else None
    return replace(
        form,
        steps=(fast or generation).steps,
        guidance=(fast or generation).guidance,
        shift=(fast and fast.shift) or generation.shift,
    )


def with_preset(form: Form, defaults: FormDefaults) -> Form:
    """Set the fields of noise and alpha to those of the form's preset, for as many images and positions as it has."""
    try:
        video_positions = len(read_positions(form.video_positions)) or 4
    except FormError:
        video_positions = 4
    noise = preset_noise(form.preset, "image", len(form.images) or 2, defaults.generation)
    return replace(
        form,
        noise=noise[0],
        multipliers=format_list(noise),
        video_multipliers=format_list(preset_noise(form.preset, "video", video_positions, defaults.generation)),
        alpha=preset_alpha(form.preset, defaults.alpha),
        alpha_2=None if defaults.alpha_2 is None else preset_alpha(form.preset, defaults.alpha_2),
    )


def check_noise_count(noise: Sequence[float], positions: int) -> None:
    """Raise FormError unless there is one noise multiplier for all positions, one for each, or none."""
    if len(noise) not in (0, 1, positions):
        raise FormError("error.multiplier_count", multipliers=len(noise), positions=positions)


# ---- the request -----------------------------------------------------------------------------------------------------


Condition = tuple[Literal["image", "video"], str, Sequence[int | str], Sequence[float]]
"""Kind, path, positions and noise multipliers; empty ones stand for the defaults."""


def build_request(form: Form, model: str) -> tuple[dict[str, Any], dict[str, Path]]:
    """Build the request of a form for a service that runs `model`.

    Returns:
        A `GenerationRequest` as JSON, and the path of each file that it names.

    Raises:
        FormError: an input is missing, or a value is not understood or out of range.
    """
    conditions, files = _with_file_names(_conditions(form), form.fit)
    width, height = read_size(form.size) or (None, None)
    values: dict[str, Any] = {
        "task": form.task,
        "prompt": form.prompt.strip(),
        "negative_prompt": form.negative_prompt,
        "conditions": conditions,
        "preset": form.preset,
        "width": width,
        "height": height,
        "seed": read_seed(form.seed),
        "overlap": form.overlap or None,
        "exact": form.exact or None,
        "metadata": form.metadata,
        "fast": form.fast or None,
        "draft": form.draft or None,
        "schedule": form.schedule,
        "prompts": prompt_lines(form.prompts),
    }
    for name in ("frames", "steps"):  # sliders send whole numbers as 8 or 8.0
        values[name] = None if getattr(form, name) is None else int(getattr(form, name))
    for name in ("guidance", "shift", "alpha", "alpha_2", "fps"):
        values[name] = None if getattr(form, name) is None else float(getattr(form, name))
    defaults = zoo.defaults_of(model)
    if defaults.condition_guidance and values["guidance"] == defaults.guidance and not form.fast:
        values["guidance"] = None  # the slider is as it was: the model chooses, by what the form gives it
    values |= _of_draft(form, values, defaults)
    request = {name: value for name, value in values.items() if value is not None}
    try:
        GenerationRequest.model_validate({**request, "model": model}).resolved(defaults)
    except ValidationError as error:
        raise FormError(text=explain(error)) from None
    except ValueError as error:
        raise FormError(text=str(error)) from None
    return request, files


def sized_request(form: Form, defaults: GenerationDefaults) -> GenerationRequest:
    """Build a request of the form's size, length and steps, without its inputs. Raises ValueError."""
    width, height = read_size(form.size) or (None, None)
    values: dict[str, Any] = {
        "task": "loop" if form.task == "loop" else "generate",  # the others take as much, and need videos
        "width": width,
        "height": height,
        "frames": int(form.frames or 0) or None,
        "steps": int(form.steps or 0) or None,
        "guidance": float(form.guidance or 0) or None,
        "overlap": int(form.overlap or 0) or None,
        "fast": form.fast,
        "draft": form.draft,
        "schedule": form.schedule,
    }
    return placeholder_request(defaults, **values | _of_draft(form, values, defaults))


def _of_draft(form: Form, values: Mapping[str, Any], defaults: GenerationDefaults) -> dict[str, Any]:
    """Return size and steps of a form's draft, as its fields are those of the whole clip; nothing without one."""
    if not form.draft:
        return {}
    width, height = values["width"], values["height"]
    size = {} if width is None else dict(zip(("width", "height"), draft_size(defaults, width, height), strict=True))
    return size if form.fast else size | {"steps": draft_steps(values["steps"] or defaults.steps)}


def _conditions(form: Form) -> list[Condition]:
    match form.tab, form.mode:
        case "image", _:
            if not form.image:
                raise FormError("error.no_image")
            return [("image", form.image, [0], [float(form.noise)])]
        case "images", _:
            return _image_conditions(form)
        case "video", "complete":
            if not form.video:
                raise FormError("error.no_video")
            positions = read_positions(form.video_positions)
            if not positions:
                raise FormError("error.no_positions")
            noise = read_noise(form.video_multipliers)
            check_noise_count(noise, len(positions))
            return [("video", form.video, [str(p) for p in positions], noise)]
        case "video", "extend" | "transition":
            if not form.video:
                raise FormError("error.no_video")
            if form.mode == "extend":
                return [("video", form.video, [], [])]
            if not form.second_video:
                raise FormError("error.no_second_video")
            return [("video", form.video, [], []), ("video", form.second_video, [], [])]
        case "video", "loop" if form.loop_image:
            return [("image", form.loop_image, [0], [float(form.noise)])]
    return []


def _image_conditions(form: Form) -> list[Condition]:
    if not form.images:
        raise FormError("error.no_images")
    positions = read_positions(form.positions)
    if len(positions) != len(form.images):
        raise FormError("error.position_count", pictures=len(form.images), positions=len(positions))
    noise = read_noise(form.multipliers)
    check_noise_count(noise, len(positions))
    per_image = [[value] for value in noise] if len(noise) == len(positions) else [noise] * len(positions)
    return [("image", *one) for one in zip(form.images, ([str(p)] for p in positions), per_image, strict=True)]


def _with_file_names(conditions: Sequence[Condition], fit: str) -> tuple[list[dict[str, Any]], dict[str, Path]]:
    """Return the conditions as JSON, which name their files by number, and the path of each name."""
    specs, files = [], {}
    for number, (kind, path, positions, noise) in enumerate(conditions):
        name = f"{number}{Path(path).suffix.lower()}"
        files[name] = Path(path)
        spec = {"kind": kind, "file": name, "positions": list(positions), "noise": list(noise), "fit": fit}
        specs.append({key: value for key, value in spec.items() if value != []})
    return specs, files
