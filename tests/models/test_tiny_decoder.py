"""A file of TAEHV's layout shows latent frames as its own decoder would; random weights, as no real ones are here."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from pusa.models.tensors import UnsafeFileError
from pusa.models.tiny_decoder import load_tiny_decoder

WIDTHS = (256, 128, 64, 64)
GROWTH = {7: 1, 13: 2, 19: 2}  # layer -> time steps that it makes of one


def published_state(channels: int = 16, patch: int = 1) -> dict[str, Tensor]:
    """Random weights under the names and shapes of ``taew2_1.pth``; those of the two time steps are equal."""
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / torch.Size(shape[1:]).numel() ** 0.5

    state = {"encoder.0.weight": weight(64, 3, 3, 3)}
    state |= {"decoder.1.weight": weight(WIDTHS[0], channels, 3, 3), "decoder.1.bias": weight(WIDTHS[0], 1)[:, 0]}
    for level, width in enumerate(WIDTHS[:3]):
        for layer in range(3 + 6 * level, 6 + 6 * level):
            for part, inputs in ((0, 2 * width), (2, width), (4, width)):
                state[f"decoder.{layer}.conv.{part}.weight"] = weight(width, inputs, 3, 3) / 2
                state[f"decoder.{layer}.conv.{part}.bias"] = weight(width, 4)[:, 0].clone()
        grow = 7 + 6 * level
        state[f"decoder.{grow}.conv.weight"] = weight(width, width, 1, 1).repeat(GROWTH[grow], 1, 1, 1)
        state[f"decoder.{grow + 1}.weight"] = weight(WIDTHS[level + 1], width, 3, 3)
    state["decoder.22.weight"] = weight(3 * patch**2, WIDTHS[-1], 3, 3) / 4
    state["decoder.22.bias"] = torch.full((3 * patch**2,), 0.5)
    return state


def decode_published(state: dict[str, Tensor], latents: Tensor, patch: int = 1) -> Tensor:
    """Decode ``[t, C, h, w]`` to frames ``[n, 3, H, W]`` in 0..1, written from the published description."""
    x = F.conv2d(torch.tanh(latents / 3) * 3, state["decoder.1.weight"], state["decoder.1.bias"], padding=1).relu()
    for layer in range(3, 21):
        name = f"decoder.{layer}"
        if f"{name}.conv.0.weight" in state:
            y = torch.cat([x, torch.cat([torch.zeros_like(x[:1]), x[:-1]])], dim=1)
            for part in (0, 2, 4):
                y = F.conv2d(y, state[f"{name}.conv.{part}.weight"], state[f"{name}.conv.{part}.bias"], padding=1)
                y = y.relu() if part < 4 else y
            x = (y + x).relu()
        elif layer in GROWTH:
            x = F.conv2d(F.interpolate(x, scale_factor=2), state[f"{name}.conv.weight"])
            x = x.reshape(-1, state[f"{name}.conv.weight"].shape[1], *x.shape[2:])
        elif f"{name}.weight" in state:
            x = F.conv2d(x, state[f"{name}.weight"], padding=1)
    x = F.conv2d(x.relu(), state["decoder.22.weight"], state["decoder.22.bias"], padding=1)
    return F.pixel_shuffle(x, patch).clamp(0, 1)


def noise(channels: int, frames: int) -> Tensor:
    return torch.randn(1, channels, frames, 2, 3, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("channels", "patch", "suffix"), [(16, 1, ".safetensors"), (16, 1, ".pth"), (48, 2, ".safetensors")]
)
def test_a_frame_is_that_of_the_published_decoder(tmp_path: Path, channels: int, patch: int, suffix: str) -> None:
    state, path = published_state(channels, patch), tmp_path / f"tae{suffix}"
    if suffix == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    decoder = load_tiny_decoder(path, channels=channels)
    still = noise(channels, 1).expand(-1, -1, 12, -1, -1)  # the decoder's memory of it has settled in the end
    picture = decoder(still, 11)
    assert (picture.dtype, picture.shape) == (torch.uint8, (16 * patch, 24 * patch, 3))
    expected = decode_published(state, still[0].transpose(0, 1), patch)[-1]
    assert expected.std() > 0.05
    assert (picture.permute(2, 0, 1) / 255 - expected).abs().max() < 0.003


def test_nothing_is_before_the_first_frame(tmp_path: Path) -> None:
    state, path = published_state(), tmp_path / "tae.safetensors"
    for number in (13, 19):  # one time step instead of two equal ones
        state[f"decoder.{number}.conv.weight"] = state[f"decoder.{number}.conv.weight"].chunk(2)[0].clone()
    save_file(state, path)
    latents, decoder = noise(16, 3), load_tiny_decoder(path, channels=16)
    expected = decode_published(state, latents[0].transpose(0, 1))
    assert len(expected) == 3
    for index in range(3):
        assert (decoder(latents, index).permute(2, 0, 1) / 255 - expected[index]).abs().max() < 0.003
    assert not torch.equal(decoder(latents, 2), decoder(latents[:, :, [2]], 0))


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors is not here"):
        load_tiny_decoder(tmp_path / "none.safetensors", channels=16)
    other = tmp_path / "vae.safetensors"
    save_file({"decoder.conv_in.weight": torch.zeros(2, 2)}, other)
    with pytest.raises(ValueError, match=r"vae\.safetensors is no tiny decoder: give taew2_1\.safetensors"):
        load_tiny_decoder(other, channels=16)
    other.write_bytes(b"oops")
    with pytest.raises(ValueError, match="is no tiny decoder"):
        load_tiny_decoder(other, channels=16)
    path = tmp_path / "tae.safetensors"
    save_file(published_state(), path)
    with pytest.raises(ValueError, match="decodes 16 latent channels, and this model has 48"):
        load_tiny_decoder(path, channels=48)
    torch.save({"decoder.1.weight": object()}, tmp_path / "tae.pth")
    with pytest.raises(UnsafeFileError):
        load_tiny_decoder(tmp_path / "tae.pth", channels=16)
