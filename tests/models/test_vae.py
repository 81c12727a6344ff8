"""The VAE hands out frames as it goes, equal to those of one call, and gives up no video for want of memory."""

import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from _golden import within
from accelerate import cpu_offload_with_hook
from diffusers import AutoencoderKLWan
from torch import Tensor

from pusa.acceleration.decisions import PartPlan
from pusa.models.vae import (
    DecodeMemoryError,
    decode_chunks,
    decode_tile_by_tile,
    decode_video,
    encode_video,
    prepare_vae,
)

Make = Callable[..., AutoencoderKLWan]


@pytest.fixture(params=["wan2.1", "wan2.2"])
def vae(request: pytest.FixtureRequest, tiny_vae: Make, tiny_wan22_vae: Make) -> AutoencoderKLWan:
    return tiny_vae() if request.param == "wan2.1" else tiny_wan22_vae()


def noise(frames: int, height: int = 4, width: int = 5, batch: int = 1) -> Tensor:
    return torch.randn(batch, 16, frames, height, width, generator=torch.Generator().manual_seed(0))


def smooth(frames: int, height: int, width: int) -> Tensor:
    """Latents ``[1, 16, F, h, w]`` of slow waves."""
    parts = torch.randn(16, 4, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    t, y, x = torch.meshgrid(*(torch.linspace(0, 1, n) for n in (frames, height, width)), indexing="ij")
    return torch.sin(3 * (parts[:, 0] * t + parts[:, 1] * y + parts[:, 2] * x) + parts[:, 3]).unsqueeze(0)


@torch.no_grad()
def decoded_by_diffusers(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    mean, std = (
        torch.tensor(v, dtype=latents.dtype).view(1, -1, 1, 1, 1)
        for v in (vae.config.latents_mean, vae.config.latents_std)
    )
    return vae.decode(latents * std + mean).sample


def psnr(a: Tensor, b: Tensor) -> float:
    return 10 * math.log10(4 / (a - b).square().mean().item())  # of values in -1..1


# ---- the numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 5, 17])
def test_matches_the_original(golden_tensors: Callable, golden_json: Callable, frames: int) -> None:
    vae = AutoencoderKLWan(base_dim=8, z_dim=16).eval()
    vae.load_state_dict(golden_tensors("vae/weights_diffusers"))
    recorded = golden_tensors(f"vae/case_{frames}frames")
    parity = golden_json("vae/parity")[f"{frames}_frames"]
    encoded = encode_video(vae, recorded["video"])
    limit = within(parity["encode_diffusers_vs_ref"], recorded["encoded"])
    assert (encoded - recorded["encoded"]).abs().max() <= limit
    decoded = decode_video(vae, recorded["latents"])
    assert (decoded - recorded["decoded"]).abs().max() <= 2 * parity["decode_diffusers_clamped_vs_ref"]


def test_encodes_without_sampling_in_fp32(vae: AutoencoderKLWan) -> None:
    video = torch.rand(2, 3, 5, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = encode_video(vae, video)
    assert latents.shape == (2, 16, 2, 4, 6)
    assert torch.equal(encode_video(vae, video), latents)
    assert encode_video(vae.to(torch.bfloat16), video).dtype == torch.float32


def test_the_beginning_of_a_video_has_the_latents_of_the_beginning(tiny_vae: Make) -> None:
    vae = tiny_vae()
    video = torch.rand(1, 3, 9, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = encode_video(vae, video)
    for frames in (1, 5):
        torch.testing.assert_close(encode_video(vae, video[:, :, :frames]), latents[:, :, : (frames + 3) // 4])


@pytest.mark.parametrize("frames", [2, 4, 8])
def test_other_numbers_of_frames_are_refused(tiny_vae: Make, frames: int) -> None:
    with pytest.raises(ValueError, match=rf"{frames} frames: the VAE takes 4n \+ 1 of them"):
        encode_video(tiny_vae(), torch.zeros(1, 3, frames, 32, 32))


# ---- in pieces --------------------------------------------------------------------------------------------------


def test_chunks_are_the_whole_to_the_bit(vae: AutoencoderKLWan) -> None:
    latents = noise(3, batch=2)
    chunks = list(decode_chunks(vae, latents))
    assert [chunk.shape for chunk in chunks] == [(2, 3, n, 32, 40) for n in (1, 4, 4)]
    whole = decoded_by_diffusers(vae, latents)
    assert torch.equal(torch.cat(chunks, dim=2), whole)
    assert torch.equal(decode_video(vae, latents), whole)


def test_latents_may_come_in_pieces_and_are_not_waited_for(vae: AutoencoderKLWan) -> None:
    latents = noise(4)
    taken: list[int] = []

    def pieces() -> Iterator[Tensor]:
        for piece in latents.split([1, 2, 1], dim=2):
            taken.append(piece.shape[2])
            yield piece

    stream = decode_chunks(vae, pieces())
    chunks = [next(stream)]
    assert taken == [1]  # the first frame is out before more is known
    chunks += stream
    assert taken == [1, 2, 1]
    assert torch.equal(torch.cat(chunks, dim=2), decoded_by_diffusers(vae, latents))


def test_streams_and_other_calls_do_not_disturb_each_other(vae: AutoencoderKLWan) -> None:
    latents = noise(3)
    expected = decoded_by_diffusers(vae, latents)
    abandoned = decode_chunks(vae, latents)
    next(abandoned)
    stream = decode_chunks(vae, latents)
    first = next(stream)
    del abandoned  # closes it
    assert torch.equal(decoded_by_diffusers(vae, latents), expected)
    assert torch.equal(torch.cat([first, *stream], dim=2), expected)


def test_what_is_kept_of_earlier_frames_leaves_the_device_while_the_next_window_is_awaited(
    vae: AutoencoderKLWan,
) -> None:
    latents, kept, moved_bytes = noise(5), [], []

    def watch(_: torch.nn.Module, __: Any, options: dict[str, Any], ___: Any) -> None:
        kept[:] = [weakref.ref(tensor) for tensor in options["feat_cache"] if isinstance(tensor, Tensor)]

    def park(tensor: Tensor) -> Tensor:
        moved_bytes[-1] += tensor.nbytes
        return tensor.clone()

    def windows() -> Iterator[Tensor]:
        for window in latents.split([2, 2, 1], dim=2):
            assert [tensor for tensor in kept if tensor() is not None] == []
            moved_bytes.append(0)
            yield window

    vae.decoder.register_forward_hook(watch, with_kwargs=True)
    chunks = list(decode_chunks(vae, windows(), park=park))
    assert torch.equal(torch.cat(chunks, dim=2), decoded_by_diffusers(vae, latents))
    assert moved_bytes[0] == moved_bytes[1] > 1e5
    moved_bytes.append(0)
    list(decode_chunks(vae, latents, park=park))
    list(decode_chunks(vae, [latents], park=park))
    assert moved_bytes[-1] == 0  # nothing follows


def test_a_plan_prepares_the_vae(tiny_vae: Make) -> None:
    vae, latents = tiny_vae(), smooth(2, 6, 6)
    expected = decode_video(vae, latents)
    assert prepare_vae(vae, PartPlan("float32", "float32", "cpu")) is vae
    assert torch.equal(decode_video(vae, latents), expected)
    prepare_vae(vae, PartPlan("bfloat16", "bfloat16", "cpu", tiles=True))
    assert vae.use_tiling
    assert all(
        module.weight.is_contiguous(memory_format=torch.channels_last_3d)
        for module in vae.modules()
        if isinstance(module, torch.nn.Conv3d)
    )
    video = decode_video(vae, latents)
    assert video.dtype == torch.bfloat16
    assert psnr(video.float(), expected) > 30
    assert not prepare_vae(vae, PartPlan("bfloat16", "bfloat16", "cpu")).use_tiling


# ---- in tiles -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(10, 13), (8, 21), (6, 6)])
def test_tiles_that_are_planned_are_those_of_diffusers_also_for_windows(
    vae: AutoencoderKLWan, size: tuple[int, int]
) -> None:
    latents = smooth(4, *size)
    vae.enable_tiling(64, 64, 48, 48)  # tiles of 8 x 8 latents
    expected = decoded_by_diffusers(vae, latents)
    assert torch.equal(decode_video(vae, latents), expected)
    moved: list[Tensor] = []

    def park(tensor: Tensor) -> Tensor:
        moved.append(tensor)
        return tensor.clone()

    limit_memory(vae, 64, torch.OutOfMemoryError, "out of memory")  # one tile fits
    chunks = list(decode_chunks(vae, iter(latents.split([1, 2, 1], dim=2)), park=park))
    assert [chunk.shape[2] for chunk in chunks] == ([1, 8, 4] if max(size) > 8 else [1, 4, 4, 4])
    assert torch.equal(torch.cat(chunks, dim=2), expected)
    assert moved


def test_no_gradients_are_kept(tiny_vae: Make) -> None:
    chunk = next(decode_chunks(tiny_vae(), noise(1).requires_grad_()))
    assert not chunk.requires_grad
    assert torch.is_grad_enabled()


def test_decodes_in_the_precision_of_the_vae(tiny_vae: Make) -> None:
    vae, latents = tiny_vae().to(torch.bfloat16), noise(2)
    video = decode_video(vae, latents)
    assert video.dtype == torch.bfloat16
    assert torch.equal(video, decoded_by_diffusers(vae, latents.bfloat16()))


def test_model_offloading_wakes_the_vae(tiny_vae: Make) -> None:
    vae, latents = tiny_vae(), noise(2)
    expected = decoded_by_diffusers(vae, latents)
    _, hook = cpu_offload_with_hook(vae, execution_device="cpu")
    woken: list[torch.nn.Module] = []
    pre_forward = hook.hook.pre_forward

    def note(module: torch.nn.Module, *args: object, **kwargs: object) -> object:
        woken.append(module)
        return pre_forward(module, *args, **kwargs)

    hook.hook.pre_forward = note
    chunks = list(decode_chunks(vae, iter(latents.split(1, dim=2))))
    assert woken == [vae, vae]  # once for each piece: the transformer may have come between
    assert torch.equal(torch.cat(chunks, dim=2), expected)
    hook.remove()


def test_group_offloading(tiny_vae: Make) -> None:
    vae, latents = tiny_vae(), noise(2)
    expected = decoded_by_diffusers(vae, latents)
    vae.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    assert torch.equal(decode_video(vae, latents), expected)


# ---- when memory runs out -----------------------------------------------------------------------------------------


def limit_memory(vae: AutoencoderKLWan, latent_pixels: int, error: type[RuntimeError], message: str) -> None:
    """Let the decoder fail on more than so many latent pixels at a time, as a small device would."""
    forward = vae.decoder.forward

    def limited(x: Tensor, *args: object, **kwargs: object) -> Tensor:
        if x.shape[3] * x.shape[4] > latent_pixels:
            raise error(message)
        return forward(x, *args, **kwargs)

    vae.decoder.forward = limited


ERRORS = pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB"),
        (RuntimeError, "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["cuda", "cpu"],
)


@ERRORS
def test_short_of_memory_it_decodes_in_tiles(
    tiny_vae: Make, error: type[RuntimeError], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    vae, latents = tiny_vae(), smooth(1, 10, 13)
    vae.enable_tiling(64, 64, 48, 48)  # tiles of 8 x 8 latents
    expected = decoded_by_diffusers(vae, latents)
    vae.disable_tiling()
    whole = decode_video(vae, latents)
    limit_memory(vae, 64, error, message)
    video = decode_video(vae, latents)
    assert torch.equal(video, expected)
    assert psnr(video, whole) > 20
    assert not vae.use_tiling  # as it was
    assert "out of memory in decode_at_once" in caplog.text


def test_shorter_of_memory_it_decodes_tile_by_tile(vae: AutoencoderKLWan, caplog: pytest.LogCaptureFixture) -> None:
    latents = smooth(2, 18, 16)
    whole = decode_video(vae, latents)
    limit_memory(vae, 256, torch.OutOfMemoryError, "out of memory")  # diffusers' own tiles are of 32 x 32
    video = decode_video(vae, latents)
    assert video.shape == whole.shape
    assert psnr(video, whole) > 20
    assert "out of memory in decode_tiled" in caplog.text


def test_without_any_memory_the_latents_are_not_lost(tiny_vae: Make) -> None:
    vae, latents = tiny_vae(), noise(2)
    limit_memory(vae, 0, torch.OutOfMemoryError, "out of memory")
    with pytest.raises(DecodeMemoryError, match="save these latents and decode them later") as caught:
        decode_video(vae, latents)
    assert torch.equal(caught.value.latents, latents)
    del vae.decoder.forward
    assert torch.equal(decode_video(vae, caught.value.latents), decoded_by_diffusers(vae, latents))


def test_other_errors_are_not_taken_for_a_lack_of_memory(tiny_vae: Make) -> None:
    vae = tiny_vae()
    limit_memory(vae, 0, RuntimeError, "expected all tensors to be on the same device")
    with pytest.raises(RuntimeError, match="same device") as caught:
        decode_video(vae, noise(1))
    assert type(caught.value) is RuntimeError


def test_enabled_tiling_is_used(tiny_vae: Make, caplog: pytest.LogCaptureFixture) -> None:
    vae, latents = tiny_vae(), smooth(1, 10, 13)
    vae.enable_tiling(64, 64, 48, 48)
    limit_memory(vae, 64, torch.OutOfMemoryError, "out of memory")
    assert torch.equal(decode_video(vae, latents), decoded_by_diffusers(vae, latents))
    assert not caplog.records


def test_one_tile_is_the_whole(vae: AutoencoderKLWan) -> None:
    latents = noise(2, 16, 11)
    torch.testing.assert_close(decode_tile_by_tile(vae, latents), decode_video(vae, latents), rtol=0, atol=1e-6)


def test_tiles_fade_into_each_other(tiny_vae: Make) -> None:
    vae, latents = tiny_vae(), smooth(1, 8, 28)  # tiles at latents 0..16 and 12..28, which both hold pixels 96..128
    for parameter in vae.decoder.mid_block.attentions[0].proj.parameters():
        torch.nn.init.zeros_(parameter)  # else each tile attends to itself, and a random VAE gives other colours
    whole, tiles = decode_video(vae, latents), decode_tile_by_tile(vae, latents)
    cut = torch.cat([decode_video(vae, part) for part in latents.split([12, 16], dim=4)], dim=4)
    assert psnr(tiles, whole) > psnr(cut, whole) + 6
    edges = {
        name: (video - whole).diff(dim=4)[..., [95, 127]].square().mean(dim=(0, 1, 2, 3)).sqrt()
        for name, video in (("tiles", tiles), ("cut", cut))
    }
    assert edges["tiles"].max() < 0.2 * edges["cut"].max()  # nothing jumps where a tile begins or ends
    torch.testing.assert_close(tiles[..., :32], whole[..., :32], rtol=0, atol=2e-5)  # nor changes far from there
