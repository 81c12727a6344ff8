"""Define what `pusa.models.vae` needs of a class of VAEs."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from diffusers import AutoencoderKL, AutoencoderKLMochi, AutoencoderKLWan
from torch import Tensor

VAE = AutoencoderKL | AutoencoderKLMochi | AutoencoderKLWan


class Stream(Protocol):
    """Decode consecutive latents of one video."""

    def decode(self, z: Tensor) -> Iterator[Tensor]:
        """Yield the decoder's output ``[B, c, n, H, W]`` for each latent frame of ``[B, C, F, h, w]``."""

    def park(self, move: Callable[[Tensor], Tensor]) -> None:
        """Move what is kept of earlier frames, one tensor after the other."""


@dataclass(frozen=True)
class TileLayout:
    """Describe diffusers' tiles; each pair is height and width.

    Attributes:
        size, stride: of a tile and from one to the next, in latents.
        shown, blend: of a tile in the result, and over how much it fades from the one before, in pixels of the
            decoder's output.
        scale: such pixels per latent.
    """

    size: tuple[int, int]
    stride: tuple[int, int]
    shown: tuple[int, int]
    blend: tuple[int, int]
    scale: int

    @classmethod
    def of(cls, vae: Any, scale: int, patch: int = 1) -> "TileLayout":
        """Read the layout of a VAE of `scale` pixels per latent, whose decoder makes patches of `patch` pixels."""
        sizes = vae.tile_sample_min_height, vae.tile_sample_min_width
        strides = vae.tile_sample_stride_height, vae.tile_sample_stride_width
        return cls(
            size=(sizes[0] // scale, sizes[1] // scale),
            stride=(strides[0] // scale, strides[1] // scale),
            shown=(strides[0] // patch, strides[1] // patch),
            blend=(sizes[0] // patch - strides[0] // patch, sizes[1] // patch - strides[1] // patch),
            scale=scale // patch,
        )


class Codec(ABC):
    """Encode and decode with VAEs of one class; it holds no state."""

    @abstractmethod
    def frames_per_latent(self, vae: Any) -> int:
        """Return how many frames a latent frame after the first stands for."""

    @abstractmethod
    def pixels_per_latent(self, vae: Any) -> int:
        """Return the height and width in pixels that a latent stands for."""

    @abstractmethod
    def channels(self, vae: Any) -> int:
        """Return the channels of latents."""

    @abstractmethod
    def normalisation(self, vae: Any) -> list[Any]:
        """Return the numbers that `normalise` reads of the configuration, to tell VAEs apart."""

    @abstractmethod
    def encode(self, vae: Any, video: Tensor) -> Tensor:
        """Encode frames ``[B, 3, F, H, W]``, on the VAE's device, to the mode of the posterior, not normalised."""

    @abstractmethod
    def normalise(self, vae: Any, latents: Tensor) -> Tensor:
        """Give latents about mean 0 and variance 1."""

    @abstractmethod
    def denormalise(self, vae: Any, latents: Tensor) -> Tensor:
        """Invert `normalise`."""

    @abstractmethod
    def stream(self, vae: Any) -> Stream:
        """Begin to decode a video."""

    def tile_layout(self, vae: Any) -> TileLayout | None:
        """Return the layout of tiles, each of which has a stream; None: the streams see to tiles themselves."""
        return TileLayout.of(vae, self.pixels_per_latent(vae))

    def finish(self, vae: Any, frames: Tensor) -> Tensor:
        """Turn the decoder's output into frames ``[B, 3, n, H, W]`` in -1..1."""
        return frames.clamp(-1, 1)


def statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of a VAE's latents, shaped to broadcast over ``[B, C, F, h, w]``."""
    mean, std = (
        like.new_tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std
