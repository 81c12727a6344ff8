"""Turn conditions (images, videos or latents at positions in a clip) into latents and noise multipliers.

A user gives "this picture at 1.5 seconds"; the scheduler needs a noise multiplier per latent frame. Latent frame 0 is
frame 0 of the video, every later one is `factor` frames, four for Wan: its 81 frames are latent frames 0..20.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, Literal, SupportsIndex

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from pusa.codes import CodedError
from pusa.media.pictures import on_white, to_srgb
from pusa.numerals import check_noise_multiplier
from pusa.positions import Index, latent_frames, latent_index_of

logger = logging.getLogger(__name__)

Fit = Literal["crop", "letterbox", "stretch"]


@dataclass(frozen=True, kw_only=True)
class PusaCondition:
    """An image, a video or latents at a position of the clip, and how far the model may depart from it.

    Exactly one of:
        image: PIL image of any mode (see `pusa.media.to_srgb`), or an array ``[H, W, 3 or 4]`` or a tensor
            ``[3 or 4, H, W]`` of uint8, uint16 or 0..1 floats.
        video: a sequence of such images, an array ``[n, H, W, 3]`` or a tensor ``[n, 3, H, W]``.
        latents: ``[C, f, h, w]`` of the clip's latent size, in the space that the transformer works in: they are placed
            as they are, whatever `PusaPipeline.normalize_conditions` says. `PusaPipeline.encode_frames` makes such,
            normalised by default; those of a call's ``output_type="latent"`` always are.

    At most one of (default: the beginning):
        latent_index: latent frame; the original's unit. One index is the position of the first latent frame, the others
            follow. A list selects latent frames of a video and keeps them at the same index (as the original's
            video-to-video does: index 3 of the video is index 3 of the clip), and places those of `latents` one by one.
        frame_index: frame number.
        seconds: time, by the frame rate of the call.
        Each counts from the end when negative, and may be ``"last"``.

    Attributes:
        noise_multiplier: 0..1, one number or one per latent frame: the factor of their sigmas. 0 keeps the frames
            exactly; 0.2 lets them change a little and often moves better.
        encode: encoding of frames at later positions. ``"single"``: an image alone, as the original does, though a
            latent frame of Wan is four frames. ``"repeat"``: an image as so many static frames with the same frame
            before them, a video with its first frame before it, so that a latent frame has all its frames. None:
            `pipe.defaults.encode` for images, "single" for videos.
        fit: how images get the clip's size: cut to its shape, fit into it on black, or stretch.
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
        contents = [name for name in ("image", "video", "latents") if getattr(self, name) is not None]
        if len(contents) != 1:
            raise ValueError(f"give exactly one of image, video and latents, not {' and '.join(contents) or 'none'}")
        positions = [n for n in ("latent_index", "frame_index", "seconds") if getattr(self, n) is not None]
        if len(positions) > 1:
            raise ValueError(f"give one of latent_index, frame_index and seconds, not {' and '.join(positions)}")
        index_list = _index_list(self)
        if index_list == []:
            raise ValueError("latent_index=[] is empty: give a latent frame, or leave it out for the beginning")
        if self.image is not None and index_list is not None and len(index_list) > 1:
            raise ValueError(f"latent_index={index_list} for one image: use one condition per place, or a video")
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
    """Resize an image to sRGB of `width` x `height` (Lanczos), rotated by its EXIF data, transparency on white.

    Args:
        image: as in `PusaCondition`.
        fit: ``crop`` covers and cuts the edges, ``letterbox`` shows all of it on black, ``stretch`` distorts.
    """
    image = on_white(to_srgb(_to_pil(image))[0])
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
    if image.dtype == np.uint16:
        image = (image >> 8).astype(np.uint8)
    if image.dtype != np.uint8:
        if not np.issubdtype(image.dtype, np.floating):
            raise TypeError(f"an image of {image.dtype}: give uint8 (0..255), uint16 (0..65535) or floats (0..1)")
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
    """Latents of all conditions, fp32 ``[C, F, h, w]``, 0 in free frames, and noise multipliers ``[F]``, 1 there."""

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
    """Encode conditions to latents and noise multipliers per latent frame.

    Args:
        conditions: in any order, each latent frame at most once.
        encode: ``[1, 3, factor * n + 1, height, width]`` in -1..1 to normalised latents ``[1, C, n + 1, h, w]``.
        shape: ``(C, F, h, w)`` of the clip's latents.
        num_frames, height, width, fps: frames, pixels and frames per second of the clip.
        factor: frames of a latent frame after the first; `pipe.vae_scale_factor_temporal`.

    Raises:
        ValueError: two conditions on one latent frame, a position outside the clip, a video too short for its
            positions, a list of multipliers of another length, latents of another size. Positions are checked before
            anything is encoded.
        TypeError: an image or a position is of another type.
    """
    multipliers, latents = torch.ones(shape[1]), torch.zeros(shape)
    for index, multiplier in multipliers_by_frame(conditions, num_frames=num_frames, fps=fps, factor=factor).items():
        multipliers[index] = multiplier
    for condition in conditions:
        indices = latent_indices_of(condition, num_frames=num_frames, fps=fps, factor=factor)
        latents[:, indices] = _latents_of(condition, indices, encode, shape, height, width, factor).to(latents)
    return Placement(latents, multipliers)


Conditions = Sequence[PusaCondition] | Sequence[Sequence[PusaCondition]]


def place_for_prompts(
    conditions: Conditions | None,
    num_prompts: int,
    num_videos_per_prompt: int,
    *,
    default_encode: Literal["single", "repeat"],
    **clip: Any,
) -> Placement | None:
    """Encode the conditions of a call: a list for every video, or one list per prompt; None if there are none.

    Args:
        default_encode: `PusaCondition.encode` of images that have none.
        clip: as in `place`.

    Returns:
        Latents ``[B or 1, C, F, h, w]`` and noise multipliers ``[B or 1, F]``.

    Raises:
        TypeError, ValueError: as `place`, or the number of lists is not that of prompts.
    """
    if isinstance(conditions, PusaCondition):
        raise TypeError("conditions is one PusaCondition: give a list of them")
    if not conditions:
        return None
    is_per_prompt = not isinstance(conditions[0], PusaCondition)
    lists: list[Any] = list(conditions) if is_per_prompt else [conditions]
    if is_per_prompt and len(lists) != num_prompts:
        raise ValueError(f"{len(lists)} lists of conditions for {num_prompts} prompts: give one for each")
    placements = [place([_with_encoding(c, default_encode) for c in one], **clip) for one in lists]
    repeats = num_videos_per_prompt if is_per_prompt else 1
    return Placement(
        latents=torch.stack([p.latents for p in placements]).repeat_interleave(repeats, 0),
        noise_multipliers=torch.stack([p.noise_multipliers for p in placements]).repeat_interleave(repeats, 0),
    )


def _with_encoding(condition: PusaCondition, encode: Literal["single", "repeat"]) -> PusaCondition:
    if not isinstance(condition, PusaCondition) or condition.image is None or condition.encode is not None:
        return condition
    return replace(condition, encode=encode)


def multipliers_by_frame(
    conditions: Sequence[PusaCondition], *, num_frames: int, fps: float = 16.0, factor: int = 4
) -> dict[int, float]:
    """List the noise multiplier of each latent frame that conditions fill; encode nothing, and raise as `place`."""
    indices_of = [latent_indices_of(c, num_frames=num_frames, fps=fps, factor=factor) for c in conditions]
    condition_at: dict[int, int] = {}  # latent frame -> number of its condition
    for number, indices in enumerate(indices_of):
        for index in indices:
            if index in condition_at:
                raise CodedError(
                    "position_taken",
                    f"conditions {condition_at[index] + 1} and {number + 1} both hold latent frame {index}: "
                    f"move or shorten one of them (latent frames 0..{latent_frames(num_frames, factor) - 1})",
                    first=condition_at[index] + 1,
                    second=number + 1,
                    latent=index,
                )
            condition_at[index] = number
    return {
        index: multiplier
        for condition, indices in zip(conditions, indices_of, strict=True)
        for index, multiplier in zip(indices, _multipliers_of(condition, len(indices)), strict=True)
    }


def encode_by_frame(
    conditions: Sequence[PusaCondition],
    *,
    encode: Callable[[Tensor], Tensor],
    shape: tuple[int, int, int, int],
    num_frames: int,
    height: int,
    width: int,
    fps: float = 16.0,
    factor: int = 4,
) -> dict[int, Tensor]:
    """Encode conditions to the latents ``[C, 1, h, w]`` of each latent frame that they fill.

    Arguments and errors are those of `place`; here free frames take no memory, however long the video is.
    """
    multipliers_by_frame(conditions, num_frames=num_frames, fps=fps, factor=factor)  # raises before any work
    found: dict[int, Tensor] = {}
    for condition in conditions:
        indices = latent_indices_of(condition, num_frames=num_frames, fps=fps, factor=factor)
        latents = _latents_of(condition, indices, encode, shape, height, width, factor).float()
        found |= {index: latents[:, n : n + 1] for n, index in enumerate(indices)}
    return found


def _index_list(condition: PusaCondition) -> list[Index] | None:
    """Return `latent_index` if it is a list, else None."""
    index = condition.latent_index
    return None if index is None or isinstance(index, SupportsIndex | str) else list(index)


def _count_latents(condition: PusaCondition, start: int, factor: int) -> int:
    """Count the latent frames that a condition fills from latent frame `start` on."""
    if condition.latents is not None:
        return condition.latents.shape[1] if condition.latents.ndim == 4 else 0
    if condition.image is not None:
        return 1
    frames = len(condition.video)
    return frames // factor if _has_context(condition, start) else latent_frames(frames, factor)


def _keeps_indices(condition: PusaCondition) -> bool:
    """Tell if latent frames of a video keep their indices in the clip."""
    return condition.video is not None and _index_list(condition) is not None


def _has_context(condition: PusaCondition, start: int) -> bool:
    """Tell if frames are encoded after a copy of the first one, so that no latent frame is one frame alone."""
    return condition.encode == "repeat" and start > 0 and not _keeps_indices(condition)


def latent_indices_of(condition: PusaCondition, *, num_frames: int, fps: float = 16.0, factor: int = 4) -> list[int]:
    """Compute the latent frames of the clip that a condition fills, in its order; raise as `place` does."""
    count = latent_frames(num_frames, factor)
    index_list = _index_list(condition)
    if index_list is not None:
        indices = [latent_index_of(num_frames=num_frames, latent_index=i, factor=factor) for i in index_list]
        if len(set(indices)) < len(indices):
            raise ValueError(f"latent_index={index_list} names a latent frame twice")
        available = _count_latents(condition, 0, factor)
        if condition.latents is not None and available != len(indices):
            raise ValueError(f"latent_index names {len(indices)} latent frames, the latents have {available}")
        if condition.video is not None and max(indices) >= available:
            raise CodedError(
                "source_too_short",
                f"latent_index={max(indices)}: the video given has {len(condition.video)} frames, which are "
                f"{available} latent frames (0..{available - 1}); give a longer one or other positions",
                latent=max(indices),
                frames=len(condition.video),
                latents=available,
            )
        return indices
    start = latent_index_of(
        num_frames=num_frames,
        latent_index=condition.latent_index,  # type: ignore[arg-type]
        frame_index=condition.frame_index,
        seconds=condition.seconds,
        fps=fps,
        factor=factor,
    )
    available = _count_latents(condition, start, factor)
    if available == 0:
        raise ValueError(
            f"{len(condition.video)} frames are too few for encode='repeat', which fills places of {factor} frames"
            if condition.video is not None
            else f"latents of shape {list(condition.latents.shape)}: give [C, f, h, w]"  # type: ignore[union-attr]
        )
    if start + available > count:
        raise CodedError(
            "source_too_long",
            f"{available} latent frames from latent_index={start} on end after the video, which has {count} "
            f"(0..{count - 1}): shorten the condition to {count - start} or begin at {max(count - available, 0)}",
            latents=available,
            start=start,
            count=count,
        )
    return list(range(start, start + available))


def _multipliers_of(condition: PusaCondition, count: int) -> list[float]:
    multipliers = _as_list(condition.noise_multiplier)
    if len(multipliers) == 1:
        return multipliers * count
    if len(multipliers) != count:
        raise CodedError(
            "noise_count",
            f"{len(multipliers)} noise multipliers for {count} latent frames: give one for all or one for each",
            given=len(multipliers),
            positions=count,
        )
    return multipliers


def _latents_of(
    condition: PusaCondition,
    indices: list[int],
    encode: Callable[[Tensor], Tensor],
    shape: tuple[int, int, int, int],
    height: int,
    width: int,
    factor: int,
) -> Tensor:
    """Encode one condition to latents ``[C, len(indices), h, w]``."""
    if condition.latents is not None:
        expected = (shape[0], len(indices), *shape[2:])
        if tuple(condition.latents.shape) != expected:
            raise ValueError(f"latents of shape {list(condition.latents.shape)}: this clip needs {list(expected)}")
        return condition.latents
    frames = _frames_of(condition)
    keeps_indices = _keeps_indices(condition)
    has_context = _has_context(condition, indices[0])
    if has_context:
        if condition.image is not None:
            frames = frames * factor
        used = len(indices) * factor
    else:
        used = 1 + factor * (max(indices) if keeps_indices else len(indices) - 1)
    if used < len(frames) and not keeps_indices:
        rule = f"{factor}n" if has_context else f"{factor}n + 1"
        logger.warning(
            "the last %d of the video's %d frames are left out: %s fit", len(frames) - used, len(frames), rule
        )
    frames = [fit_image(frame, width, height, condition.fit) for frame in frames[:used]]
    if has_context:
        return encode(pixels([frames[0], *frames]))[0][:, 1:]
    latents = encode(pixels(frames))[0]
    return latents[:, indices] if keeps_indices else latents


def pixels(frames: Sequence[Image.Image]) -> Tensor:
    """Convert RGB images of one size to the VAE's input: fp32 ``[1, 3, n, H, W]`` in -1..1."""
    stacked = torch.from_numpy(np.stack([np.asarray(frame) for frame in frames]))  # [n, H, W, 3]
    return (stacked.permute(3, 0, 1, 2).float() * (2 / 255) - 1).unsqueeze(0)


def _as_list(value: float | Sequence[float]) -> list[float]:
    return [float(v) for v in value] if isinstance(value, Sequence | np.ndarray | Tensor) else [float(value)]
