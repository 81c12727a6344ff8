"""Define the request for a video, and fill its open fields with the defaults of a model."""

import secrets
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from pusa.codes import CodedError, CodedText
from pusa.defaults import FastSettings, GenerationDefaults
from pusa.fields import StrictModel, field
from pusa.positions import frames_of, latent_frames, length_rule, nearest_of
from pusa.request.abilities import check_abilities, check_text
from pusa.request.condition import ConditionSpec, ResolvedCondition
from pusa.request.drafts import FINAL_NOISE, MAX_SIDE, check_drafts, draft_size, draft_steps, final_steps
from pusa.request.overlap import resolve_overlap
from pusa.request.position import Position
from pusa.request.presets import PRESETS, preset_alpha, preset_noise
from pusa.request.prompts import Story, parse_prompts, story
from pusa.request.schedule import check_beside_wave, check_schedule, delay_of, is_wave, resolve_schedule
from pusa.request.types import FileReference, Text

DEFAULT_MODEL = "mini"
SIZE_MULTIPLE = 16  # 8 by the VAE, 2 by the transformer's patches; `GenerationDefaults.size_multiple` of a model
MAX_FRAMES = 4801
MAX_PROMPTS = 256

Task = Literal["generate", "extend", "transition", "loop"]
Metadata = Literal["full", "minimal", "off"]
METADATA: tuple[Metadata, ...] = get_args(Metadata)
"""From the most that a file tells of itself to the least."""

_WAN_FRAMES_PER_LATENT = 4  # of a stored request that does not tell


class GenerationRequest(StrictModel):
    """Describe a video to make. `resolved` fills fields that are None from the preset and the model."""

    task: Task = field(
        "generate", "What to do: generate a video, extend one, join two by a transition, or make a seamless loop."
    )
    model: FileReference = field(
        DEFAULT_MODEL, "Model: a name from `pusa models`, a Hugging Face repository or a local folder."
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
        le=MAX_SIDE,
    )
    height: int | None = field(
        None,
        "Height; rounded to a multiple of 16 (of 32 for wan2.2-ti2v-5b).",
        unit="pixels",
        unset="the model's",
        ge=16,
        le=MAX_SIDE,
    )
    frames: int | None = field(
        None,
        "Length; rounded to what the model makes: 4n + 1 frames for Wan. When extending, the overlap counts; in a "
        "transition, both overlaps count.",
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
        unset="the model's (13 for Wan), or less in a short window",
        ge=1,
        le=MAX_FRAMES,
    )
    fps: float | None = field(None, "Frames per second of the file.", unit="fps", unset="the model's", ge=1, le=120)
    crf: int = field(17, "Quality of an mp4, x264's CRF: lower is better, and a larger file.", unset="17", ge=0, le=51)
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
    exact: bool | None = field(
        None,
        "Compute every frame at every step. Otherwise frames that are kept as they are, or finished, are computed at "
        "every fifth step only: faster, and hardly another video.",
        unset="no",
    )
    fast: bool = field(
        False,
        "Few steps, with the model's 4-step LoRA: its steps, guidance and shift, where the request sets none.",
    )
    guidance_start: float = field(
        0.0, "Part of the steps before guidance begins: 0.25 of 4 is one step without it.", unset="0", ge=0, le=1
    )
    guidance_stop: float = field(
        1.0,
        "Part of the steps after which guidance ends, and a step is one pass: 0.25 of 4 guides the first.",
        unset="1",
        ge=0,
        le=1,
    )
    step_cache: Literal["none", "first_block"] = field(
        "none",
        "Leave blocks out where a step changes little: none, or first_block, for many steps or many kept frames.",
    )
    schedule: Annotated[Text, AfterValidator(check_schedule)] = field(
        "even",
        "When frames are denoised: even (all together), wave (early frames first, so that the video can be seen from "
        "its beginning while it is made) or wave:DELAY, with the steps between neighbouring latent frames.",
    )
    prompts: list[Annotated[Text, Field(max_length=10_000)]] = field(
        [],
        "Prompts of a long video, instead of the one prompt: one for each window, or each from a time on, such as 0s: "
        "a rocket stands, and 4.5s: it flies.",
        max_length=MAX_PROMPTS,
    )
    draft: bool = field(
        False,
        "Make a draft: half the model's size (80 pixels for mini) and few steps; `pusa final` makes the clip from it.",
    )

    @model_validator(mode="before")
    @classmethod
    def _name_by_first_prompt(cls, values: Any) -> Any:
        """Take the first of `prompts` for the prompt where that is empty: a video is listed by it."""
        prompts = values.get("prompts") if isinstance(values, dict) else None
        if not isinstance(prompts, list) or not prompts or str(values.get("prompt") or "").strip():
            return values
        try:
            return {**values, "prompt": parse_prompts([str(prompts[0])])[0].text}
        except ValueError:
            return values  # the fields' own checks tell

    @model_validator(mode="after")
    def _fits_together(self) -> "GenerationRequest":
        kinds = [condition.kind for condition in self.conditions]
        check_drafts(self.task, self.draft, kinds)
        if is_wave(self.schedule):
            check_beside_wave(kinds, (self.guidance_start, self.guidance_stop))
        if self.prompts:
            parse_prompts(self.prompts)
        videos = sum(c.kind == "video" for c in self.conditions)
        needed = {"generate": None, "extend": 1, "transition": 2, "loop": 0}[self.task]
        if needed is not None and videos != needed:
            raise CodedError(
                "task_videos",
                f"task {self.task} takes {needed} video{'s' if needed != 1 else ''}, not {videos}",
                task=self.task,
                needed=needed,
                given=videos,
            )
        if self.task in ("extend", "transition") and any(c.kind == "image" for c in self.conditions):
            raise CodedError("task_no_images", f"task {self.task} takes no images: leave them out", task=self.task)
        if self.task in ("extend", "transition") and any(c.positions for c in self.conditions):
            raise CodedError(
                "task_no_positions",
                f"task {self.task} places its videos itself: leave positions out, overlap says how much",
                task=self.task,
            )
        if self.guidance_start > self.guidance_stop:
            raise CodedError(
                "guidance_range",
                f"guidance_start={self.guidance_start:g} is above guidance_stop={self.guidance_stop:g}: give less",
                start=self.guidance_start,
                stop=self.guidance_stop,
            )
        if self.model == DEFAULT_MODEL:  # which reads text; of others, their defaults tell
            check_text(self)
        return self

    def resolved(self, defaults: GenerationDefaults) -> "ResolvedRequest":
        """Fill every open field from the preset and the model, and draw a seed where none is set.

        Sizes are rounded to the model's multiples of 16 or 32 and lengths to whole latent frames; `rounding_notes`
        lists what changed.

        Raises:
            ValueError: a position outside the video, two conditions on one latent frame, an overlap that leaves
                nothing to make; no prompt, or one that the model cannot read; anything else that it does not have, such
                as `fast`.
        """
        check_abilities(self, defaults)
        fast = self._fast_settings(defaults)
        first_alpha, second_alpha = _per_expert((fast and fast.alpha) or defaults.alpha)
        factor = defaults.frames_per_latent
        frames = nearest_of(self.frames or defaults.num_frames, factor, 1)
        window = min(frames, nearest_of(self.window or defaults.num_frames, factor, 1))
        overlap = resolve_overlap(self, defaults, frames=frames, window=window)
        width, height = draft_size(defaults) if self.draft else (defaults.width, defaults.height)
        steps = self.steps or self._default_steps((fast or defaults).steps)
        values = {
            "negative_prompt": defaults.negative_prompt if self.negative_prompt is None else self.negative_prompt,
            "conditions": self._resolve_conditions(defaults),
            "width": nearest_of(self.width or width, defaults.size_multiple),
            "height": nearest_of(self.height or height, defaults.size_multiple),
            "frames": frames,
            "window": window,
            "overlap": overlap,
            "fps": self.fps or float(defaults.fps),
            "steps": steps,
            "guidance": self.guidance or float(fast.guidance if fast else self._model_guidance(defaults)),
            "shift": self.shift or float((fast and fast.shift) or defaults.shift),
            "alpha": self.alpha or preset_alpha(self.preset, first_alpha),
            "alpha_2": self.alpha_2
            or (None if self.alpha or not second_alpha else preset_alpha(self.preset, second_alpha)),
            "lora_layers": self.lora_layers or "all",
            "seed": secrets.randbits(32) if self.seed is None else self.seed,
            "metadata": self.metadata or "full",
            "schedule": self._resolve_schedule(defaults, steps, frames, window, overlap),
            "exact": bool(self.exact),
            "frames_per_latent": factor,
        }
        resolved = ResolvedRequest(**{**dict(self), **values})
        _check_places(resolved)
        resolved.place_prompts()
        return resolved

    def _default_steps(self, steps: int) -> int:
        """Return the steps of a request that has none: the model's, or those of a draft or of a final."""
        if self.draft:
            return steps if self.fast else draft_steps(steps)  # a LoRA for 4 steps knows no fewer
        drafts = [condition for condition in self.conditions if condition.kind == "draft"]
        return final_steps(steps, max(drafts[0].noise or [FINAL_NOISE])) if drafts else steps

    def _fast_settings(self, defaults: GenerationDefaults) -> FastSettings | None:
        """Return what `fast` sets; a LoRA of the request's own makes it possible for every model."""
        if not self.fast:
            return None
        if defaults.fast is None and not self.lora:
            raise CodedError(
                "no_fast_mode",
                f"{self.model} has no fast mode, as no 4-step LoRA of it is known: leave fast out and give 4 steps and "
                "guidance 1 (--steps 4 --guidance 1), or add such a LoRA (--lora FILE)",
                model=self.model,
            )
        return defaults.fast or FastSettings(shift=None)

    def _model_guidance(self, defaults: GenerationDefaults) -> float:
        has_condition = any(condition.kind != "draft" for condition in self.conditions)
        return (has_condition and defaults.condition_guidance) or defaults.guidance

    def _resolve_schedule(
        self, defaults: GenerationDefaults, steps: int, frames: int, window: int, overlap: int
    ) -> str:
        if is_wave(self.schedule) and defaults.boundary_ratio is not None:
            raise CodedError(
                "no_wave_for_experts",
                f"schedule={self.schedule}: {self.model} has two experts, one for high and one for low noise, and a "
                "wave has both in one step: ask for --schedule even, or a model with one expert",
                model=self.model,
            )
        factor = defaults.frames_per_latent
        return resolve_schedule(
            self.schedule, steps=steps, frames=frames, window=window, overlap=overlap, factor=factor
        )

    def _resolve_conditions(self, defaults: GenerationDefaults) -> list[ResolvedCondition]:
        images = sum(condition.kind == "image" for condition in self.conditions)
        image_noise = iter(preset_noise(self.preset, "image", images, defaults))
        resolved = []
        for condition in self.conditions:
            if condition.kind == "draft":
                noise, positions = [FINAL_NOISE], []
            elif condition.kind == "image":
                noise, positions = [next(image_noise)], condition.positions or [Position("latent", 0)]
            elif self.task in ("extend", "transition"):
                # The file shows this video beside the new frames: a change would show at the joint.
                noise, positions = [0.0], []
            elif condition.positions:
                positions = condition.positions
                noise = preset_noise(self.preset, "video", len(positions), defaults)
            else:
                # All frames of a video are kept, and their number is not known before its file is read: one for all.
                noise, positions = preset_noise(self.preset, "image", 1, defaults), []
            values = {
                "noise": condition.noise or noise,
                "positions": positions,
                "encode": condition.encode or (defaults.encode if condition.kind == "image" else "single"),
            }
            resolved.append(ResolvedCondition(**{**dict(condition), **values}))
        return resolved


class ResolvedRequest(GenerationRequest):
    """Hold a request with every field set, but `guidance_2` and `alpha_2` where one value holds for both experts.

    `GenerationRequest.resolved` makes it once, where the model's defaults are known.
    """

    conditions: list[ResolvedCondition]  # type: ignore[assignment]  # lists of a frozen model are only read
    frames_per_latent: int = field(_WAN_FRAMES_PER_LATENT, "Frames of a latent frame after the first.", ge=1)
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
        exact: bool

    @model_validator(mode="after")
    def _is_complete(self) -> "ResolvedRequest":
        unset = [name for name, value in self if value is None and name not in ("guidance_2", "alpha_2")]
        if unset:
            raise ValueError(f"a resolved request has no {', '.join(unset)}: resolve the request it was made from")
        return self

    @model_serializer(mode="wrap")
    def _leave_out_wans_factor(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave the frames of a latent frame out where they are Wan's, as every request did before other models."""
        values: dict[str, Any] = serialize(self)
        if values.get("frames_per_latent") == _WAN_FRAMES_PER_LATENT:
            del values["frames_per_latent"]
        return values

    def resolved(self, defaults: GenerationDefaults) -> "ResolvedRequest":
        """Return the request itself: no field is open."""
        return self

    @property
    def delay(self) -> int | None:
        """Steps between neighbouring latent frames of a wave; None for an even schedule."""
        return delay_of(self.schedule)

    @property
    def bridge_length(self) -> int:
        """Latent frames that join the end of a loop to its beginning; 0 for other tasks."""
        if self.task != "loop":
            return 0
        factor = self.frames_per_latent
        return latent_frames(self.window, factor) - 2 * latent_frames(self.overlap, factor)

    @property
    def clip_length(self) -> int:
        """Latent frames of the video without a loop's bridge."""
        return latent_frames(self.frames, self.frames_per_latent) - self.bridge_length

    def place_prompts(self) -> Story:
        """Return the prompts by latent frame. Raises ValueError if they do not fit the video."""
        if not self.prompts:
            return Story((0,), (self.prompt,))
        factor = self.frames_per_latent
        frames = frames_of(self.clip_length, factor)  # a bridge goes on with the prompt of the end
        return story(self.prompts, frames=frames, fps=self.fps, window=self.window, overlap=self.overlap, factor=factor)

    @property
    def still_frames(self) -> int:
        """The most latent frames of a window that are kept as they are: those of conditions, and of overlaps."""
        factor = self.frames_per_latent
        window, overlap = latent_frames(min(self.frames, self.window), factor), latent_frames(self.overlap, factor)
        if self.delay is not None:
            return window - 1  # at the beginning and at the end of a wave one frame moves
        count = overlap * (2 if self.task == "loop" else self.frames > self.window)
        for condition in self.conditions:
            places = len(condition.positions) or (window if self.task == "generate" else overlap)
            noise = condition.noise if len(condition.noise) > 1 else condition.noise * places
            count += noise[:places].count(0.0)
        return min(count, window)


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
    own_width, own_height = draft_size(defaults) if request.draft else (defaults.width, defaults.height)
    return request.model_copy(update={"width": own_height, "height": own_width})


def rounding_notes(
    request: GenerationRequest, resolved: ResolvedRequest, size_multiple: int = SIZE_MULTIPLE
) -> list[CodedText]:
    """Return a `CodedText` for each number of the request that `resolved` has rounded, and for a prompt not used.

    Args:
        size_multiple: of the model, for the sides.
    """
    notes = []
    for name in ("width", "height", "frames", "window", "overlap"):
        before, after = getattr(request, name), getattr(resolved, name)
        if before is not None and before != after and not (name == "window" and after == resolved.frames):
            is_side = name in ("width", "height")
            rule = f"a multiple of {size_multiple}" if is_side else length_rule(resolved.frames_per_latent)
            message = f"{name} {before} becomes {after}: it has to be {rule}"
            multiple = size_multiple if is_side else resolved.frames_per_latent
            values = {"field": name, "before": before, "after": after, "multiple": multiple}
            notes.append(CodedText("side_rounded" if is_side else "length_rounded", message, **values))
    if request.prompts and request.prompt.strip() != parse_prompts(request.prompts)[0].text:
        notes.append(CodedText("prompt_only_names", "prompts stand for the prompt, which only names the video"))
    return notes


def stored_request(values: Mapping[str, Any]) -> GenerationRequest:
    """Read a request that was stored as JSON, resolved or not, to make its video again.

    Its length is kept; the frames of a latent frame are those of the model that makes it.

    Raises:
        ValidationError: of pydantic.
    """
    return GenerationRequest.model_validate({name: v for name, v in values.items() if name != "frames_per_latent"})


def _per_expert(alpha: float | Mapping[str, float]) -> tuple[float, float | None]:
    return (alpha["transformer"], alpha.get("transformer_2")) if isinstance(alpha, Mapping) else (alpha, None)


def _check_places(request: ResolvedRequest) -> None:
    owner: dict[int, int] = {}
    for number, condition in enumerate(request.conditions, start=1):
        for position in condition.positions:
            index = position.latent_index(request.frames, request.fps, request.frames_per_latent)
            if index in owner:
                raise CodedError(
                    "position_taken",
                    f"conditions {owner[index]} and {number} both hold latent frame {index}: move one of them",
                    first=owner[index],
                    second=number,
                    latent=index,
                )
            owner[index] = number
