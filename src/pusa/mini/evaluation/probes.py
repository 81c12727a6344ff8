"""Train small classifiers of clips of the small world; their features also compare sets of clips.

The frame probe classifies the thing and the place of single frames. It is trained on reconstructions by the VAE and on
drawn frames, with colours shifted, rotated and removed: colour alone is of little use, so it learns shape. Unknown
things and no thing at all are one more class, so that a blob need not be a known thing. The motion probe classifies the
motion of the thing and of the camera from a few small frames of a whole clip.
"""

import copy
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pusa.mini.recipe.loop import precision
from pusa.mini.recipe.muon import ConvMuon
from pusa.mini.world.columns import Columns
from pusa.mini.world.scenery import PLACES
from pusa.mini.world.vocabulary import CAMERAS, MOTIONS, THINGS
from pusa.mini.world.world import TEXTURE, Scenes, World, draw_scenes
from pusa.models.vae import decode_video, encode_video
from pusa.training.model import without

logger = logging.getLogger(__name__)

FRAME_SIZE, MOTION_SIZE = 64, 48  # pixels that the probes see, whatever the size of the clip
MOTION_FRAMES, CLASSIFIED_FRAMES = 9, 5  # frames of a clip that the motion probe and the frame probe see
_FEATURES = 64
_BATCH = 64


class FrameProbe(nn.Module):
    """Map frames ``[N, 3, 64, 64]`` in -1..1 to features ``[N, 64]``, things ``[N, T + 1]``, places ``[N, P + 1]``.

    The last thing is another one or none, the last place a picture.
    """

    def __init__(self, things: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_conv(3, 32, 5), *_conv(32, 64, 3), *_conv(64, 128, 3), *_conv(128, 128, 3, stride=1)
        )
        self.features = nn.Linear(2 * 128, _FEATURES)
        self.thing = nn.Linear(_FEATURES, things + 1)
        self.place = nn.Linear(_FEATURES, len(PLACES) + 1)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.features(_pool(self.body(frames.contiguous(memory_format=torch.channels_last))))
        return features, self.thing(F.relu(features)), self.place(F.relu(features))


class MotionProbe(nn.Module):
    """Map clips ``[N, 9, 3, 48, 48]`` in -1..1 to features ``[N, 64]``, motions ``[N, 12]``, cameras ``[N, 5]``."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_conv(3 * MOTION_FRAMES, 96, 5), *_conv(96, 128, 3), *_conv(128, 128, 3), *_conv(128, 128, 3, stride=1)
        )
        self.features = nn.Linear(2 * 128, _FEATURES)
        self.motion = nn.Linear(_FEATURES, len(MOTIONS))
        self.camera = nn.Linear(_FEATURES, len(CAMERAS))

    def forward(self, clips: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        stacked = clips.flatten(1, 2).contiguous(memory_format=torch.channels_last)  # [N, 27, 48, 48]
        features = self.features(_pool(self.body(stacked)))
        return features, self.motion(F.relu(features)), self.camera(F.relu(features))


def _conv(before: int, after: int, kernel: int, stride: int = 2) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(inplace=True),
    )


def _pool(maps: Tensor) -> Tensor:
    return torch.cat([maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))], dim=1)


# ---- judging ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Predictions(Columns):
    """Hold the probabilities that the probes predict for B clips, and features ``[B, 128]``.

    `things` is ``[B, L, T + 1]`` for each of L frames, `places` ``[B, P + 1]``, `motions` and `cameras` of the clip.
    """

    things: Tensor
    places: Tensor
    motions: Tensor
    cameras: Tensor
    features: Tensor

    @property
    def thing(self) -> Tensor:
        """Return the likeliest thing of each clip, ``[B]``; `things` itself stands for another one or none."""
        return self.things.mean(dim=1).argmax(dim=1)

    @property
    def place(self) -> Tensor:
        return self.places.argmax(dim=1)

    @property
    def motion(self) -> Tensor:
        return self.motions.argmax(dim=1)

    @property
    def direction(self) -> Tensor:
        """Return the likeliest of left, right, up and down, ``[B]`` indices into `MOTIONS`."""
        return DIRECTIONS[self.motions[:, DIRECTIONS].argmax(dim=1)]

    @property
    def camera(self) -> Tensor:
        return self.cameras.argmax(dim=1)


DIRECTIONS = torch.tensor([list(MOTIONS).index(name) for name in ("left", "right", "up", "down")])


class Probes:
    """Classify clips by the two trained probes; `things` is how many of `THINGS` they know."""

    def __init__(self, frame: FrameProbe, motion: MotionProbe, things: int) -> None:
        self.frame, self.motion, self.things = frame.eval(), motion.eval(), things

    @torch.no_grad()
    def classify_frames(self, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute features, thing and place probabilities of frames ``[N, 3, H, W]`` in -1..1."""
        features, thing, place = self.frame(resize(frames, FRAME_SIZE))
        return features, thing.softmax(1), place.softmax(1)

    @torch.no_grad()
    def classify(self, video: Tensor) -> Predictions:
        """Classify clips ``[B, 3, F, H, W]`` in -1..1, each one whole motion long."""
        chosen = video[:, :, moments(video.shape[2], CLASSIFIED_FRAMES)].float()
        features, things, places = self.classify_frames(chosen.transpose(1, 2).flatten(0, 1))
        per_clip = (len(video), -1)
        moving = video[:, :, moments(video.shape[2], MOTION_FRAMES)].float().transpose(1, 2)  # [B, 9, 3, H, W]
        small = resize(moving.flatten(0, 1), MOTION_SIZE).unflatten(0, (len(video), MOTION_FRAMES))
        motion_features, motions, cameras = self.motion(small)
        return Predictions(
            things=things.unflatten(0, per_clip),
            places=places.unflatten(0, per_clip).mean(1),
            motions=motions.softmax(1),
            cameras=cameras.softmax(1),
            features=torch.cat([features.unflatten(0, per_clip).mean(1), motion_features], dim=1),
        )

    def save(self, path: Path, fingerprint: str) -> None:
        """Write the weights; `fingerprint` identifies what they were trained for."""
        state = {f"{name}.{key}": value for name in ("frame", "motion") for key, value in self._state(name).items()}
        save_file(state, path, {"fingerprint": fingerprint, "things": str(self.things)})

    def _state(self, name: str) -> dict[str, Tensor]:
        return {key: value.contiguous() for key, value in getattr(self, name).state_dict().items()}

    @classmethod
    def load(cls, path: Path, fingerprint: str) -> "Probes | None":
        """Load what `save` wrote; None without such a file, or with another fingerprint."""
        if not path.is_file():
            return None
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        if metadata.get("fingerprint") != fingerprint:
            return None
        things, state = int(metadata["things"]), load_file(path)
        frame, motion = FrameProbe(things), MotionProbe()
        for name, module in (("frame", frame), ("motion", motion)):
            module.load_state_dict({k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(name)})
        return cls(frame, motion, things)


def moments(frames: int, count: int) -> Tensor:
    """Choose `count` of `frames` frames, evenly from the first to the last; of fewer frames some twice."""
    return torch.linspace(0, frames - 1, count, dtype=torch.float64).round().long()


def resize(frames: Tensor, size: int) -> Tensor:
    """Scale frames ``[N, C, H, W]`` to `size` pixels, both ways."""
    if frames.shape[-2:] == (size, size):
        return frames
    return F.interpolate(frames, (size, size), mode="bilinear", antialias=True, align_corners=False)


# ---- training --------------------------------------------------------------------------------------------------------


def train_probes(
    world: World,
    vae: AutoencoderKLWan,
    *,
    things: int = len(THINGS),
    size: int,
    frame_steps: int = 800,
    motion_steps: int = 450,
    seed: int = 1,
) -> Probes:
    """Train both probes; a minute or two on a core at the defaults.

    Args:
        world: what to draw; its `motion_frames` is the length of a clip less one.
        vae: the model's; the frame probe must know how it draws.
        things: the first of `THINGS` are told apart, the others are "another one".
        size: pixels of the model's clips.
        frame_steps, motion_steps: of 64 frames, and of 64 clips.
        seed: of weights, clips and order.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        frame, motion = FrameProbe(things), MotionProbe()
        drawn = _draw_frames(world, things, count=8 * frame_steps, seed=seed)
        reconstructed = _reconstruct_frames(world, vae, things, size, clips=max(8, frame_steps // 4), seed=seed)
        _fit(frame, _frame_losses(frame, drawn, reconstructed), frame_steps, "frame probe")
        clips = _draw_clips(world, count=7 * motion_steps, seed=seed)
        _fit(motion, _motion_losses(motion, *clips), motion_steps, "motion probe")
    return Probes(frame, motion, things)


def _fit(module: nn.Module, losses: Iterator[Tensor], steps: int, name: str) -> None:
    """Train with Muon on the kernels, which is far ahead of AdamW after as few steps."""
    began = time.monotonic()
    kernels = [part.weight for part in module.modules() if isinstance(part, nn.Conv2d)]
    for kernel in kernels:
        kernel.data = kernel.data.contiguous(memory_format=torch.channels_last)
    module.train()
    rest = without(module.parameters(), kernels)
    optimizers: list[tuple[torch.optim.Optimizer, float]] = [
        (ConvMuon(kernels, lr=0.02, momentum=0.9, weight_decay=0.0), 0.02),
        (torch.optim.AdamW(rest, lr=4e-3, weight_decay=0.02), 4e-3),
    ]
    loss = torch.zeros(())
    for step in range(steps):
        factor = min(1.0, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * step / steps)) + 1e-3
        for optimizer, rate in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * rate
        module.zero_grad()
        loss = next(losses)
        loss.backward()
        for optimizer, _ in optimizers:
            optimizer.step()
    module.eval()
    logger.info("%s: %d steps in %.0f s, loss %.3f", name, steps, time.monotonic() - began, float(loss.detach()))


@dataclass(frozen=True)
class _Frames(Columns):
    """Hold frames ``[N, 3, 64, 64]`` in -1..1 with thing, place, and True if the thing counts, ``[N]`` each."""

    pixels: Tensor
    thing: Tensor
    place: Tensor
    thing_counts: Tensor


def _render(world: World, scenes: Scenes, things: int, frames: int, size: int, start: int) -> tuple[Tensor, Tensor]:
    """Render a video, and for each of its frames the thing and 1 if it counts in the loss, ``[B, F, 2]``.

    A thing that has faded or left is none, and one that nearly has counts as neither.
    """
    video, alpha = world.render(scenes, frames, size=size, start=start)
    cover = alpha.mean(dim=(1, 3, 4))  # [B, F]
    thing_class = torch.where((scenes.thing >= 0) & (scenes.thing < things), scenes.thing, things)[:, None]
    thing = torch.where(cover < 0.02, things, thing_class)
    counts = ((cover < 0.02) | (cover > 0.06) | (thing_class == things)) & (scenes.second < 0)[:, None]
    return video, torch.stack([thing, counts.long()], dim=2)


def _label(video: Tensor, labels: Tensor, scenes: Scenes) -> _Frames:
    """Flatten video ``[B, 3, F, H, W]`` and labels ``[B, F, 2]`` to labelled frames."""
    pixels = resize(video.transpose(1, 2).flatten(0, 1).float(), FRAME_SIZE)
    place = scenes.place.clamp(max=TEXTURE)[:, None].expand(-1, video.shape[2]).flatten()
    return _Frames(pixels, labels[..., 0].flatten(), place, labels[..., 1].flatten().bool())


def _draw_mixed_scenes(world: World, count: int, seed: int, things: int) -> Scenes:
    """Draw scenes mostly of known things, a fifth of any that the world has."""
    known_scenes, any_scenes = (
        draw_scenes(count, seed, things=things),
        draw_scenes(count, seed + 1, things=world.things),
    )
    any_thing = torch.arange(count) % 5 == 0
    columns = {}
    for name, column in vars(known_scenes).items():
        chosen = any_thing.view(-1, *[1] * (column.ndim - 1))
        columns[name] = torch.where(chosen, vars(any_scenes)[name], column)
    return Scenes(**columns)


def _draw_frames(world: World, things: int, *, count: int, seed: int) -> _Frames:
    """Draw single frames at random moments of clips."""
    parts = []
    for number in range(0, count, 16):
        scenes = _draw_mixed_scenes(world, 16, 500_000_000 + seed + 2 * number, things)
        start = int(torch.randint(0, world.motion_frames + 1, ()))
        parts.append(_label(*_render(world, scenes, things, 1, FRAME_SIZE, start), scenes))
    return _Frames.cat(parts)


@torch.no_grad()
def _reconstruct_frames(
    world: World, vae: AutoencoderKLWan, things: int, size: int, *, clips: int, seed: int
) -> _Frames:
    """Reconstruct short drawn clips by the VAE, half of them from slightly noisy latents, as a model's are."""
    began = time.monotonic()
    parts = []
    for number in range(0, clips, 8):
        scenes = _draw_mixed_scenes(world, 8, 900_000_000 + seed + 2 * number, things)
        start = int(torch.randint(0, max(1, world.motion_frames - 3), ()))
        video, labels = _render(world, scenes, things, 5, size, start)
        latents = encode_video(vae, video)
        latents[::2] += 0.25 * torch.rand(len(latents[::2]), 1, 1, 1, 1) * torch.randn_like(latents[::2])
        rebuilt = decode_video(vae, latents).float()
        parts.append(_label(rebuilt[:, :, ::2], labels[:, ::2], scenes))
    logger.info("%d clips reconstructed in %.0f s", clips, time.monotonic() - began)
    return _Frames.cat(parts)


def _frame_losses(probe: FrameProbe, drawn: _Frames, reconstructed: _Frames) -> Iterator[Tensor]:
    """Yield losses of batches, a third of whose frames is reconstructed."""
    while True:
        some = [
            pool[torch.randint(len(pool), (count,))]
            for pool, count in ((reconstructed, _BATCH // 3), (drawn, _BATCH - _BATCH // 3))
        ]
        batch = _Frames.cat(some)
        pixels, hue_is_true = recolour(_shift(batch.pixels, 6))
        with precision(torch.device("cpu")):
            _, thing, place = probe(degrade(pixels))
        thing_loss = F.cross_entropy(thing.float(), batch.thing, reduction="none", label_smoothing=0.05)
        place_loss = F.cross_entropy(place.float(), batch.place, reduction="none", label_smoothing=0.05)
        yield (thing_loss * batch.thing_counts).mean() + 0.4 * (place_loss * hue_is_true).mean()


def _draw_clips(world: World, *, count: int, seed: int) -> tuple[Tensor, Scenes]:
    """Draw clips of any things at the moments that the motion probe sees: uint8 ``[N, 9, 3, 48, 48]``."""
    coarse = copy.copy(world)
    coarse.motion_frames = MOTION_FRAMES - 1
    scenes = draw_scenes(count, 700_000_000 + seed, things=world.things)
    parts = []
    for first in range(0, count, 32):
        video, _ = coarse.render(scenes[first : first + 32], MOTION_FRAMES, size=MOTION_SIZE)
        parts.append((video.transpose(1, 2) * 127.5 + 127.5).round().to(torch.uint8))
    return torch.cat(parts), scenes


def _motion_losses(probe: MotionProbe, clips: Tensor, scenes: Scenes) -> Iterator[Tensor]:
    """Yield losses of batches, half of whose clips are mirrored, which swaps left and right."""
    other_motion, other_camera = (mirror_indices(list(names)) for names in (MOTIONS, CAMERAS))
    moves = (scenes.thing >= 0) & (scenes.second < 0)
    while True:
        chosen = torch.randint(len(clips), (_BATCH,))
        frames, motion, camera = clips[chosen].float() / 127.5 - 1, scenes.motion[chosen], scenes.camera[chosen]
        mirrored = torch.rand(_BATCH) < 0.5
        frames = torch.where(mirrored.view(-1, 1, 1, 1, 1), frames.flip(-1), frames)
        motion = torch.where(mirrored, other_motion[motion], motion)
        camera = torch.where(mirrored, other_camera[camera], camera)
        frames = recolour(frames)[0]
        with precision(torch.device("cpu")):
            _, motions, cameras = probe(degrade(frames.flatten(0, 1)).unflatten(0, (_BATCH, MOTION_FRAMES)))
        motion_loss = F.cross_entropy(motions.float(), motion, reduction="none", label_smoothing=0.05)
        camera_loss = F.cross_entropy(cameras.float(), camera, label_smoothing=0.05)
        yield (motion_loss * moves[chosen]).mean() + 0.5 * camera_loss


def mirror_indices(names: list[str]) -> Tensor:
    """Map each name to the index of its mirror image."""
    other = {"left": "right", "right": "left"}
    return torch.tensor([names.index(other.get(name, name)) for name in names])


def _shift(pictures: Tensor, most: int) -> Tensor:
    """Shift all pictures by the same random offset of at most `most` pixels."""
    size = pictures.shape[-1]
    padded = F.pad(pictures, (most, most, most, most), mode="reflect")
    top, left = torch.randint(0, 2 * most + 1, (2,)).tolist()
    return padded[..., top : top + size, left : left + size]


# ---- distortions -----------------------------------------------------------------------------------------------------


def rotate_hue(pictures: Tensor, angle: Tensor) -> Tensor:
    """Rotate hues about the grey axis: pictures ``[N, ..., 3, H, W]`` by angles ``[N]`` in radians."""
    cos, sin = torch.cos(angle), torch.sin(angle)
    third, root = (1 - cos) / 3, sin / math.sqrt(3)
    near, left, right = cos + third, third - root, third + root
    matrix = torch.stack([near, left, right, right, near, left, left, right, near], dim=1).view(-1, 3, 3)
    return torch.einsum("nij,n...jhw->n...ihw", matrix, pictures)


def to_grey(pictures: Tensor) -> Tensor:
    """Replace pictures ``[..., 3, H, W]`` by their luminance in all channels."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=pictures.device)
    return torch.einsum("c,...chw->...hw", weights, pictures).unsqueeze(-3).expand_as(pictures)


def recolour(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Change colours of pictures ``[N, ..., 3, H, W]`` at random; also return True for those of true hue, ``[N]``."""
    count = len(pictures)
    wide = (count, *[1] * (pictures.ndim - 1))
    channels = (count, *[1] * (pictures.ndim - 4), 3, 1, 1)
    kind = torch.rand(count)
    rotated, is_grey = kind < 0.35, kind > 0.75
    angle = torch.where(rotated, 2 * math.pi * torch.rand(count), 0.3 * (torch.rand(count) - 0.5))
    pictures = rotate_hue(pictures, angle)
    pictures = torch.where(is_grey.view(wide), to_grey(pictures), pictures)
    gain = (0.75 + 0.5 * torch.rand(wide)) * (0.9 + 0.2 * torch.rand(channels))
    return (pictures * gain + 0.4 * (torch.rand(wide) - 0.5)).clamp(-1, 1), ~rotated


def degrade(pictures: Tensor) -> Tensor:
    """Blur some of the pictures ``[N, 3, H, W]`` and add noise to some."""
    count, _, height, width = pictures.shape
    factor = float(torch.empty(()).uniform_(0.4, 0.9))
    small = F.interpolate(pictures, scale_factor=factor, mode="bilinear", antialias=True, align_corners=False)
    blurred = F.interpolate(small, (height, width), mode="bilinear", align_corners=False)
    pictures = torch.where(torch.rand(count, 1, 1, 1) < 0.3, blurred, pictures)
    strength = 0.12 * torch.rand(count, 1, 1, 1) * (torch.rand(count, 1, 1, 1) < 0.3)
    return pictures + strength * torch.randn_like(pictures)


DISTORTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "grey": lambda video: to_grey(video.transpose(1, 2)).transpose(1, 2),
    "hue turned by a third": lambda video: rotate_hue(
        video.transpose(1, 2), torch.full((len(video),), 2 * math.pi / 3)
    ).transpose(1, 2),
}
"""Distortions that the probes are measured under: videos to videos, ``[B, 3, F, H, W]``."""
