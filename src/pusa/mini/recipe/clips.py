"""Draw clips of the small world, encode them to latents and cache them for training."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from pusa.fsutil import replacing
from pusa.mini.recipe.loop import precision
from pusa.mini.world.edition import FIRST, Edition
from pusa.mini.world.world import Scenes, World, captions, draw_scenes
from pusa.models.vae import encode_video
from pusa.training.distributed import connect_processes

_SHARD_CLIPS = 64
_DRAWN_PIXELS = 64 * 128**2  # of a frame of all clips that are drawn at once on a card
_WORDINGS = 2
_CAPTION_TOKENS = 40
_SCENES = "scenes."  # before the names of their columns in a file


@dataclass(frozen=True)
class Sample:
    """Hold a batch of B clips for one step.

    Attributes:
        latents: fp32 ``[B, 16, F, h, w]``, normalised.
        mask: the share of each latent pixel that the things cover, fp32 ``[B, F, h, w]`` in 0..1.
        tokens: captions, ``[B, L]``, zeros behind the text.
    """

    latents: Tensor
    mask: Tensor
    tokens: Tensor


class ClipCache:
    """Hold clips as normalised latents, the masks of their things and the tokens of several wordings of their captions.

    Args:
        latents: bf16 ``[N, 16, F, h, w]``.
        mask: uint8 ``[N, F, h, w]``, 255 where a thing covers all of the latent pixel.
        scenes: the scenes that the clips show.
    """

    def __init__(self, latents: Tensor, mask: Tensor, scenes: Scenes) -> None:
        self.latents, self.mask, self.scenes = latents, mask, scenes
        self.tokens = torch.empty(0)

    def __len__(self) -> int:
        return len(self.latents)

    @classmethod
    def cat(cls, caches: Sequence["ClipCache"]) -> "ClipCache":
        """Concatenate caches, whose captions have to be tokenised anew."""
        latents, mask = (torch.cat([vars(clips)[name] for clips in caches]) for name in ("latents", "mask"))
        return cls(latents, mask, Scenes.cat([clips.scenes for clips in caches]))

    def first(self, count: int) -> "ClipCache":
        """Return the first `count` clips."""
        return ClipCache(self.latents[:count], self.mask[:count], self.scenes[:count])

    def to(self, device: torch.device) -> "ClipCache":
        """Copy the clips to the memory of `device`."""
        return ClipCache(self.latents.to(device), self.mask.to(device), self.scenes)

    def tokenise_captions(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Tokenise the captions, so that a training step has nothing to do on the host."""
        generator = torch.Generator().manual_seed(0)
        ways = []
        for _ in range(_WORDINGS):
            wording = torch.randint(10_000, (len(self),), generator=generator)
            texts = captions(replace(self.scenes, wording=wording))
            ways.append(tokenise(tokenizer, texts))
        self.tokens = torch.stack(ways, dim=1).to(self.latents.device)  # [N, wordings, L]

    def sample(self, count: int, frames: int) -> Sample:
        """Draw `count` random clips, cut to their first `frames` latent frames (the VAE is causal)."""
        return self.take(torch.randint(len(self), (count,), device=self.latents.device), frames)

    def take(self, chosen: Tensor, frames: int | None = None) -> Sample:
        """Take the clips number `chosen` ``[B]``, in random wordings, as `sample` does; None: in full length."""
        wording = torch.randint(_WORDINGS, (len(chosen),), device=self.latents.device)
        return Sample(
            self.latents[chosen, :, :frames].float(),
            self.mask[chosen, :frames].float() / 255,
            self.tokens[chosen, wording],
        )


def tokenise(tokenizer: PreTrainedTokenizerFast, texts: list[str], *, length: int = _CAPTION_TOKENS) -> Tensor:
    """Tokenise texts to ids ``[B, length]``, zeros (the padding token) behind each text.

    Bypasses transformers, which takes longer over each text than the tokenizer itself: the recipe for a data-centre GPU
    has half a million texts.

    Raises:
        ValueError: a text has more than `length` tokens.
    """
    tokens = np.zeros((len(texts), length), np.int64)
    for number, encoded in enumerate(tokenizer.backend_tokenizer.encode_batch_fast(texts)):
        if len(encoded.ids) > length:
            raise ValueError(f"a caption has {len(encoded.ids)} tokens, and only {length} are kept: {texts[number]!r}")
        tokens[number, : len(encoded.ids)] = encoded.ids
    return torch.from_numpy(tokens)


@dataclass(frozen=True)
class ClipPlan:
    """Describe the clips of a cache.

    Attributes:
        clips: number of clips, a multiple of the 64 of a shard.
        size: pixels, both ways.
        frames: 4n + 1.
        things: the first ones of the edition's.
        picture_share: share of photographs and painted textures; None: the default of `draw_scenes`.
        held_out: True: combinations that training never draws.
        edition: of the world.
    """

    clips: int
    size: int
    frames: int
    things: int
    picture_share: float | None = None
    held_out: bool = False
    edition: Edition = FIRST

    @property
    def shards(self) -> int:
        return -(-self.clips // _SHARD_CLIPS)

    def scenes(self, shard: int) -> Scenes:
        """Draw the scenes of 64 clips, always the same for a shard."""
        return self.draw(_SHARD_CLIPS, 1_000_000 + shard)

    def draw(self, count: int, seed: int) -> Scenes:
        """Draw `count` scenes of this kind."""
        return draw_scenes(
            count,
            seed,
            things=self.things,
            held_out=self.held_out,
            picture_share=self.picture_share,
            edition=self.edition,
        )


def draw_clips(vae: AutoencoderKLWan, world: World, plan: ClipPlan, *, deadline: float | None = None) -> ClipCache:
    """Draw and encode clips in the memory of the world's device, without files.

    Args:
        vae: on the device.
        deadline: end in `time.monotonic` time; the clips drawn by then are returned, at least 64.
    """
    on_card = world.device.type != "cpu"
    together = max(1, _DRAWN_PIXELS // (_SHARD_CLIPS * plan.size**2)) if on_card else 1  # shards
    parts: list[ClipCache] = []
    for first in range(0, plan.shards, together):
        scenes = Scenes.cat([plan.scenes(shard) for shard in range(first, min(first + together, plan.shards))])
        parts.append(encode_scenes(vae, world, plan, scenes, batch=len(scenes) if on_card else 8))
        # The host runs ahead of the device; every so often it has to wait for it to know the time.
        if deadline is not None and len(parts) % 8 == 0:
            _synchronise(world.device)
        if deadline is not None and time.monotonic() > deadline:
            break
    return ClipCache.cat(parts)


def cache_clips(vae: AutoencoderKLWan, world: World, folder: Path, plan: ClipPlan) -> ClipCache:
    """Draw and encode clips into `folder`, 64 a file; processes share the work, and existing files are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    processes = connect_processes()
    for shard in range(processes.rank, plan.shards, processes.world):
        path = folder / f"{shard:04d}.safetensors"
        if path.exists():
            continue
        scenes = plan.scenes(shard)
        write_clips(path, encode_scenes(vae, world, plan, scenes, batch=8))
    processes.wait()
    return load_latents(folder, things=plan.things, held_out=plan.held_out, shards=plan.shards)


def load_latents(folder: Path, *, things: int, held_out: bool = False, shards: int | None = None) -> ClipCache:
    """Load clips that `cache_clips` has written to `folder`: the first `shards` files; None: all.

    Args:
        things, held_out: as drawn, for files of the first edition, which do not hold their scenes.

    Raises:
        FileNotFoundError: a file is missing.
    """
    count = len(list(folder.glob("*.safetensors"))) if shards is None else shards
    if not count:
        raise FileNotFoundError(f"{folder} holds no latents")
    plan = ClipPlan(clips=0, size=0, frames=0, things=things, held_out=held_out)
    return ClipCache.cat(
        [read_clips(folder / f"{shard:04d}.safetensors", partial(plan.scenes, shard)) for shard in range(count)]
    )


def write_clips(path: Path, clips: ClipCache) -> None:
    """Write clips and their scenes to a file."""
    drawn = {f"{_SCENES}{name}": column.contiguous() for name, column in vars(clips.scenes).items()}
    with replacing(path) as part:
        save_file({"latents": clips.latents.cpu(), "mask": clips.mask.cpu(), **drawn}, part)


def read_clips(path: Path, draw: Callable[[], Scenes] | None = None) -> ClipCache:
    """Read what `write_clips` has written.

    Args:
        draw: draws the scenes for a file of the first edition, which does not hold them.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it holds no scenes, and none can be drawn.
    """
    tensors = load_file(path)
    latents = tensors["latents"]
    mask = tensors.get("mask", latents.new_zeros(latents[:, 0].shape, dtype=torch.uint8))
    drawn = {name.removeprefix(_SCENES): column for name, column in tensors.items() if name.startswith(_SCENES)}
    if not drawn and draw is None:
        raise ValueError(f"{path} holds no scenes: remove it, to draw and encode its clips anew")
    return ClipCache(latents, mask, Scenes(**drawn) if drawn or draw is None else draw())


def encode_scenes(vae: AutoencoderKLWan, world: World, plan: ClipPlan, scenes: Scenes, *, batch: int) -> ClipCache:
    """Draw clips of scenes and encode them."""
    latents, masks = [], []
    for first in range(0, len(scenes), batch):
        video, alpha = world.render(scenes[first : first + batch], plan.frames, size=plan.size)
        with precision(world.device):
            latents.append(encode_video(vae, video).bfloat16())
        masks.append(latent_mask(alpha))
    return ClipCache(torch.cat(latents).contiguous(), torch.cat(masks).contiguous(), scenes)


def latent_mask(alpha: Tensor) -> Tensor:
    """Average alpha ``[B, 1, 4F - 3, H, W]`` over the pixels and frames of a latent pixel: uint8 ``[B, F, h, w]``."""
    small = F.avg_pool3d(alpha, (1, 8, 8))
    rest = F.avg_pool3d(small[:, :, 1:], (4, 1, 1)) if alpha.shape[2] > 1 else small[:, :, 1:]
    return (255 * torch.cat([small[:, :, :1], rest], dim=2)[:, 0]).round().to(torch.uint8)


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
