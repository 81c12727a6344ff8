"""Define the request and response schemas of the HTTP API.

Names are OpenAI's first, then vLLM-Omni's, then ours. Ranges are taken from `GenerationRequest`.
"""

import copy
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, model_validator

from pusa.fields import StrictModel, field
from pusa.request import (
    FINAL_NOISE,
    MAX_PROMPTS,
    GenerationRequest,
    Metadata,
    Multiplier,
    PositionField,
    ResolvedRequest,
    Text,
)
from pusa.server.http.reference_schemas import AnyReference, AnyVideo, FileUrl, Reference, StoredReference
from pusa.server.jobs.job import Job
from pusa.server.plans import Estimate, problem_of

SIZE_PATTERN = r"^[1-9][0-9]{0,3}[xX×*][1-9][0-9]{0,3}$"
SECONDS_PATTERN = r"^[0-9]{1,4}(\.[0-9]{1,3})?$"
LIST_PATTERN = r"^[-0-9a-z.,\s]{1,4096}$"
MAX_FILES = 16
MAX_PROMPT_CHARACTERS = 10_000


def _copy_field(name: str) -> Any:
    """Copy limits, default and help of a field of `GenerationRequest`; its own checks are for values that are given."""
    copied = copy.copy(GenerationRequest.model_fields[name])
    copied.metadata = [limit for limit in copied.metadata if not isinstance(limit, AfterValidator)]
    return copied


Prompt = Annotated[Text, Field(max_length=MAX_PROMPT_CHARACTERS)]
Seconds = Annotated[str, Field(pattern=SECONDS_PATTERN)] | Annotated[float, Field(ge=0, le=9999)]
Listed = Annotated[str, Field(pattern=LIST_PATTERN)]
BatchName = Annotated[Text, Field(min_length=1, max_length=64)]


class KeyframeInput(StrictModel):
    """A picture at a place: one of `frame`, `time`, `latent`; one of `file`, `reference`, `image_url`, `image_b64`."""

    frame: int | Literal["last"] | None = field(None, "Frame number; negative counts from the end.")
    time: Annotated[float, Field(ge=-9999, le=9999)] | Literal["last"] | None = field(
        None, "Seconds from the beginning; negative counts from the end."
    )
    latent: int | Literal["last"] | None = field(None, "Latent frame; negative counts from the end.")
    file: int | None = field(None, "Which of the files in input_reference, counted from 0.", ge=0, le=MAX_FILES - 1)
    reference: StoredReference | None = field(None, "A picture on this server, or a frame of a clip there.")
    image_url: FileUrl | None = field(None, "A picture as a data URL.")
    image_b64: FileUrl | None = field(None, "A picture in base64.")
    noise: Multiplier | None = field(None, "How far the model may depart from it: 0 keeps it, 1 ignores it.")
    fit: Literal["crop", "letterbox", "stretch"] | None = field(None, "How a picture of another shape is fitted.")
    encode: Literal["single", "repeat"] | None = field(None, "How a picture after the first frame is encoded.")

    @model_validator(mode="after")
    def _one_each(self) -> "KeyframeInput":
        if sum(place is not None for place in (self.frame, self.time, self.latent)) > 1:
            raise ValueError("a keyframe has one place: frame, time or latent")
        if sum(source is not None for source in (self.file, self.reference, self.image_url, self.image_b64)) != 1:
            raise ValueError("a keyframe has one picture: file, reference, image_url or image_b64")
        return self

    @property
    def position(self) -> str | int | None:
        """Format the position for `GenerationRequest`; None if the client gave none."""
        if self.frame is not None:
            return "last" if self.frame == "last" else f"{self.frame}f"
        if self.time is not None:
            return "last" if self.time == "last" else f"{self.time:.3f}s"
        return self.latent


class LoraChoice(StrictModel):
    """A LoRA that the operator offers."""

    name: Annotated[Text, Field(min_length=1, max_length=200)] = field(..., "Its name.")
    scale: float | None = field(None, "Its strength, as lora_alpha.", ge=0.1, le=5)


LoraName = Annotated[Text, Field(min_length=1, max_length=200)]


class GenerationOptions(StrictModel):
    """Optional generation settings; the server's and the model's defaults fill the rest."""

    width: int | None = _copy_field("width")
    height: int | None = _copy_field("height")
    num_frames: int | None = _copy_field("frames")
    fps: float | None = _copy_field("fps")
    crf: int | None = _copy_field("crf")
    num_inference_steps: int | None = _copy_field("steps")
    guidance_scale: float | None = _copy_field("guidance")
    guidance_scale_2: float | None = _copy_field("guidance_2")
    flow_shift: float | None = _copy_field("shift")
    seed: int | None = _copy_field("seed")
    negative_prompt: Prompt | None = _copy_field("negative_prompt")
    preset: Literal["faithful", "balanced", "creative"] | None = field(None, "Noise and alpha in one word.")
    lora_alpha: float | None = _copy_field("alpha")
    lora_alpha_2: float | None = _copy_field("alpha_2")
    window: int | None = _copy_field("window")
    overlap: int | None = _copy_field("overlap")
    noise_multiplier: Multiplier | None = field(None, "Noise multiplier of all that has none of its own.")
    noise_multipliers: Listed | Annotated[list[Multiplier], Field(max_length=512)] | None = field(
        None, 'One for each place: "0,0.2", or a list.'
    )
    cond_positions: Listed | Annotated[list[PositionField], Field(max_length=512)] | None = field(
        None, 'Where the pictures go, or which latent frames of a video are kept: "0,20", "0,1.5s,last", or a list.'
    )
    lora: LoraName | LoraChoice | Annotated[list[LoraName], Field(max_length=8)] | None = field(
        None, "LoRA by a name that the operator offers, instead of the model's own."
    )
    fit: Literal["crop", "letterbox", "stretch"] | None = field(None, "How pictures of another shape are fitted.")
    encode: Literal["single", "repeat"] | None = field(None, "How pictures after the first frame are encoded.")
    exact: bool | None = field(
        None,
        "Compute every frame at every step, those too that are kept as they are or finished: slower, and hardly "
        "another video.",
    )
    fast: bool | None = field(
        None,
        "Few steps, with the model's 4-step LoRA: its steps, guidance and shift, where none are given.",
        unset="false",
    )
    guidance_start: float | None = _copy_field("guidance_start")
    guidance_stop: float | None = _copy_field("guidance_stop")
    step_cache: Literal["none", "first_block"] | None = _copy_field("step_cache")
    metadata: Metadata | None = field(
        None,
        "How much the video tells of itself: full (the request and small inputs), minimal (made with AI, the model, "
        "the version) or off; at most what the operator allows.",
        unset="the operator's",
    )
    schedule: Text | None = _copy_field("schedule")
    prompts: (
        Annotated[Text, Field(max_length=100_000)] | Annotated[list[Prompt], Field(max_length=MAX_PROMPTS)] | None
    ) = field(
        None,
        "Prompts of a long video, instead of the one prompt: one for each window, or each from a time on (0s: a rocket "
        "stands); a list, or a text with a line for each.",
    )
    draft: bool | None = field(
        None,
        "Make a draft: half the model's size and few steps, unless they are given; /final makes the clip from it.",
    )


class FinalVideo(StrictModel):
    """``POST /v1/videos/{id}/final``."""

    noise_multiplier: Multiplier | None = field(
        None, "How far the final may depart from the draft: 0 keeps it blurred, 1 ignores it.", unset=f"{FINAL_NOISE:g}"
    )
    size: Annotated[str, Field(pattern=SIZE_PATTERN)] | None = field(
        None, "WIDTHxHEIGHT in pixels.", unset="the model's, or twice the draft's"
    )
    num_inference_steps: int | None = field(
        None, "Denoising steps.", unset="the model's times noise_multiplier", ge=1, le=200
    )


class CreateVideo(GenerationOptions):
    """``POST /v1/videos``."""

    prompt: Prompt = field("", "What the video shows.")
    model: Annotated[Text, Field(min_length=1, max_length=200)] | None = field(
        None, "A name from /v1/models.", unset="the server's"
    )
    seconds: Seconds | None = field(None, "Length; num_frames wins over it.", unit="seconds", unset="the model's")
    size: Annotated[str, Field(pattern=SIZE_PATTERN)] | None = field(
        None, "WIDTHxHEIGHT in pixels; rounded to multiples of 16. width and height win over it."
    )
    task: Literal["generate", "extend", "transition", "loop"] = _copy_field("task")
    priority: int | None = field(None, "Higher goes first; with API keys 0 or less.", unset="0", ge=-100, le=100)
    input_reference: Reference | None = field(
        None, "Pictures (the first frame, or first and last, or wherever cond_positions or keyframes say) or a video."
    )
    draft_reference: AnyReference | None = field(
        None, "The draft that this is the final of: a video of a draft. /v1/videos/{id}/final fills in the rest itself."
    )
    draft_noise_multiplier: Multiplier | None = field(
        None, "How far the final may depart from the draft.", unset=f"{FINAL_NOISE:g}"
    )
    image_reference: Reference | None = field(None, "As input_reference; vLLM-Omni's name.")
    video_reference: Reference | None = field(None, "As input_reference; vLLM-Omni's name.")
    keyframes: list[KeyframeInput] | None = field(
        None, 'Pictures at places. In forms one JSON string: [{"frame": 80, "file": 0, "noise": 0.2}].', max_length=64
    )
    batch: BatchName | None = field(None, "Your own name for videos that belong together, such as variants.")
    extra_params: GenerationOptions | None = field(
        None, "More of these fields, as vLLM-Omni sends them; fields outside win."
    )


class RemixVideo(StrictModel):
    """``POST /v1/videos/{id}/remix``."""

    prompt: Annotated[Text, Field(min_length=1, max_length=MAX_PROMPT_CHARACTERS)] = field(
        ..., "What the new video shows."
    )


class ExtendVideo(GenerationOptions):
    """``POST /v1/videos/extensions``."""

    prompt: Prompt = field("", "What happens next.")
    model: Annotated[Text, Field(min_length=1, max_length=200)] | None = field(
        None, "A name from /v1/models.", unset="the video's own, or the server's"
    )
    seconds: Seconds | None = field(None, "Length of what is added.", unit="seconds", unset="the model's")
    size: Annotated[str, Field(pattern=SIZE_PATTERN)] | None = field(None, "WIDTHxHEIGHT in pixels.")
    video: AnyVideo | None = field(None, "A finished video's id, a file, or the id of one.")
    extra_params: GenerationOptions | None = field(None, "More of these fields; fields outside win.")


class EditVideo(GenerationOptions):
    """``POST /v1/videos/edits``: one video is made again after the prompt, two are joined by a transition."""

    prompt: Prompt = field("", "What the video shows.")
    model: Annotated[Text, Field(min_length=1, max_length=200)] | None = field(
        None, "A name from /v1/models.", unset="the video's own, or the server's"
    )
    seconds: Seconds | None = field(None, "Length.", unit="seconds", unset="the video's, or the model's")
    size: Annotated[str, Field(pattern=SIZE_PATTERN)] | None = field(None, "WIDTHxHEIGHT in pixels.")
    video: AnyVideo | Annotated[list[AnyVideo], Field(max_length=64)] | None = field(
        None, "One or two finished videos' ids, files, or the ids of these."
    )
    extra_params: GenerationOptions | None = field(None, "More of these fields; fields outside win.")


# ---- responses -------------------------------------------------------------------------------------------------------


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None
    values: dict[str, Any] = Field(description="What fills the text of the code in another language.")


class ErrorEnvelope(BaseModel):
    error: ErrorDetail


class VideoError(BaseModel):
    code: str
    message: str
    values: dict[str, Any] = Field({}, description="What the message of the code says beside it.")


class VideoObject(BaseModel):
    """A job in OpenAI's format; the fields after `error` are ours."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int = Field(ge=0, le=100)
    created_at: int
    created_at_ms: int = Field(description="In milliseconds: of one key's videos no two have the same.")
    completed_at: int | None = None
    expires_at: int | None = None
    prompt: str | None = None
    remixed_from_video_id: str | None = None
    seconds: str
    size: str
    error: VideoError | None = None
    stage: str = ""
    step: int = 0
    steps: int = 0
    seconds_left: float | None = None
    queue_position: int | None = None
    notes: list[str] = []
    plan: str | None = None
    seed: int | None = None
    inference_time_s: float | None = None
    stage_durations: dict[str, float] = {}
    peak_memory_mb: float | None = None
    task: str = "generate"
    draft: bool = False
    batch: str | None = None
    favourite: bool = False
    source: str = Field("api", description="Where it was asked for: api or studio.")
    inputs: int = Field(0, description="How many files it is made from: `input` of /frame counts them from 0.")
    cancel_requested: bool = Field(False, description="It runs, and ends after its current step.")
    has: list[str] = Field([], description="The kinds of its files, such as video and thumbnail.")
    note_details: list[dict[str, Any]] = Field([], description="The notes as code, values and message.")


class Reason(BaseModel):
    """Say why something does not work, as an error of that code does."""

    code: str
    message: str
    values: dict[str, Any] = Field(description="What fills the text of the code in another language.")


class VideoEstimate(BaseModel):
    """Tell what a request would need. Without a plan no worker has reported its machine, or the model has none."""

    object: Literal["video.estimate"] = "video.estimate"
    model: str
    size: str
    num_frames: int
    num_inference_steps: int = Field(description="Of all windows of a long video.")
    windows: int
    tokens: int = Field(description="Of the transformer's input, in one window.")
    plan: str | None = Field(description="How the model runs, in one line.")
    gpu_peak_bytes: dict[str, int] = Field(description="The most that a card holds, by stage.")
    ram_peak_bytes: int | None
    seconds: float | None = Field(description="From earlier videos of as many tokens; null before the first one.")
    problem: str | None = Field(description="Why it would be refused.")
    problem_detail: Reason | None = Field(description="The same as code, values and message.")
    notes: list[str]


class VideoList(BaseModel):
    object: Literal["list"] = "list"
    data: list[VideoObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoDeleted(BaseModel):
    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True
    undo_until: int | None = Field(None, description="Until when it can be restored; null: it is gone.")


class Health(BaseModel):
    status: Literal["ok"] = "ok"
    version: str


class Ready(BaseModel):
    """State of the workers; `stage` and `percent` tell how far the model is loaded, jobs are accepted meanwhile.

    `ranks` counts the processes of all workers that hold the model, or load it.
    """

    ready: bool
    stage: str
    percent: float
    model: str
    message: str
    queued: int
    running: int
    workers: int
    ranks: int
    error: Reason | None = Field(None, description="Why the model cannot be loaded.")


def video_from_job(job: Job, position: int | None = None) -> VideoObject:
    """Convert a job for clients. Typed clients know four statuses: ``cancelled`` becomes the code of a failure."""
    error = None
    if job.status == "cancelled":
        error = VideoError(code="cancelled", message="it was cancelled", values={})
    elif job.status == "failed":
        message, values = job.error_message or "it failed", job.error_values or {}
        error = VideoError(code=job.error_code or "internal_error", message=message, values=values)
    timings = dict(job.timings)
    return VideoObject(
        id=job.id,
        model=job.model,
        status="failed" if job.status == "cancelled" else job.status,
        progress=100 if job.status == "completed" else max(0, min(99, int(job.progress))),
        created_at=int(job.created_at),
        created_at_ms=round(1000 * job.created_at),
        completed_at=None if job.completed_at is None else int(job.completed_at),
        expires_at=None if job.expires_at is None else int(job.expires_at),
        prompt=job.prompt,
        remixed_from_video_id=job.parent,
        seconds=job.seconds,
        size=job.size,
        error=error,
        stage=job.stage,
        step=job.step,
        steps=job.steps,
        seconds_left=None if job.seconds_left is None else round(job.seconds_left, 1),
        queue_position=position,
        notes=list(job.notes),
        plan=job.plan,
        seed=job.request.get("seed"),
        peak_memory_mb=timings.pop("peak_memory_mb", None),
        stage_durations=timings,
        inference_time_s=round(job.inference_seconds, 4) if timings else None,
        task=job.request.get("task") or "generate",
        draft=bool(job.request.get("draft")),
        batch=job.batch,
        favourite=job.favourite,
        source=job.source,
        inputs=len(job.inputs),
        cancel_requested=job.cancel_requested,
        has=list(job.results),
        note_details=list(job.note_details),
    )


def estimate_response(model: str, request: ResolvedRequest, found: Estimate) -> VideoEstimate:
    """Convert what a request would need for clients."""
    plan = found.plan
    return VideoEstimate(
        model=model,
        size=f"{request.width}x{request.height}",
        num_frames=request.frames,
        num_inference_steps=found.steps,
        windows=found.windows,
        tokens=found.tokens,
        plan=None if plan is None else plan.summary,
        gpu_peak_bytes={} if plan is None else dict(plan.gpu_peak_bytes),
        ram_peak_bytes=None if plan is None else plan.ram_peak_bytes,
        seconds=None if found.seconds is None else round(found.seconds, 2),
        problem=None if plan is None else plan.problem or None,
        problem_detail=None if plan is None or not plan.problem else Reason(**problem_of(plan)),
        notes=[] if plan is None else list(plan.notes),
    )
