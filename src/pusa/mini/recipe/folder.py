"""Write the model folder that the recipe produces, and the report of its stages."""

import copy
import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from transformers import PreTrainedTokenizerFast

from pusa.mini.recipe.base import MAX_SEQUENCE_LENGTH, SHIFT, BaseObjective, TextToVideo
from pusa.mini.recipe.clips import ClipPlan
from pusa.mini.recipe.samples import ALPHA, FAST_GUIDANCE, FAST_STEPS, GUIDANCE, STEPS
from pusa.mini.world.edition import FIRST, Edition
from pusa.mini.world.vocabulary import MOTIONS
from pusa.pipeline import PusaPipeline
from pusa.scheduler import PusaFlowMatchEulerScheduler

logger = logging.getLogger(__name__)

LORA_FILE = "pusa_lora.safetensors"
_SHARD_SIZE = "13MB"  # no file of a package above 14 MB


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Set the sizes of a model and of the clips that train it.

    Attributes:
        size, small_size: of the clips, in pixels, both ways; training begins with small ones.
        frames: of a clip, 4n + 1.
        things: the transformer learns so many, the first ones of the edition's.
        clips, small_clips: number of clips of each size.
        held_out_clips: number of clips, of combinations never trained on, that measure the loss.
        sweep_clips: number of clips for each alpha that is tried.
        edition: of the world that the clips show.
    """

    size: int
    small_size: int
    frames: int
    things: int
    heads: int
    layers: int
    head_channels: int = 32
    clips: int
    small_clips: int
    objective: BaseObjective = field(default_factory=BaseObjective)
    held_out_clips: int = 128
    sweep_clips: int = 8
    edition: Edition = FIRST

    def make_base(self, tokenizer: PreTrainedTokenizerFast | None = None) -> TextToVideo:
        """Make the transformer and text encoder with random weights; without a tokenizer, learn one."""
        return TextToVideo(heads=self.heads, layers=self.layers, head_channels=self.head_channels, tokenizer=tokenizer)

    def clip_plan(self, picture_share: float | None = None) -> ClipPlan:
        """Plan the clips of the full size."""
        return ClipPlan(
            clips=self.clips,
            size=self.size,
            frames=self.frames,
            things=self.things,
            picture_share=picture_share,
            edition=self.edition,
        )


class Report:
    """Keep the measurements of the stages as JSON in the working folder, for the card and the documentation."""

    def __init__(self, path: Path, budget: Any) -> None:
        self.path = path
        self.content = json.loads(path.read_text()) if path.exists() else {"budget": asdict(budget)}

    def __contains__(self, name: str) -> bool:
        return name in self.content

    def add(self, name: str, values: object) -> None:
        self.content[name] = values
        self.path.write_text(json.dumps(self.content, indent=2) + "\n")
        logger.info("%s: %s", name, values)


def write_folder(folder: Path, vae: AutoencoderKLWan, base: TextToVideo, budget: Sizes) -> None:
    """Write a model folder in diffusers layout, bf16, with the defaults of the model in ``pusa.json`` (see `pusa.zoo`).

    Args:
        vae, base: copied; the originals stay on their device.
    """
    base = copy.deepcopy(base).to("cpu")
    pipe = PusaPipeline(
        tokenizer=base.tokenizer,
        text_encoder=base.text_encoder,
        vae=copy.deepcopy(vae).to("cpu"),
        scheduler=PusaFlowMatchEulerScheduler(shift=SHIFT),
        transformer=base.transformer,
    )
    pipe.to(torch.bfloat16, silence_dtype_warnings=True)
    pipe.save_pretrained(folder, max_shard_size=_SHARD_SIZE)
    describe_folder(folder, budget, with_adapter=False)


def describe_folder(folder: Path, budget: Sizes, *, with_adapter: bool) -> None:
    """Write ``pusa.json``; an adapter that it names must be in the folder."""
    seconds = budget.frames / 16
    title = (
        f"embedded model: {budget.things} things, {len(MOTIONS)} motions, {budget.size} pixels, {seconds:.0f} seconds"
    )
    card = {
        "title": title,
        "defaults": {
            "width": budget.size,
            "height": budget.size,
            "num_frames": budget.frames,
            "fps": 16.0,
            "steps": STEPS,
            "guidance": GUIDANCE,
            "shift": SHIFT,
            "alpha": ALPHA,
            "max_sequence_length": MAX_SEQUENCE_LENGTH,
            "negative_prompt": "",
            "encode": "repeat",
            "fast": {"steps": FAST_STEPS, "guidance": FAST_GUIDANCE, "shift": SHIFT},
        },
        **({"lora": {"transformer": LORA_FILE}} if with_adapter else {}),
        "world": budget.edition.name,
        "words": budget.edition.words(budget.things),
    }
    (folder / "pusa.json").write_text(json.dumps(card, indent=2) + "\n")
