"""Define the response schemas of ``/v1/models``: a model, its plan, and all that a form for it needs."""

from dataclasses import asdict
from typing import Any, Literal

from pydantic import BaseModel, Field

from pusa.acceleration.decisions import Machine, Plan
from pusa.server.http.schemas import Reason
from pusa.server.plans import problem_of


class ModelCard(BaseModel):
    name: str
    memory_bytes: int


class ModelPlan(BaseModel):
    """Tell how a worker's machine, with its memory before loading, makes a video of the model's own size."""

    summary: str
    parts: list[dict[str, Any]]
    ranks: int
    gpu_peak_bytes: dict[str, int]
    ram_peak_bytes: int
    problem: str | None
    problem_detail: Reason | None
    notes: list[str]
    cards: list[ModelCard]
    ram_bytes: int


class ModelDefaults(BaseModel):
    """Give the value of each field that a request leaves out, and what a form may propose, by a request's names."""

    width: int
    height: int
    num_frames: int
    fps: float
    num_inference_steps: int
    guidance_scale: float
    condition_guidance: float = Field(description="guidance_scale of a request with a picture or a video.")
    flow_shift: float
    lora_alpha: float
    lora_alpha_2: float | None = Field(description="Of the low-noise expert; null: the model has one expert.")
    negative_prompt: str
    window: int
    overlap: int = Field(description="Frames; fewer in a short window.")
    preset: str
    fit: str
    encode: str
    schedule: str
    metadata: str = Field(description="The operator's.")
    crf: int
    noise_multiplier: float = Field(description="Of one picture.")
    noise_multipliers: list[float] = Field(description="Of the first and the last picture.")
    cond_positions: list[int | str] = Field(description="Of two pictures.")
    video_cond_positions: list[int | str] = Field(description="Latent frames of a video to complete.")
    video_noise_multipliers: list[float] = Field(description="Of these.")
    edit_noise_multiplier: float = Field(description="Of a whole video that is made again.")
    final_noise_multiplier: float = Field(description="Of a draft whose final is made.")


class ModelFast(BaseModel):
    """List what `fast` sets."""

    num_inference_steps: int
    guidance_scale: float
    flow_shift: float
    lora_alpha: float
    lora_alpha_2: float | None


class ModelDraft(BaseModel):
    """Size and steps of a draft of the model's own size."""

    width: int
    height: int
    num_inference_steps: int


class ModelPreset(BaseModel):
    """Noise and alpha of a preset; for more pictures or latent frames than there are values the last one repeats."""

    noise_multipliers: list[float] = Field(description="One for each picture.")
    video_noise_multipliers: list[float] = Field(description="One for each kept latent frame of a video.")
    lora_alpha: float
    lora_alpha_2: float | None
    help: str


class ModelLimits(BaseModel):
    """List the limits of what this server accepts."""

    pixels: int = Field(description="Width times height of a video to make.")
    side: int = Field(description="Pixels of the longer side.")
    frames: int
    steps: int
    window: int | None = Field(description="Frames that the model makes at once; null: as many as fit.")
    prompt_characters: int
    prompt_tokens: int | None = Field(description="That the model reads; null: it reads no text.")
    prompts: int = Field(description="Of a story.")
    positions: int
    body_bytes: int
    uploads: int = Field(description="Files of a request.")
    upload_pixels: int
    upload_seconds: float
    upload_frames: int
    queue: int = Field(description="Unfinished videos of this key, or of the server where it has no keys.")
    keep_hours: float = Field(description="For which videos are kept; 0: for ever.")


class FieldHelp(BaseModel):
    """Explain a field of a request, for a control; `low` and `high` are the range that a slider shows."""

    help: str
    type: Literal["integer", "number", "string", "list", "boolean"]
    minimum: float | None = None
    maximum: float | None = None
    low: float | None = None
    high: float | None = None
    step: float | None = None
    choices: list[str] = []
    default: Any = None
    unit: str | None = None
    unset: str | None = Field(None, description="What leaving it out means.")


class Model(BaseModel):
    """The model of this server and what a form for it needs.

    `classes` is null for a model whose prompt is text; else its prompt is the number of one of so many classes, or
    empty. `words` are the phrases that a small model was trained on, by kind, as groups of synonyms; none for a model
    that reads any text. `shapes` are sizes by aspect ratio, `sizes` all that a form may offer.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    title: str
    defaults: ModelDefaults
    fast: ModelFast | None = Field(description="Null: the model has no fast mode.")
    draft: ModelDraft
    presets: dict[str, ModelPreset]
    sizes: list[str]
    shapes: dict[str, str]
    size_multiple: int
    frames_per_latent: int
    classes: int | None
    has_text: bool
    has_guidance: bool
    has_shift: bool
    has_waves: bool
    experts: int
    limits: ModelLimits
    loras: list[str] = Field(description="Names that the operator offers.")
    metadata: list[str] = Field(description="What a request may ask for, from the most to the least.")
    words: dict[str, list[list[str]]]
    fields: dict[str, FieldHelp]
    enhancer: bool = Field(description="POST /v1/prompts/enhance is there.")
    plan: ModelPlan | None = Field(
        None, description="Null while no worker has reported its machine, or if the model cannot be planned."
    )


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


def model_plan(found: tuple[Plan, Machine] | None) -> ModelPlan | None:
    """Convert a model's plan, and the machine that it is for, for clients."""
    if found is None:
        return None
    plan, machine = found
    return ModelPlan(
        summary=plan.summary,
        parts=[{"part": name, **asdict(part)} for name, part in plan.parts.items()],
        ranks=plan.parallel.ranks,
        gpu_peak_bytes=dict(plan.gpu_peak_bytes),
        ram_peak_bytes=plan.ram_peak_bytes,
        problem=plan.problem or None,
        problem_detail=Reason(**problem_of(plan)) if plan.problem else None,
        notes=list(plan.notes),
        cards=[ModelCard(name=card.name, memory_bytes=card.memory_bytes) for card in machine.cards],
        ram_bytes=machine.ram_bytes,
    )
