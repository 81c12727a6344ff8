"""Turn the suite's prompts into the items of a run, and check its videos before they are scored."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pusa import zoo
from pusa.evaluation.runs.folder import Problem, RunFolder
from pusa.evaluation.runs.items import Item, seed_of
from pusa.evaluation.vbench.suite import (
    VIDEOS_PER_PROMPT,
    Suite,
    SuitePrompt,
    choose_prompts,
    nearest_ratio,
    parse_ratio,
)
from pusa.evaluation.vbench.totals import DIMENSIONS
from pusa.request import ConditionSpec, GenerationRequest, Position, placeholder_request
from pusa.request.generation import DEFAULT_MODEL

SUITE = "vbench"

_CRF = 10  # as the suite's README writes its videos


def prepare(
    folder: Path,
    suite: Suite,
    request: GenerationRequest,
    *,
    dimensions: Collection[str] = tuple(DIMENSIONS),
    ratio: str | None = None,
    per_prompt: int = VIDEOS_PER_PROMPT,
    count: int | None = None,
    noise: float = 0.0,
    seed: int = 0,
) -> RunFolder:
    """Make the folder of a run, or open it if it is there with the same settings.

    Args:
        request: model and settings of all videos. Its prompt, conditions and seed are not used. Size, length and rate
            that it leaves open become the model's, and its CRF becomes 10 unless it is set.
        dimensions: that are to be scored: prompts that count for none of them are left out.
        ratio: folder of cropped images; None: the nearest to the size.
        per_prompt: videos of each prompt; the suite scores 5.
        count: prompts of each kind at most, see `choose_prompts`.
        noise: noise multiplier of the first frame, 0..1; the paper's runs keep it clean.
        seed: that the seeds of all videos are derived from, with the prompt and the number of the video.

    Raises:
        FileNotFoundError: the images are missing, see `Suite.find_images`.
        ValueError: a number is out of range, the model cannot make such videos, or the folder holds another run.
    """
    if per_prompt < 1:
        raise ValueError(f"per_prompt={per_prompt} is below 1")
    if not 0 <= noise <= 1:
        raise ValueError(f"noise={noise:g} is outside 0..1")
    prompts = choose_prompts(suite.prompts, dimensions, count)
    scored = [name for name in DIMENSIONS if name in dimensions]
    request, size = _with_size(request)
    ratio = ratio or nearest_ratio(*size)
    parse_ratio(ratio)
    images = suite.find_images(ratio, prompts)
    items = [
        _item(request, prompt, index, images[prompt.image], scored, noise=noise, seed=seed)
        for prompt in prompts
        for index in range(per_prompt)
    ]
    items[0].request.resolved(zoo.defaults_of(request.model))  # refuses what the model cannot make
    settings = {
        "dimensions": scored,
        "ratio": ratio,
        "per_prompt": per_prompt,
        "prompts_per_kind": count,
        "noise": noise,
        "seed": seed,
        "suite_sha256": suite.sha256,
        "request": request.model_dump(mode="json", exclude_defaults=True, exclude={"prompt", "conditions", "seed"}),
    }
    return RunFolder.create(folder, SUITE, settings, items)


def request_with(fields: Mapping[str, Any]) -> GenerationRequest:
    """Make the request that `prepare` takes from the settings of all videos. Raises pydantic's ValidationError."""
    model = fields.get("model", DEFAULT_MODEL)
    return placeholder_request(zoo.defaults_of(model), **{**fields, "model": model})


def _with_size(request: GenerationRequest) -> tuple[GenerationRequest, tuple[int, int]]:
    """Set what scores depend on and a request may leave open: size, length and rate to the model's, CRF to 10."""
    defaults = zoo.defaults_of(request.model)
    placeholder = {"prompt": defaults.placeholder_prompt, "conditions": [], "seed": 0}
    resolved = request.model_copy(update=placeholder).resolved(defaults)
    values: dict[str, Any] = {name: getattr(resolved, name) for name in ("width", "height", "frames", "fps")}
    if "crf" not in request.model_fields_set:
        values["crf"] = _CRF
    return request.model_copy(update=values), (resolved.width, resolved.height)


def _item(
    request: GenerationRequest,
    prompt: SuitePrompt,
    index: int,
    image: Path,
    scored: Sequence[str],
    *,
    noise: float,
    seed: int,
) -> Item:
    condition = ConditionSpec(kind="image", file=str(image), positions=[Position("latent", 0)], noise=[noise])
    values = {"prompt": prompt.text, "conditions": [condition], "seed": seed_of(seed, prompt.text, index)}
    labels = {
        "prompt": prompt.text,
        "index": index,
        "dimensions": [name for name in prompt.dimensions if name in scored],
        "image": prompt.image,
    }
    return Item(f"{prompt.text}-{index}", request.model_copy(update=values), labels)


def check_videos(run: RunFolder) -> list[Problem]:
    """Check that a run is ready to be scored: every video is there and sound, and no other file is beside them.

    The suite means over the videos that it finds, and takes the suffix of all from the first: a missing video would be
    left out, and a foreign one could hide all.
    """
    names = {run.video_of(item).name for item in run.items}
    strays = sorted(path.name for path in run.videos.iterdir() if path.name not in names)
    return run.problems() + [Problem(name, "it is no video of the run: move it elsewhere") for name in strays]
