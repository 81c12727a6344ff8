"""Previews by a linear map look like the decoded video, and the map of a VAE is fitted once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from components import make_vae
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from torch import Tensor

from pusa.models.fvdm import tiny as fvdm_tiny
from pusa.models.latent_preview import SHIPPED, LatentPreview, draw_clips, fit, identity_of_vae, preview_of
from pusa.models.mochi import tiny as mochi_tiny
from pusa.models.vae import CODECS, decode_video, encode_video


def psnr(a: Tensor, b: Tensor) -> float:
    return float(10 * torch.log10(4 / (a - b).square().mean()))  # of values in -1..1


def count_encodings(vae: Any) -> list[int]:
    runs: list[int] = []
    vae.encoder.register_forward_hook(lambda *_: runs.append(1))
    return runs


def test_the_map_of_the_embedded_model_shows_what_its_vae_decodes(mini: Any, tmp_path: Path) -> None:
    assert identity_of_vae(mini.vae) in load_file(SHIPPED)  # else fit it anew: benchmarks/latent_preview.py --write
    preview = preview_of(mini.vae, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []  # nothing was fitted
    latents = encode_video(mini.vae, draw_clips(4, size=64, frames=9, seed=7))
    videos = decode_video(mini.vae, latents).float()
    for index, frame in ((0, 0), (1, 3), (2, 7)):
        pictures = torch.stack([preview(clip, index) for clip in latents.split(1)])
        assert (pictures.dtype, pictures.shape) == (torch.uint8, (4, 32, 32, 3))
        values, decoded = pictures.permute(0, 3, 1, 2).float() / 127.5 - 1, videos[:, :, frame]
        assert psnr(values, F.avg_pool2d(decoded, 2)) > 20
        assert psnr(F.avg_pool2d(values, 4), F.avg_pool2d(decoded, 8)) > 25


class LinearVae(torch.nn.Module):
    """A VAE whose latents are a matrix times the mean colours of 8 x 8 pixels: a map must invert it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = torch.nn.Conv2d(3, 4, 1, bias=False)
        weight = torch.randn(4, 3, 1, 1, generator=torch.Generator().manual_seed(3))
        self.encoder.weight = torch.nn.Parameter(weight, requires_grad=False)
        factors = {"scale_factor_spatial": 8, "scale_factor_temporal": 4}
        scales = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
        self.config: Any = type("Config", (), {"z_dim": 4, **factors, **scales})
        self.dtype = torch.float32

    def encode(self, video: Tensor) -> Any:
        frames = video[:, :, [0, *range(3, video.shape[2], 4)]]
        latents = [self.encoder(F.avg_pool2d(frame, 8)) for frame in frames.unbind(2)]
        posterior = type("Posterior", (), {"mode": lambda _: torch.stack(latents, dim=2)})()
        return type("Encoded", (), {"latent_dist": posterior})


def test_a_map_inverts_an_encoder_that_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CODECS, LinearVae, CODECS[AutoencoderKLWan])
    vae: Any = LinearVae()
    preview = LatentPreview(fit(vae))
    for clip in draw_clips(2, size=64, seed=11).split(1):
        for index in (0, 1):
            picture = preview(encode_video(vae, clip), index).permute(2, 0, 1)[None].float() / 127.5 - 1
            assert psnr(F.avg_pool2d(picture, 4), F.avg_pool2d(clip[:, :, 3 * index], 8)) > 35


@pytest.mark.parametrize("tiny", [mochi_tiny, fvdm_tiny], ids=["mochi", "fvdm"])
def test_the_vae_of_any_base_has_a_preview(tiny: Any, tmp_path: Path) -> None:
    vae = tiny.components()["vae"]
    preview = preview_of(vae, folder=tmp_path)
    latents = encode_video(vae, draw_clips(1, size=32, frames=7))
    assert preview(latents, 1).shape == (16, 16, 3)
    assert identity_of_vae(vae) != identity_of_vae(tiny.components(seed=1)["vae"])


def test_another_vae_is_fitted_once_and_kept(tiny_vae: Callable[..., Any], tmp_path: Path) -> None:
    vae = tiny_vae()
    runs = count_encodings(vae)
    first = preview_of(vae, folder=tmp_path / "previews")
    assert runs
    fitting = len(runs)
    again = preview_of(vae, folder=tmp_path / "previews")
    assert len(runs) == fitting
    latents = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    assert (first(latents, 1).int() - again(latents, 1).int()).abs().max() <= 1  # kept in fp16
    assert first(latents, 1).shape == (16, 24, 3)
    assert not torch.equal(first(latents[:, :, [1, 1]], 0), first(latents[:, :, [1, 1]], 1))
    (kept,) = (tmp_path / "previews").iterdir()
    kept.write_bytes(b"oops")
    preview_of(vae, folder=tmp_path / "previews")
    assert len(runs) == 2 * fitting


def test_maps_belong_to_a_vae_whatever_its_dtype(tiny_vae: Callable[..., Any], tmp_path: Path) -> None:
    vae, shipped = tiny_vae(), tmp_path / "shipped.safetensors"
    identity = identity_of_vae(vae)
    assert identity_of_vae(tiny_vae(seed=1)) != identity
    assert identity_of_vae(tiny_vae().to(torch.bfloat16)) == identity
    runs = count_encodings(vae)
    save_file({identity: torch.zeros(2, 145, 48)}, shipped)
    preview_of(vae, shipped=shipped, folder=tmp_path / "previews")
    assert not runs
    save_file({"another": torch.zeros(2, 145, 48)}, shipped)
    preview_of(vae, shipped=shipped, folder=tmp_path / "previews")
    assert runs


def test_a_vae_of_more_channels_and_larger_pixels_is_fitted_too() -> None:
    patches = {"patch_size": 2, "in_channels": 12, "out_channels": 12, "is_residual": True, "dim_mult": [1, 1, 1, 1]}
    latents = {"z_dim": 48, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48, "scale_factor_spatial": 16}
    maps = fit(make_vae(**patches, **latents), clips=1)
    assert maps.shape == (2, 9 * 48 + 1, 48)
    assert maps.isfinite().all()
    assert LatentPreview(maps)(torch.randn(1, 48, 2, 3, 5), 1).shape == (12, 20, 3)


def test_a_vae_that_makes_nan_is_refused(tiny_vae: Callable[..., Any], tmp_path: Path) -> None:
    vae = tiny_vae()
    torch.nn.init.constant_(vae.encoder.conv_in.bias, float("nan"))
    with pytest.raises(ValueError, match="NaN or infinity of pictures: load it in fp32"):
        preview_of(vae, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_costs_the_next_run_a_fit(
    tiny_vae: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "previews").write_text("a file")
    assert preview_of(tiny_vae(), folder=tmp_path / "previews") is not None
    assert "will be fitted again" in caplog.text


def test_drawn_clips_are_the_same_each_time_and_half_of_them_move() -> None:
    clips = draw_clips(16, size=32)
    assert clips.shape == (16, 3, 5, 32, 32)
    assert clips.abs().max() <= 1
    assert torch.equal(clips, draw_clips(16, size=32))
    moving = (clips[:, :, 0] != clips[:, :, -1]).flatten(1).any(dim=1)
    assert 2 < int(moving.sum()) < 14
