"""Compare previews without the VAE with the decoded video, and measure their cost.

Makes four clips with a model and compares each latent frame, after half of the steps and after the last, with the
middle one of its four frames in the decoded video. The rows: the linear map of the package, one fitted as for other
VAEs, and the VAE's own decoder of one latent frame alone, as previews were made before. Prints a table and a JSON line.
``--write`` fits the map of the package with 192 clips first, and writes its file.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from pusa import PusaPipeline
from pusa.events import Event, Preview
from pusa.generate.progress import Previews
from pusa.models.latent_preview import SHIPPED, FrameDecoder, LatentPreview, fit, identity_of_vae, preview_of
from pusa.models.vae import decode_video

PROMPTS = (
    "a duck slides to the right under the sea",
    "a rocket rises at night",
    "a penguin stands still in the snow",
    "a fox spins in the forest",
)


def make(pipe: PusaPipeline, prompt: str, seed: int) -> tuple[list[Tensor], float]:
    """Make the predicted clean latents after half of the steps and after the last, and the seconds of a step."""
    denoised: list[Tensor] = []
    times = [time.perf_counter()]

    def after_step(_: Any, __: int, ___: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
        denoised.append(tensors["denoised"].clone())
        times.append(time.perf_counter())
        return {}

    pipe(
        prompt=prompt,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        callback_on_step_end=after_step,
        callback_on_step_end_tensor_inputs=["denoised"],
    )
    steps = [after - before for before, after in pairwise(times[1:])]
    return [denoised[len(denoised) // 2 - 1], denoised[-1]], statistics.median(steps)


def decode_alone(pipe: PusaPipeline) -> FrameDecoder:
    """Decode one latent frame as if it were the first of a video."""

    def decode(latents: Tensor, index: int) -> Tensor:
        frame = decode_video(pipe.vae, latents[:, :, index : index + 1])[0, :, 0]
        return ((frame.float() + 1) * 127.5).round().byte().permute(1, 2, 0)

    return decode


def psnr(picture: Tensor, frame: Tensor, scale: int) -> tuple[float, float]:
    """Compare uint8 ``[H, W, 3]`` with a frame ``[3, H, W]`` in -1..1: in full size, and in latent pixels."""
    values = picture.permute(2, 0, 1)[None].float() / 127.5 - 1
    full = F.interpolate(values, size=frame.shape[1:], mode="bicubic", antialias=True).clamp(-1, 1)
    small = [F.interpolate(x, scale_factor=1 / scale, mode="area") for x in (full, frame[None])]
    errors = torch.stack([(full[0] - frame).square().mean(), (small[0] - small[1]).square().mean()])
    in_full, in_latent_pixels = (10 * torch.log10(4 / errors)).tolist()
    return in_full, in_latent_pixels


def seconds_per_preview(pipe: PusaPipeline, latents: Tensor, repeats: int = 20) -> float:
    """Measure all that a preview costs the denoising: map, scaling and WebP."""
    seen: list[Event] = []
    previews = Previews(seen.append, every=1)
    previews.prepare(pipe)
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        previews.show(pipe, latents)
        times.append(time.perf_counter() - began)
    assert len([event for event in seen if isinstance(event, Preview)]) == repeats
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--write", action="store_true", help="fit the map of the package anew and write its file")
    options = parser.parse_args()
    pipe = PusaPipeline.from_pretrained(options.model)
    pipe.set_progress_bar_config(disable=True)
    if options.write:
        save_file({identity_of_vae(pipe.vae): fit(pipe.vae, clips=192).half()}, SHIPPED)
    began = time.perf_counter()
    fitted = LatentPreview(fit(pipe.vae))
    fit_seconds = time.perf_counter() - began
    rows: dict[str, FrameDecoder] = {
        "linear map of the package": preview_of(pipe.vae),
        "linear map fitted on the spot": fitted,
        "VAE, one latent frame alone": decode_alone(pipe),
    }
    errors: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
    decode_times: dict[str, list[float]] = {name: [] for name in rows}
    step_seconds = []
    for seed, prompt in enumerate(PROMPTS):
        stages, seconds = make(pipe, prompt, seed)
        step_seconds.append(seconds)
        for latents in stages:
            video = decode_video(pipe.vae, latents)[0].float()
            for name, decode in rows.items():
                for index in range(1, latents.shape[2]):
                    picture, seconds = timed(decode, latents, index)
                    errors[name].append(psnr(picture, video[:, 4 * index - 1], pipe.vae_scale_factor_spatial))
                    decode_times[name].append(seconds)
    step = statistics.median(step_seconds)
    preview = seconds_per_preview(pipe, latents)
    print("| preview | PSNR in dB, full size | in latent pixels | ms a picture |\n|---|---|---|---|")
    results: dict[str, Any] = {}
    for name in rows:
        full, small = (statistics.mean(values) for values in zip(*errors[name], strict=True))
        milliseconds = 1e3 * statistics.median(decode_times[name])
        results[name] = {"psnr": round(full, 1), "psnr_small": round(small, 1), "ms": round(milliseconds, 2)}
        print(f"| {name} | {full:.1f} | {small:.1f} | {milliseconds:.2f} |")
    share = 100 * preview / step
    print(f"\na preview: {1e3 * preview:.2f} ms with WebP, {share:.2f} % of a step of {1e3 * step:.0f} ms")
    print(f"fitting a map on the spot: {fit_seconds:.1f} s, once for each VAE")
    results |= {
        "preview_ms": round(1e3 * preview, 2),
        "step_ms": round(1e3 * step),
        "fit_seconds": round(fit_seconds, 1),
    }
    print(json.dumps(results))


def timed(decode: Callable[[Tensor, int], Tensor], latents: Tensor, index: int) -> tuple[Tensor, float]:
    """Return the picture and the seconds it took."""
    began = time.perf_counter()
    return decode(latents, index), time.perf_counter() - began


if __name__ == "__main__":
    main()
