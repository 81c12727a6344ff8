"""Define the routes of ``/v1/models``, with all that a form for the model needs."""

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter

from pusa import zoo
from pusa.defaults import GenerationDefaults
from pusa.fields import FieldSpec
from pusa.numerals import MAX_VALUES
from pusa.positions import frames_of, latent_frames, nearest_of
from pusa.request import (
    FINAL_NOISE,
    MAX_PROMPTS,
    PRESETS,
    ConditionSpec,
    GenerationRequest,
    draft_size,
    draft_steps,
    field_specs,
    preset_alpha,
    preset_noise,
)
from pusa.request.drafts import LEAST_SIDE, MAX_SIDE
from pusa.request.schedule import WAVE
from pusa.server.errors import ServiceError
from pusa.server.http import openapi
from pusa.server.http.api import Id, Service
from pusa.server.http.model_schemas import (
    FieldHelp,
    Model,
    ModelDefaults,
    ModelDraft,
    ModelFast,
    ModelLimits,
    ModelList,
    ModelPreset,
    model_plan,
)
from pusa.server.http.schemas import MAX_PROMPT_CHARACTERS
from pusa.server.http.to_request import EDIT_NOISE
from pusa.server.http.validation import client_name
from pusa.server.service import VideoService, in_thread
from pusa.server.settings import ServerSettings

router = APIRouter(prefix="/v1")

_ORIGINAL_FRAMES = 81
"""The only length of the original demo: its default positions are meant for it."""

_VIDEO_POSITIONS: list[int | str] = [0, 1, 2, 3]  # those of the original demo

# The ranges of sliders where the whole range of a field is too wide for one, and the steps of all of them.
_SLIDERS = {"steps": (1, 50), "fps": (1, 60), "shift": (1, 20), "overlap": (1, 81)}
_STEPS = {
    **dict.fromkeys(("alpha", "alpha_2"), 0.1),
    **dict.fromkeys(("guidance", "guidance_2", "shift"), 0.5),
    **dict.fromkeys(("guidance_start", "guidance_stop", "noise"), 0.05),
    **dict.fromkeys(("steps", "fps", "crf", "seed"), 1),
}
_LEFT_OUT = ("model", "lora", "lora_layers", "sha256", "file", "kind")  # of the server, or no controls
_CONDITION_NAMES = {"noise": "noise_multipliers", "positions": "cond_positions", "fit": "fit", "encode": "encode"}


@router.get("/models", response_model=ModelList, responses=openapi.errors(503), summary="List models")
async def list_models(service: Service) -> ModelList:
    return ModelList(data=[await in_thread(describe_model, service)])


@router.get("/models/{id:path}", response_model=Model, responses=openapi.errors(404, 503), summary="Look at a model")
async def get_model(id: Id, service: Service) -> Model:
    """Returns the model with its defaults, ranges, sizes and words: all that a form needs."""
    if id != service.model:
        raise ServiceError(404, "model_not_found", f"there is no model {id[:60]!r}: there is {service.model}", "model")
    return await in_thread(describe_model, service)


def describe_model(service: VideoService) -> Model:
    """Describe the model of a server. Reads the database: call it in a thread."""
    settings, defaults = service.settings, service.defaults
    named_model = zoo.find(settings.model)
    alpha, alpha_2 = _alphas(defaults.alpha)
    steps = draft_steps(defaults.steps)
    width, height = draft_size(defaults)
    words = named_model.words if named_model else {}
    return Model(
        id=service.model,
        created=service.started_at,
        owned_by="pusa",
        title=named_model.title if named_model else "",
        defaults=_defaults(defaults, settings),
        fast=_fast(defaults),
        draft=ModelDraft(width=width, height=height, num_inference_steps=steps),
        presets={
            name: ModelPreset(
                noise_multipliers=_noise_of(name, "image", defaults),
                video_noise_multipliers=_noise_of(name, "video", defaults),
                lora_alpha=preset_alpha(name, alpha),
                lora_alpha_2=None if alpha_2 is None else preset_alpha(name, alpha_2),
                help=preset.help,
            )
            for name, preset in PRESETS.items()
        },
        sizes=sizes_of(defaults),
        shapes=shapes_of(defaults),
        size_multiple=defaults.size_multiple,
        frames_per_latent=defaults.frames_per_latent,
        classes=defaults.classes,
        has_text=defaults.has_text,
        has_guidance=defaults.classes != 0,
        has_shift=defaults.has_shift,
        has_waves=defaults.boundary_ratio is None,
        experts=1 if defaults.boundary_ratio is None else 2,
        limits=_limits(defaults, settings),
        loras=list(service.submitter.loras),
        metadata=list(settings.metadata_choices),
        words={kind: [list(group) for group in groups] for kind, groups in words.items()},
        fields=_fields(defaults, settings),
        enhancer=service.enhancer.is_on,
        plan=model_plan(service.planner.plan_defaults(defaults)),
    )


def sizes_of(defaults: GenerationDefaults) -> list[str]:
    """List the model's size and one for each shape, and 720p for models of large pictures."""
    width = max(defaults.width, defaults.height)
    larger = ["1280x720", "720x1280"] if 832 <= width < 1280 else []
    return list(dict.fromkeys([f"{defaults.width}x{defaults.height}", *shapes_of(defaults).values(), *larger]))


def shapes_of(defaults: GenerationDefaults) -> dict[str, str]:
    """Return a size of about the model's pixels for each aspect ratio: the model's own where it is of that shape."""
    width, height, multiple = defaults.width, defaults.height, defaults.size_multiple
    longer, shorter = max(width, height), min(width, height)
    square = nearest_of(round((width * height) ** 0.5), multiple)
    if longer < 1.4 * shorter:
        longer, shorter = _wide_size(width * height, min(square, LEAST_SIDE), multiple)
    return {"16:9": f"{longer}x{shorter}", "1:1": f"{square}x{square}", "9:16": f"{shorter}x{longer}"}


def _wide_size(pixels: int, least: int, multiple: int) -> tuple[int, int]:
    """Find the size nearest to 16:9 with about so many pixels, and with `least` of them at least on each side."""
    heights = range(nearest_of(least, multiple), round((1.35 * pixels) ** 0.5), multiple)
    sizes = [(nearest_of(round(height * 16 / 9), multiple), height) for height in heights]
    fitting = [size for size in sizes if 0.6 * pixels <= size[0] * size[1] <= 1.35 * pixels] or sizes
    return min(fitting, key=lambda size: abs(size[0] / size[1] - 16 / 9))


def _alphas(alpha: float | Mapping[str, float]) -> tuple[float, float | None]:
    return (alpha["transformer"], alpha.get("transformer_2")) if isinstance(alpha, Mapping) else (alpha, None)


def _noise_of(preset: str, kind: Any, defaults: GenerationDefaults) -> list[float]:
    values = getattr(PRESETS[preset], f"{kind}_noise")
    own = getattr(defaults, f"{kind}_noise")
    return preset_noise(preset, kind, max(len(values), len(own or ())), defaults)


def _defaults(defaults: GenerationDefaults, settings: ServerSettings) -> ModelDefaults:
    request, condition = GenerationRequest.model_fields, ConditionSpec.model_fields
    last = latent_frames(defaults.num_frames, defaults.frames_per_latent) - 1
    alpha, alpha_2 = _alphas(defaults.alpha)
    noise = preset_noise("balanced", "image", 2, defaults)
    return ModelDefaults(
        width=defaults.width,
        height=defaults.height,
        num_frames=defaults.num_frames,
        fps=defaults.fps,
        num_inference_steps=defaults.steps,
        guidance_scale=defaults.guidance,
        condition_guidance=defaults.condition_guidance or defaults.guidance,
        flow_shift=defaults.shift,
        lora_alpha=alpha,
        lora_alpha_2=alpha_2,
        negative_prompt=defaults.negative_prompt,
        window=defaults.num_frames,
        overlap=nearest_of(defaults.overlap, defaults.frames_per_latent, 1),
        preset=request["preset"].default,
        fit=condition["fit"].default,
        encode=defaults.encode,
        schedule=request["schedule"].default,
        metadata=settings.metadata,
        crf=request["crf"].default,
        noise_multiplier=noise[0],
        noise_multipliers=noise,
        cond_positions=[0, last if defaults.num_frames == _ORIGINAL_FRAMES else "last"],
        video_cond_positions=_VIDEO_POSITIONS,
        video_noise_multipliers=preset_noise("balanced", "video", len(_VIDEO_POSITIONS), defaults),
        edit_noise_multiplier=EDIT_NOISE,
        final_noise_multiplier=FINAL_NOISE,
    )


def _fast(defaults: GenerationDefaults) -> ModelFast | None:
    fast = defaults.fast
    if fast is None:
        return None
    alpha, alpha_2 = _alphas(fast.alpha or defaults.alpha)
    return ModelFast(
        num_inference_steps=fast.steps,
        guidance_scale=fast.guidance,
        flow_shift=fast.shift or defaults.shift,
        lora_alpha=alpha,
        lora_alpha_2=alpha_2,
    )


def _limits(defaults: GenerationDefaults, settings: ServerSettings) -> ModelLimits:
    return ModelLimits(
        pixels=settings.max_video_pixels,
        side=MAX_SIDE,
        frames=settings.max_video_frames,
        steps=settings.max_steps,
        window=defaults.longest_window,
        prompt_characters=MAX_PROMPT_CHARACTERS,
        prompt_tokens=defaults.max_sequence_length if defaults.has_text else None,
        prompts=MAX_PROMPTS,
        positions=MAX_VALUES,
        body_bytes=settings.max_body_bytes,
        uploads=settings.max_uploads,
        upload_pixels=settings.max_upload_pixels,
        upload_seconds=settings.max_upload_seconds,
        upload_frames=settings.max_upload_frames,
        queue=settings.key_queue_limit if settings.api_keys else settings.queue_limit,
        keep_hours=settings.keep_hours or 0,
    )


# ---- fields ----------------------------------------------------------------------------------------------------------


def _fields(defaults: GenerationDefaults, settings: ServerSettings) -> dict[str, FieldHelp]:
    """Explain the fields of a request by their names in the API."""
    factor = defaults.frames_per_latent
    longest = max(nearest_of(161, factor, 1), 4 * (defaults.num_frames - 1) + 1)
    frames = (frames_of(2, factor), longest, factor)
    sides = (defaults.size_multiple, MAX_SIDE, defaults.size_multiple)
    ranges = {"frames": frames, "window": frames, "overlap": (1, 81, factor), "width": sides, "height": sides}
    most = {"frames": settings.max_video_frames, "steps": settings.max_steps}
    found = {}
    for spec in field_specs(GenerationRequest):
        if spec.name not in _LEFT_OUT:
            found[client_name(spec.name)] = _help(spec, ranges, most.get(spec.name))
    for spec in field_specs(ConditionSpec):
        if spec.name in _CONDITION_NAMES:
            found[_CONDITION_NAMES[spec.name]] = _help(spec, ranges, None)
    number = found["noise_multipliers"].model_copy(
        update={"type": "number", "minimum": 0, "maximum": 1, "low": 0, "high": 1, "step": _STEPS["noise"]}
    )
    return {**found, "noise_multiplier": number}


def _help(spec: FieldSpec, ranges: Mapping[str, tuple[int, int, int]], most: int | None) -> FieldHelp:
    maximum = spec.maximum if most is None or spec.maximum is None else min(spec.maximum, most)
    low, high = _SLIDERS.get(spec.name, (spec.minimum, maximum))
    step: float | None = _STEPS.get(spec.name)
    if spec.name in ranges:
        low, high, step = ranges[spec.name]
    return FieldHelp(
        help=spec.help,
        type=spec.type,
        minimum=spec.minimum,
        maximum=maximum,
        low=low,
        high=high if high is None or maximum is None else min(high, maximum),
        step=step,
        choices=["even", WAVE] if spec.name == "schedule" else list(spec.choices),
        default=spec.default,
        unit=spec.unit,
        unset=spec.unset,
    )
