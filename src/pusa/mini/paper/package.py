"""Fill a working folder of `pusa eval paper` from a finished model, in place of the recipe's training of two hours."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_model

from pusa import zoo
from pusa.fsutil import replacing
from pusa.mini.recipe.base import TextToVideo
from pusa.mini.recipe.clips import ClipPlan, cache_clips
from pusa.mini.world import pictures
from pusa.mini.world.edition import edition_of
from pusa.mini.world.world import World
from pusa.models.vae import channels_last

CLIPS, HELD_OUT_CLIPS = 1024, 256
_REPORTED_CLIPS = 64  # between two lines of progress


def load_world(cache: Path, frames: int) -> World:
    """Load the world of the embedded model for clips of so many frames; its pictures are fetched if missing."""
    pictures.fetch(cache)
    return World(pictures.load_sprites(cache), pictures.load_photographs(cache), motion_frames=frames - 1)


def fill_from_model(
    model: str | Path,
    work: Path,
    make_world: Callable[[int], World],
    *,
    clips: int = CLIPS,
    held_out: int = HELD_OUT_CLIPS,
    say: Callable[[str], None] = print,
) -> None:
    """Write a model's base and VAE, and clips encoded with it, to `work`; what is there already is kept.

    Args:
        model: the embedded model's name, or a folder that its recipe has made. Its adapter is left out.
        make_world: draws the clips; its argument is the length of a clip in frames.
        clips, held_out: clips to train on, and those of combinations that training never draws.
        say: receives progress, a line at a time.

    Raises:
        ValueError: the model is not one of the small world, or `work` holds another base.
    """
    entry = zoo.find(model)
    if entry is None or entry.folder is None or not entry.words.get("things"):
        raise ValueError(f"--model {model} is none of the small world: give mini, or a folder that its recipe has made")
    report, size = work / "report.json", entry.defaults.width
    before = json.loads(report.read_text()) if report.is_file() else None
    if before is not None and before.get("model") != str(model):
        raise ValueError(f"{work} holds the base of `pusa mini train` or of another model: name another folder")
    work.mkdir(parents=True, exist_ok=True)
    base = TextToVideo.from_folder(entry.folder)
    vae = AutoencoderKLWan.from_pretrained(entry.folder / "vae", torch_dtype=torch.float32)
    config, edition, things = base.transformer.config, edition_of(entry.folder), len(entry.words["things"])
    with replacing(work / "base.safetensors") as part:
        save_model(base, str(part))
    vae.save_pretrained(work / "vae")
    budget = {"heads": config.num_attention_heads, "layers": config.num_layers, "things": edition.span(things)}
    with replacing(report) as part:
        part.write_text(json.dumps({"model": str(model), "budget": budget}, indent=1) + "\n")
    world = make_world(entry.defaults.num_frames).in_edition(edition)
    plan = ClipPlan(clips=clips, size=size, frames=entry.defaults.num_frames, things=things, edition=edition)
    say(f"drawing and encoding {clips} clips, and {held_out} to judge by")
    vae = channels_last(vae.eval().requires_grad_(False))
    for folder, count, is_held_out in (("latents", clips, False), ("held_out", held_out, True)):
        for done in range(_REPORTED_CLIPS, count + _REPORTED_CLIPS, _REPORTED_CLIPS):
            some = replace(plan, clips=min(done, count), held_out=is_held_out)
            cache_clips(vae, world, work / folder, some)
            say(f"{folder}: {some.clips} of {count} clips")
