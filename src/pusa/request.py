"""Define and validate a request for a video: every field with its range, default and unit.

The command line's options, the HTTP API's schema and the studio's controls are derived from `GenerationRequest`.
Nothing here imports torch, so that a request can be checked where no model is.
"""

import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)

from pusa.defaults import GenerationDefaults
from pusa.fields import StrictModel, explain, field, field_specs, shown
from pusa.numerals import MAX_VALUES, split_list
from pusa.positions import frames_of, latent_frames, latent_index_of, nearest_of

__all__ = [
    "PRESETS",
    "ConditionSpec",
    "GenerationRequest",
    "Position",
    "ResolvedCondition",
    "ResolvedRequest",
    "explain",
    "field_specs",
    "match_orientation",
    "parse_positions",
    "preset_alpha",
    "preset_noise",
    "rounding_notes",
]

FRAMES_PER_LATENT = 4  # Wan's causal VAE: latent frame 0 is one frame, every later one is four
SIZE_MULTIPLE = 16  # 8 by the VAE, 2 by the transformer's patches; `GenerationDefaults.size_multiple` of a model
MAX_FRAMES = 4801
OVERLAP_FRAMES = 13  # 4 latent frames, as Pusa V1.0 (arXiv 2507.16116) keeps of a video to extend it

Task = Literal["generate", "extend", "transition", "loop"]
Metadata = Literal["full", "minimal", "off"]
METADATA: tuple[Metadata, ...] = get_args(Metadata)
"""From the most that a file tells of itself to the least."""


class Preset(NamedTuple):
    """Hold the noise multipliers and alpha of a preset; a value that the request sets itself wins over them.

    `image_noise` holds one value for each image in the order of the request, `video_noise` one for each kept latent
    frame of a video; where there are more, the last value repeats.
    """

    image_noise: tuple[float, ...]
    video_noise: tuple[float, ...]
    alpha_offset: float
    help: str


PRESETS = {
    "faithful": Preset((0.0,), (0.0,), 0.1, "conditions are kept exactly, steady motion"),
    "balanced": Preset((0.2, 0.5), (0.0, 0.3, 0.4, 0.5), 0.0, "conditions may change a little and move better"),
    "creative": Preset((0.4, 0.7), (0.2, 0.5, 0.6, 0.7), -0.1, "conditions are a suggestion, livelier motion"),
}
"""``balanced`` has the values of the original demo, ``creative`` has 0.2 more. Pusa's README calls a larger alpha
steadier and less lively, with 1.3 to 1.5 as its range on Wan2.1 (default 1.4)."""


def preset_noise(preset: str, kind: Literal["image", "video"], count: int) -> list[float]:
    """Return a preset's noise multipliers for `count` images of a request, or `count` latent frames of a video."""
    values = PRESETS[preset].image_noise if kind == "image" else PRESETS[preset].video_noise
    return [values[min(number, len(values) - 1)] for number in range(count)]


def preset_alpha(preset: str, alpha: float) -> float:
    """Return a preset's alpha, 0.1..5, for a model whose default is `alpha`."""
    return min(5.0, max(0.1, round(alpha + PRESETS[preset].alpha_offset, 6)))


@dataclass(frozen=True)
class Position:
    """Name a place in a video: a latent frame (``3``), a frame (``80f``), a time (``1.5s``) or the end (``last``).

    Negative values count from the end: ``-1`` is the last latent frame, ``-1f`` the last frame, ``-0.5s`` half a second
    before the end.
    """

    unit: Literal["latent", "frame", "second"]
    value: int | float

    @classmethod
    def parse(cls, text: "int | str | Position") -> "Position":
        """Parse one position. Raises ValueError for anything but the grammar above."""
        if isinstance(text, Position):
            return text
        match = re.fullmatch(r"(-?\d{1,7})(f?)|(-?\d{1,7}(?:\.\d{1,3})?)s|last", _text(text).strip().lower(), re.ASCII)
        if match is None:
            raise ValueError(
                f"position {shown(text)} is not understood: write a latent frame (3), a frame (80f), seconds (1.5s) "
                "or last; a negative one counts from the end"
            )
        whole, frame, seconds = match.groups()
        if seconds is not None:
            return cls("second", float(seconds) + 0.0)  # no minus zero
        if whole is None:
            return cls("latent", -1)
        return cls("frame" if frame else "latent", int(whole))

    def __str__(self) -> str:
        if self.unit == "second":
            return f"{self.value:.3f}".rstrip("0").rstrip(".") + "s"
        if self == Position("latent", -1):
            return "last"
        return f"{int(self.value)}{'f' if self.unit == 'frame' else ''}"

    def place(self) -> dict[str, Any]:
        """Return the position as an argument of `PusaCondition`."""
        return {{"latent": "latent_index", "frame": "frame_index", "second": "seconds"}[self.unit]: self.value}

    def latent_index(self, frames: int, fps: float) -> int:
        """Return the index of the latent frame in a video of `frames` frames. Raises ValueError outside the video."""
        return latent_index_of(num_frames=frames, fps=fps, **self.place())


def parse_positions(text: str) -> list[Position]:
    """Parse positions with commas or blanks between them: ``0,1.5s,last``. Raises ValueError."""
    return [Position.parse(part) for part in split_list(text)]


def _text(value: Any) -> str:
    """Return a position as text; for anything but text and whole numbers, a text that is no position."""
    return str(value) if isinstance(value, str) or (type(value) is int and abs(value) < 10**9) else "?"


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, int | float | str) else value


def _check_text(text: str) -> str:
    """Refuse NUL and halves of surrogate pairs: neither can be stored with the result."""
    if "\0" in text or (not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text)):
        raise ValueError(f"{shown(text)} has a character that is not valid text: type it again")
    return text


Text = Annotated[str, AfterValidator(_check_text)]
FileReference = Annotated[Text, Field(min_length=1, max_length=4096)]
PositionField = Annotated[
    Position,
    PlainValidator(Position.parse),
    PlainSerializer(lambda p: int(p.value) if p.unit == "latent" and p.value != -1 else str(p)),
    WithJsonSchema({"anyOf": [{"type": "integer"}, {"type": "string", "pattern": r"^(-?\d+f?|-?\d+(\.\d+)?s|last)$"}]}),
]
Multiplier = Annotated[float, Field(ge=0, le=1)]


class ConditionSpec(StrictModel):
    """Describe one condition: an image or a video file, its positions, and how far the model may depart from it."""

    kind: Literal["image", "video"] = field("image", "What the file is.")
    file: FileReference = field(
        ..., "The image or video: a path on the command line, the name of an upload in the API."
    )
    positions: Annotated[list[PositionField], BeforeValidator(_as_list)] = field(
        [],
        "Where it goes: latent frame (3), frame (80f), seconds (1.5s) or last; negative counts from the end. An image "
        "has one place. A video's latent frames stay at their own places, these are the ones kept; none keeps all.",
        unset="the beginning",
        max_length=MAX_VALUES,
    )
    noise: Annotated[list[Multiplier], BeforeValidator(_as_list)] | None = field(
        None,
        "How far the model may depart from it: 0 keeps it exactly, 1 ignores it. One for all or one for each place.",
        unset="the preset's",
        min_length=1,
        max_length=MAX_VALUES,
    )
    encode: Literal["single", "repeat"] | None = field(
        None,
        "How an image after the first frame is encoded: alone, as the original does, or as four equal frames.",
        unset="the model's",
    )
    fit: Literal["crop", "letterbox", "stretch"] = field(
        "crop", "How an image of another shape is fitted: cut its edges, show it all on black, or distort it."
    )
    sha256: str | None = field(None, "Of the file's content, recorded with the result.", pattern="^[0-9a-f]{64}$")

    @model_validator(mode="after")
    def _fits_together(self) -> "ConditionSpec":
        places = self.positions
        if self.kind == "image" and len(places) > 1:
            raise ValueError(f"an image has one position, not {len(places)}: add the image once for each")
        if len(set(places)) < len(places):
            raise ValueError(f"position {next(p for p in places if places.count(p) > 1)} is given twice")
        count = len(places) or (1 if self.kind == "image" else None)
        if self.noise is not None and count is not None and len(self.noise) not in (1, count):
            raise ValueError(
                f"{len(self.noise)} noise multipliers for {count} position{'s' if count > 1 else ''}: "
                "give one for all or one for each"
            )
        return self


class ResolvedCondition(ConditionSpec):
    """Hold a condition with every field set; a video without `positions` is kept whole, or as the task takes it."""

    noise: list[Multiplier]
    encode: Literal["single", "repeat"]


class GenerationRequest(StrictModel):
    """Describe a video to make. `resolved` fills fields that are None from the preset and the model."""

    task: Task = field(
        "generate", "What to do: generate a video, extend one, join two by a transition, or make a seamless loop."
    )
    model: FileReference = field(
        "mini", "Model: a name from `pusa models`, a Hugging Face repository or a local folder."
    )
    prompt: Annotated[Text, Field(max_length=10_000)] = field("", "What the video shows.")
    negative_prompt: Annotated[Text, Field(max_length=10_000)] | None = field(
        None, "What the video should not show.", unset="the model's"
    )
    conditions: list[ConditionSpec] = field([], "What is known of the video.", max_length=64)
    preset: Literal["faithful", "balanced", "creative"] = field(
        "balanced", "Noise and alpha in one word: " + "; ".join(f"{n}: {p.help}" for n, p in PRESETS.items()) + "."
    )
    width: int | None = field(
        None,
        "Width; rounded to a multiple of 16 (of 32 for wan2.2-ti2v-5b).",
        unit="pixels",
        unset="the model's",
        ge=16,
        le=2048,
    )
    height: int | None = field(
        None,
        "Height; rounded to a multiple of 16 (of 32 for wan2.2-ti2v-5b).",
        unit="pixels",
        unset="the model's",
        ge=16,
        le=2048,
    )
    frames: int | None = field(
        None,
        "Length; rounded to 4n + 1. When extending, the overlap counts; in a transition, both overlaps count.",
        unit="frames",
        unset="the model's",
        ge=1,
        le=MAX_FRAMES,
    )
    window: int | None = field(
        None,
        "Frames made at once; a longer video is chained from windows that overlap.",
        unit="frames",
        unset="the model's",
        ge=1,
        le=MAX_FRAMES,
    )
    overlap: int | None = field(
        None,
        "Frames that a continuation takes over from what comes before it.",
        unit="frames",
        unset="13, or less in a short window",
        ge=1,
        le=MAX_FRAMES,
    )
    fps: float | None = field(None, "Frames per second of the file.", unit="fps", unset="the model's", ge=1, le=120)
    steps: int | None = field(
        None, "Denoising steps: more are slower and finer, 10 are often enough.", unset="the model's", ge=1, le=200
    )
    guidance: float | None = field(
        None, "How closely the prompt is followed; 1 is off and twice as fast.", unset="the model's", ge=1, le=20
    )
    guidance_2: float | None = field(
        None, "Guidance of the low-noise expert of Wan2.2.", unset="as guidance", ge=1, le=20
    )
    shift: float | None = field(
        None,
        "Higher spends more of the steps at high noise, where layout and motion form.",
        unset="the model's",
        ge=0.1,
        le=20,
    )
    alpha: float | None = field(
        None, "Strength of Pusa's LoRA: higher is steadier, lower livelier.", unset="the model's", ge=0.1, le=5
    )
    alpha_2: float | None = field(
        None, "Alpha of the low-noise expert of Wan2.2.", unset="the model's, or as alpha", ge=0.1, le=5
    )
    lora: list[FileReference] = field(
        [],
        "LoRA to load instead of the model's own: a file, or with a strength FILE@1.2. Wan2.2's files go to the expert "
        "that their names tell, or high=FILE,low=FILE.",
        max_length=8,
    )
    lora_layers: Literal["all", "fitting"] | None = field(
        None,
        "Which layers of a LoRA must fit: all, or all but those that only image-to-video models have.",
        unset="all",
    )
    seed: int | None = field(
        None, "The same seed gives the same video.", unset="one is drawn, and stored in the file", ge=0, le=2**63 - 1
    )
    metadata: Metadata | None = field(
        None,
        "How much the file tells of itself: full (the request and small inputs, to make it again), minimal (made with "
        "AI, the model, the version) or off (nothing).",
        unset="full",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> "GenerationRequest":
        videos = sum(c.kind == "video" for c in self.conditions)
        needed = {"generate": None, "extend": 1, "transition": 2, "loop": 0}[self.task]
        if needed is not None and videos != needed:
            raise ValueError(f"task {self.task} takes {needed} video{'s' if needed != 1 else ''}, not {videos}")
        if self.task in ("extend", "transition") and videos != len(self.conditions):
            raise ValueError(f"task {self.task} takes no images: leave them out")
        if self.task in ("extend", "transition") and any(c.positions for c in self.conditions):
            raise ValueError(f"task {self.task} places its videos itself: leave positions out, overlap says how much")
        if not self.prompt.strip() and not self.conditions:
            raise ValueError("the prompt is empty: say what the video shows, or give an image or a video")
        return self

    def resolved(self, defaults: GenerationDefaults) -> "ResolvedRequest":
        """Fill every open field from the preset and the model, and draw a seed where none is set.

        Sizes are rounded to the model's multiples of 16 or 32 and lengths to 4n + 1; `rounding_notes` lists what
        changed.

        Raises:
            ValueError: a position outside the video, two conditions on one latent frame, an overlap that leaves
                nothing to make.
        """
        first_alpha, second_alpha = _per_expert(defaults.alpha)
        frames = nearest_of(self.frames or defaults.num_frames, FRAMES_PER_LATENT, 1)
        window = min(frames, nearest_of(self.window or defaults.num_frames, FRAMES_PER_LATENT, 1))
        overlap = (
            nearest_of(self.overlap, FRAMES_PER_LATENT, 1) if self.overlap else min(OVERLAP_FRAMES, _half_of(window))
        )
        self._check_overlap(frames, window, overlap)
        values = {
            "negative_prompt": defaults.negative_prompt if self.negative_prompt is None else self.negative_prompt,
            "conditions": self._resolve_conditions(defaults.encode),
            "width": nearest_of(self.width or defaults.width, defaults.size_multiple),
            "height": nearest_of(self.height or defaults.height, defaults.size_multiple),
            "frames": frames,
            "window": window,
            "overlap": overlap,
            "fps": self.fps or float(defaults.fps),
            "steps": self.steps or defaults.steps,
            "guidance": self.guidance or float(defaults.guidance),
            "shift": self.shift or float(defaults.shift),
            "alpha": self.alpha or preset_alpha(self.preset, first_alpha),
            "alpha_2": self.alpha_2
            or (None if self.alpha or not second_alpha else preset_alpha(self.preset, second_alpha)),
            "lora_layers": self.lora_layers or "all",
            "seed": secrets.randbits(32) if self.seed is None else self.seed,
            "metadata": self.metadata or "full",
        }
        resolved = ResolvedRequest(**{**dict(self), **values})
        _check_places(resolved)
        return resolved

    def _resolve_conditions(self, encode: Literal["single", "repeat"]) -> list[ResolvedCondition]:
        image_noise = iter(preset_noise(self.preset, "image", sum(c.kind == "image" for c in self.conditions)))
        resolved = []
        for condition in self.conditions:
            if condition.kind == "image":
                noise, positions = [next(image_noise)], condition.positions or [Position("latent", 0)]
            elif self.task in ("extend", "transition"):
                # The file shows this video beside the new frames: a change would show at the joint.
                noise, positions = [0.0], []
            elif condition.positions:
                noise, positions = preset_noise(self.preset, "video", len(condition.positions)), condition.positions
            else:
                # All frames of a video are kept, and their number is not known before its file is read: one for all.
                noise, positions = preset_noise(self.preset, "image", 1), []
            values = {
                "noise": condition.noise or noise,
                "positions": positions,
                "encode": condition.encode or (encode if condition.kind == "image" else "single"),
            }
            resolved.append(ResolvedCondition(**{**dict(condition), **values}))
        return resolved

    def _check_overlap(self, frames: int, window: int, overlap: int) -> None:
        sides = 2 if self.task in ("transition", "loop") else 1 if self.task == "extend" or frames > window else 0
        kept = latent_frames(overlap)
        if self.task == "transition" and frames > window:
            raise ValueError(f"frames={frames}: a transition is made at once; give at most window={window}")
        if sides * kept >= latent_frames(window):
            most = (latent_frames(window) - 1) // sides
            raise ValueError(
                f"overlap={overlap} leaves nothing to make in {window} frames: "
                + (f"give at most {frames_of(most)}" if most else "give more frames")
            )
        if self.task in ("extend", "transition"):
            for condition in self.conditions:
                if condition.noise and len(condition.noise) not in (1, kept):
                    raise ValueError(
                        f"{len(condition.noise)} noise multipliers for an overlap of {overlap} frames, which is {kept} "
                        f"latent frames: give 1 or {kept}"
                    )


class ResolvedRequest(GenerationRequest):
    """Hold a request with every field set, but `guidance_2` and `alpha_2` where one value holds for both experts.

    `GenerationRequest.resolved` makes it once, where the model's defaults are known.
    """

    conditions: list[ResolvedCondition]  # type: ignore[assignment]  # lists of a frozen model are only read
    if TYPE_CHECKING:
        negative_prompt: str
        width: int
        height: int
        frames: int
        window: int
        overlap: int
        fps: float
        steps: int
        guidance: float
        shift: float
        alpha: float
        lora_layers: Literal["all", "fitting"]
        seed: int
        metadata: Metadata

    @model_validator(mode="after")
    def _is_complete(self) -> "ResolvedRequest":
        unset = [name for name, value in self if value is None and name not in ("guidance_2", "alpha_2")]
        if unset:
            raise ValueError(f"a resolved request has no {', '.join(unset)}: resolve the request it was made from")
        return self

    def resolved(self, defaults: GenerationDefaults) -> "ResolvedRequest":
        """Return the request itself: no field is open."""
        return self


def match_orientation(
    request: GenerationRequest, size_of_first: Callable[[], tuple[int, int]] | None, defaults: GenerationDefaults
) -> GenerationRequest:
    """Swap the model's width and height where the first input is upright and they are not, or the other way round.

    A request with a size of its own stays as it is.

    Args:
        size_of_first: returns width and height of the first input; called only where they matter. None: no input.
    """
    if request.width or request.height or size_of_first is None or defaults.width == defaults.height:
        return request
    width, height = size_of_first()
    if width == height or (width > height) == (defaults.width > defaults.height):
        return request
    return request.model_copy(update={"width": defaults.height, "height": defaults.width})


def rounding_notes(
    request: GenerationRequest, resolved: ResolvedRequest, size_multiple: int = SIZE_MULTIPLE
) -> list[str]:
    """Return one line for each number of the request that `resolved` has rounded; sides to that of the model."""
    notes = []
    for name in ("width", "height", "frames", "window", "overlap"):
        before, after = getattr(request, name), getattr(resolved, name)
        if before is not None and before != after and not (name == "window" and after == resolved.frames):
            rule = f"a multiple of {size_multiple}" if name in ("width", "height") else "4n + 1"
            notes.append(f"{name} {before} becomes {after}: it has to be {rule}")
    return notes


def _half_of(window: int) -> int:
    """Return the largest 4n + 1 in half a window."""
    return max(1, (window // 2 - 1) // FRAMES_PER_LATENT * FRAMES_PER_LATENT + 1)


def _per_expert(alpha: float | Mapping[str, float]) -> tuple[float, float | None]:
    return (alpha["transformer"], alpha.get("transformer_2")) if isinstance(alpha, Mapping) else (alpha, None)


def _check_places(request: ResolvedRequest) -> None:
    owner: dict[int, int] = {}
    for number, condition in enumerate(request.conditions, start=1):
        for position in condition.positions:
            index = position.latent_index(request.frames, request.fps)
            if index in owner:
                raise ValueError(
                    f"conditions {owner[index]} and {number} both hold latent frame {index}: move one of them"
                )
            owner[index] = number
