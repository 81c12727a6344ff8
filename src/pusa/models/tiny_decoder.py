"""Show latents as pictures with a tiny decoder (TAEHV: taew2_1, taew2_2) in a file that a user gives.

The layout is that of github.com/madebyollin/taehv: 2-D convolutions, of which some see their input of one step before,
and layers that make two time steps of one. For a preview only the last of those is computed, one picture for each
latent frame, as the authors offer for cheap previews.
"""

from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from pusa.models.tensors import load_tensors

_WIDTHS = (256, 128, 64, 64)
_GROWS = (7, 13, 19)  # numbers of the layers that multiply time steps
_CONTEXT = 2  # earlier latent frames that are decoded with the one shown


class _Recall(nn.Module):
    """Convolve an input together with that of one time step before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        convolutions = [_conv(2 * width, width), _conv(width, width), _conv(width, width)]
        self.conv = nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU(), convolutions[2])

    def forward(self, x: Tensor, begins: bool) -> Tensor:
        """Convolve time steps ``[t, C, H, W]``; `begins`: the first one begins the video, with zeros before it."""
        before = torch.cat([torch.zeros_like(x[:1]) if begins else x[:1], x[:-1]])
        return (self.conv(torch.cat([x, before], dim=1)) + x).relu()


class _Grow(nn.Module):
    """Mix channels, as the layer does that makes the last of several time steps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class _Squash(nn.Module):
    """Limit latents smoothly to -3..3."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


def _conv(inputs: int, outputs: int, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


class TinyDecoder(nn.Module):
    """Decode one latent frame to a picture.

    Args:
        channels: of the latents: 16 for Wan2.1's VAE, 48 for that of Wan2.2-TI2V-5B.
        patch: pixels that the last convolution makes at once, in each direction.
    """

    def __init__(self, channels: int, patch: int = 1) -> None:
        super().__init__()
        layers: list[nn.Module] = [_Squash(), _conv(channels, _WIDTHS[0]), nn.ReLU()]
        for width, next_width in pairwise(_WIDTHS):
            layers += [_Recall(width) for _ in range(3)]
            layers += [nn.Upsample(scale_factor=2), _Grow(width), _conv(width, next_width, bias=False)]
        self.decoder = nn.Sequential(*layers, nn.ReLU(), _conv(_WIDTHS[-1], 3 * patch**2))
        self._patch = patch

    @torch.no_grad()
    def forward(self, latents: Tensor, index: int) -> Tensor:
        """Return latent frame `index` of normalised latents ``[1, C, F, h, w]`` as uint8 ``[H, W, 3]``, on the CPU."""
        weight = next(self.decoder.parameters())
        first = max(0, index - _CONTEXT)
        x = latents[0, :, first : index + 1].transpose(0, 1).to(weight)  # [t, C, h, w]
        for layer in self.decoder:
            x = layer(x, first == 0) if isinstance(layer, _Recall) else layer(x)
        picture = F.pixel_shuffle(x[-1:], self._patch)[0].float().clamp(0, 1)
        return (picture * 255).round().byte().permute(1, 2, 0).cpu()


def load_tiny_decoder(path: Path, *, channels: int, device: torch.device | str = "cpu") -> TinyDecoder:
    """Read the decoder of a TAEHV file.

    Args:
        path: ``taew2_1.safetensors`` or ``taew2_1.pth``, or another of that layout; its encoder is ignored.
        channels: of the latents it must take.
        device: where it computes: in fp16 on a GPU, in fp32 on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else, or takes latents of another VAE.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not here")
    try:
        state = {k: v for k, v in load_tensors(path).items() if k.startswith("decoder.")}
        found, last = state["decoder.1.weight"].shape[1], state["decoder.22.weight"].shape[0]
        for number in _GROWS:
            key = f"decoder.{number}.conv.weight"
            state[key] = state[key][-state[key].shape[1] :]  # the last time step's channels
        decoder = TinyDecoder(found, patch=round((last / 3) ** 0.5))
        decoder.load_state_dict(state)
    except (KeyError, IndexError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path.name} is no tiny decoder: give taew2_1.safetensors, or another TAEHV file") from error
    if found != channels:
        raise ValueError(f"{path.name} decodes {found} latent channels, and this model has {channels}: give its own")
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.float16
    return decoder.eval().requires_grad_(False).to(device, dtype)
