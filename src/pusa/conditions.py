"""Conditions: what is known of a video, where it goes and how far the model may depart from it.

A person says "this picture at 1.5 seconds"; the sampler needs latents and a noise multiplier per latent frame. Latent
frame 0 is frame 0 of the video, every later one is four frames: 81 frames are latent frames 0..20.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal, SupportsIndex

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from pusa.numerals import check_noise_multiplier
from pusa.positions import Index, latent_frames, latent_index_of

logger = logging.getLogger(__name__)

Fit = Literal["crop", "letterbox", "stretch"]


@dataclass(frozen=True, kw_only=True)
class PusaCondition:
    """Something known, its place in the clip, and its noise.

    Exactly one of:
        image: PIL image, uint8 or 0..1 float array ``[H, W, 3 or 4]``, or tensor ``[3, H, W]`` (uint8 or 0..1).
        video: a sequence of such images, an array ``[n, H, W, 3]`` or a tensor ``[n, 3, H, W]``.
        latents: ``[C, f, h, w]``, encoded and normalised already, of the clip's own latent size.

    At most one of (nothing: the beginning):
        latent_index: latent frame; the original's unit. A list places the latent frames of a video at their own places
            (as the original's video-to-video does: index 3 of the video is index 3 of the clip), and those of
            `latents` one by one. One index is where the first of them goes, the others follow.
        frame_index: frame number.
        seconds: time, by the frame rate given to the pipeline.
        Each counts from the end when negative, and may be ``"last"``.

    Attributes:
        noise_multiplier: 0..1, one number or one per latent frame: the share of the current noise that these frames
            keep while denoising. 0 keeps them exactly; 0.2 lets them change a little and often moves better.
        encode: how pictures at later places become latents. ``"single"``: alone, as the original does, though the place
            stands for four frames. ``"repeat"``: as four static frames with the same frame before them; a video is
            encoded with its first frame before it, so that four frames go to each place. None: images as the
            pipeline's model has it (`pipe.defaults.encode`), videos "single".
        fit: how images become the clip's size: cut to its shape, fit into it on black, or stretch.
    """

    image: Any = None
    video: Any = None
    latents: Tensor | None = None
    latent_index: Index | Sequence[Index] | None = None
    frame_index: Index | None = None
    seconds: float | Literal["last"] | None = None
    noise_multiplier: float | Sequence[float] = 0.0
    encode: Literal["single", "repeat"] | None = None
    fit: Fit = "crop"

    def __post_init__(self) -> None:
        given = [name for name in ("image", "video", "latents") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of image, video and latents, not {' and '.join(given) or 'none'}")
        places = [n for n in ("latent_index", "frame_index", "seconds") if getattr(self, n) is not None]
        if len(places) > 1:
            raise ValueError(f"give one of latent_index, frame_index and seconds, not {' and '.join(places)}")
        listed = _listed(self)
        if listed == []:
            raise ValueError("latent_index=[] is empty: give a latent frame, or leave it out for the beginning")
        if self.image is not None and listed is not None and len(listed) > 1:
            raise ValueError(f"latent_index={listed} for one image: use one condition per place, or a video")
        for name in ("image", "video"):
            if isinstance(getattr(self, name), str | PathLike):
                raise TypeError(f"{name}={getattr(self, name)!r} is a name: read the file with pusa.media.read_{name}")
        if self.video is not None and not hasattr(self.video, "__len__"):
            raise TypeError(f"a video of type {type(self.video).__name__}: give a list of images, an array or a tensor")
        if self.video is not None and len(self.video) == 0:
            raise ValueError("the video has no frames")
        if self.encode not in (None, "single", "repeat"):
            raise ValueError(f"encode={self.encode!r} is neither 'single' nor 'repeat'")
        if self.fit not in ("crop", "letterbox", "stretch"):
            raise ValueError(f"fit={self.fit!r} is none of 'crop', 'letterbox', 'stretch'")
        for multiplier in _as_list(self.noise_multiplier):
            check_noise_multiplier(multiplier)


def fit_image(image: Any, width: int, height: int, fit: Fit = "crop") -> Image.Image:
    """An RGB image of `width` x `height`: turned as its EXIF data says, transparency on white, resized (Lanczos).

    Args:
        image: as in `PusaCondition`.
        fit: ``crop`` covers and cuts the edges, ``letterbox`` shows all of it on black, ``stretch`` distorts.
    """
    image = ImageOps.exif_transpose(_to_pil(image))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    size, lanczos = (width, height), Image.Resampling.LANCZOS
    if fit == "crop":
        return ImageOps.fit(image, size, lanczos)
    if fit == "letterbox":
        return ImageOps.pad(image, size, lanczos, color="black")
    return image.resize(size, lanczos)


def _to_pil(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] not in (3, 4):
            raise ValueError(f"an image tensor of shape {list(image.shape)}: give [3, H, W]")
        image = image.detach().float().cpu().numpy() if image.is_floating_point() else image.cpu().numpy()
        image = image.transpose(1, 2, 0)
    if not isinstance(image, np.ndarray):
        raise TypeError(f"an image of type {type(image).__name__}: give a PIL image, an array or a tensor")
    if image.ndim != 3 or image.shape[2] not in (3, 4):
        raise ValueError(f"an image array of shape {list(image.shape)}: give [H, W, 3] or [H, W, 4]")
    if image.dtype != np.uint8:
        if not np.issubdtype(image.dtype, np.floating):
            raise TypeError(f"an image of {image.dtype}: give uint8 (0..255) or floats (0..1)")
        if not (image.min() >= 0 and image.max() <= 1):
            raise ValueError(f"an image of floats from {image.min():g} to {image.max():g}: give values in 0..1")
        image = (image * 255).round().astype(np.uint8)
    return Image.fromarray(image)


def _frames_of(condition: PusaCondition) -> list[Any]:
    if condition.image is not None:
        return [condition.image]
    video = condition.video
    if isinstance(video, np.ndarray | Tensor) and video.ndim != 4:
        raise ValueError(f"a video of shape {list(video.shape)}: give [n, H, W, 3], or a tensor [n, 3, H, W]")
    return list(video)


@dataclass(frozen=True)
class Placement:
    """Known latents, fp32 ``[C, F, h, w]``, 0 where free; and noise multipliers ``[F]``, 1 where free."""

    latents: Tensor
    noise_multipliers: Tensor


def place(
    conditions: Sequence[PusaCondition],
    *,
    encode: Callable[[Tensor], Tensor],
    shape: tuple[int, int, int, int],
    num_frames: int,
    height: int,
    width: int,
    fps: float = 16.0,
    factor: int = 4,
) -> Placement:
    """From what is known to latents and noise multipliers per latent frame.

    Args:
        conditions: in any order, each latent frame at most once.
        encode: ``[1, 3, 4n + 1, height, width]`` in -1..1 to normalised latents ``[1, C, n + 1, h, w]``.
        shape: ``(C, F, h, w)`` of the clip's latents.
        num_frames, height, width, fps: of the clip.
        factor: frames per latent frame.

    Raises:
        ValueError: two conditions on one latent frame, a place outside the clip, a video too short for its places, a
            list of multipliers of another length, latents of another size. Nothing is encoded before all places fit.
        TypeError: an image or a position is of a type that is not known.
    """
    places = [places_of(c, num_frames=num_frames, fps=fps, factor=factor) for c in conditions]
    owner: dict[int, int] = {}
    for number, targets in enumerate(places):
        for target in targets:
            if target in owner:
                raise ValueError(
                    f"conditions {owner[target] + 1} and {number + 1} both hold latent frame {target}: "
                    f"move or shorten one of them (latent frames 0..{shape[1] - 1})"
                )
            owner[target] = number
    multipliers = torch.ones(shape[1])
    for condition, targets in zip(conditions, places, strict=True):
        multipliers[targets] = torch.tensor(_multipliers_of(condition, len(targets)))
    known = torch.zeros(shape)
    for condition, targets in zip(conditions, places, strict=True):
        known[:, targets] = _latents_of(condition, targets, encode, shape, height, width, factor).to(known)
    return Placement(known, multipliers)


def _listed(condition: PusaCondition) -> list[Index] | None:
    index = condition.latent_index
    return None if index is None or isinstance(index, SupportsIndex | str) else list(index)


def _available(condition: PusaCondition, start: int, factor: int) -> int:
    """Latent frames that a condition can give, when its first goes to `start`."""
    if condition.latents is not None:
        return condition.latents.shape[1] if condition.latents.ndim == 4 else 0
    if condition.image is not None:
        return 1
    frames = len(condition.video)
    return frames // factor if _is_in_context(condition, start) else latent_frames(frames, factor)


def _is_in_context(condition: PusaCondition, start: int) -> bool:
    """Whether the pictures are encoded behind a copy of the first one, so that each place gets its four frames."""
    at_own_places = condition.video is not None and _listed(condition) is not None
    return condition.encode == "repeat" and start > 0 and not at_own_places


def places_of(condition: PusaCondition, *, num_frames: int, fps: float = 16.0, factor: int = 4) -> list[int]:
    """The latent frames of a clip that a condition holds, in the order of its own; raises as `place` does."""
    count = latent_frames(num_frames, factor)
    listed = _listed(condition)
    if listed is not None:
        targets = [latent_index_of(num_frames=num_frames, latent_index=i, factor=factor) for i in listed]
        if len(set(targets)) < len(targets):
            raise ValueError(f"latent_index={listed} names a latent frame twice")
        available = _available(condition, 0, factor)
        if condition.latents is not None and available != len(targets):
            raise ValueError(f"latent_index names {len(targets)} latent frames, the latents have {available}")
        if condition.video is not None and max(targets) >= available:
            raise ValueError(
                f"latent_index={max(targets)}: the video given has {len(condition.video)} frames, which are "
                f"{available} latent frames (0..{available - 1}); give a longer one or other positions"
            )
        return targets
    start = latent_index_of(
        num_frames=num_frames,
        latent_index=condition.latent_index,  # type: ignore[arg-type]
        frame_index=condition.frame_index,
        seconds=condition.seconds,
        fps=fps,
        factor=factor,
    )
    available = _available(condition, start, factor)
    if available == 0:
        raise ValueError(
            f"{len(condition.video)} frames are too few for encode='repeat', which fills places of {factor} frames"
            if condition.video is not None
            else f"latents of shape {list(condition.latents.shape)}: give [C, f, h, w]"  # type: ignore[union-attr]
        )
    if start + available > count:
        raise ValueError(
            f"{available} latent frames from latent_index={start} on end after the video, which has {count} "
            f"(0..{count - 1}): shorten the condition to {count - start} or begin at {max(count - available, 0)}"
        )
    return list(range(start, start + available))


def _multipliers_of(condition: PusaCondition, count: int) -> list[float]:
    multipliers = _as_list(condition.noise_multiplier)
    if len(multipliers) == 1:
        return multipliers * count
    if len(multipliers) != count:
        raise ValueError(
            f"{len(multipliers)} noise multipliers for {count} latent frames: give one for all or one for each"
        )
    return multipliers


def _latents_of(
    condition: PusaCondition,
    targets: list[int],
    encode: Callable[[Tensor], Tensor],
    shape: tuple[int, int, int, int],
    height: int,
    width: int,
    factor: int,
) -> Tensor:
    """``[C, len(targets), h, w]``."""
    if condition.latents is not None:
        wanted = (shape[0], len(targets), *shape[2:])
        if tuple(condition.latents.shape) != wanted:
            raise ValueError(f"latents of shape {list(condition.latents.shape)}: this clip needs {list(wanted)}")
        return condition.latents
    frames = _frames_of(condition)
    at_own_places = condition.video is not None and _listed(condition) is not None
    in_context = _is_in_context(condition, targets[0])
    if in_context:
        if condition.image is not None:
            frames = frames * factor
        used = len(targets) * factor
    else:
        used = 1 + factor * (max(targets) if at_own_places else len(targets) - 1)
    if used < len(frames) and not at_own_places:
        rule = f"{factor}n" if in_context else f"{factor}n + 1"
        logger.warning(
            "the last %d of the video's %d frames are left out: %s fit", len(frames) - used, len(frames), rule
        )
    frames = [fit_image(frame, width, height, condition.fit) for frame in frames[:used]]
    if in_context:
        return encode(pixels([frames[0], *frames]))[0][:, 1:]
    latents = encode(pixels(frames))[0]
    return latents[:, targets] if at_own_places else latents


def pixels(frames: Sequence[Image.Image]) -> Tensor:
    """RGB images of one size to the VAE's range: fp32 ``[1, 3, n, H, W]`` in -1..1."""
    stacked = torch.from_numpy(np.stack([np.asarray(frame) for frame in frames]))  # [n, H, W, 3]
    return (stacked.permute(3, 0, 1, 2).float() * (2 / 255) - 1).unsqueeze(0)


def _as_list(value: float | Sequence[float]) -> list[float]:
    return [float(v) for v in value] if isinstance(value, Sequence | np.ndarray | Tensor) else [float(value)]
