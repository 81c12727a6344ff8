"""A single picture at a later place of the clip: should it be encoded alone, or as four static frames in context?

Trains small `AutoencoderKLWan`s on clips drawn here, in the structure of Wan 2.1's VAE (which Pusa uses) and of Wan
2.2's, then puts a picture into one latent frame of a held-out clip, encoded in each way, decodes and compares. Measures
the VAE only: what the transformer makes of either latent needs real weights. Prints tables and one JSON line.
"""

import argparse
import itertools
import json
import math
import time
from collections import defaultdict
from pathlib import Path

import av
import torch
from diffusers import AutoencoderKLWan
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from pusa.conditions import PusaCondition, fit_image, pixels, place
from pusa.models.vae import decode_video, encode_video

FRAMES = 17  # 5 latent frames
SLOTS = (1, 2, 4)
STRUCTURES = {"wan 2.1": False, "wan 2.2": True}  # name: is_residual
ENCODINGS = {"single": 0, "repeat": 1, "repeat 9": 2}  # way: which latent frame of 9 equal pictures


# --- drawn clips -----------------------------------------------------------------------------------------------------


def draw_fields(count: int, channels: int, size: int, generator: torch.Generator) -> Tensor:
    """Smooth random fields ``[count, channels, size, size]`` of unit variance, with the spectrum of photographs."""
    rows, columns = torch.fft.fftfreq(size), torch.fft.rfftfreq(size)
    frequency = (rows[:, None].square() + columns.square()).sqrt().clamp(min=1 / size)
    power = 1.5 + torch.rand(count, 1, 1, 1, generator=generator)
    white = torch.fft.rfft2(torch.randn(count, channels, size, size, generator=generator))
    fields = torch.fft.irfft2(white / frequency**power, s=(size, size))
    return (fields - fields.mean((2, 3), keepdim=True)) / fields.std((2, 3), keepdim=True)


def draw_texture(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Pictures ``[count, 3, size, size]`` in -1..1: two colours that blend or meet at an edge, and a little grain."""
    blend, grain = draw_fields(count, 4, size, generator).split([1, 3], dim=1)
    sharpness = 1 + 9 * torch.rand(count, 1, 1, 1, generator=generator).square()
    grey = 1.6 * torch.rand(2, count, 1, 1, 1, generator=generator) - 0.8
    one, other = grey + 0.3 * torch.randn(2, count, 3, 1, 1, generator=generator)
    contrast = 0.2 * torch.rand(count, 1, 1, 1, generator=generator)
    grain = grain.mean(1, keepdim=True).lerp(grain, 0.3)  # mostly of light, a little of colour
    return (one + (other - one) * torch.sigmoid(sharpness * blend) + contrast * grain).clamp(-1, 1)


def draw_path(count: int, frames: int, speed: Tensor, reach: float, generator: torch.Generator) -> Tensor:
    """Affine maps ``[count, frames, 2, 3]`` from the window to a layer that drifts, swings, turns and grows."""
    t = torch.arange(frames) - frames / 2  # [frames]
    draw = torch.randn(count, 5, 1, generator=generator)
    swing = torch.sin(t * (0.1 + 0.4 * torch.rand(count, 1, 1, generator=generator)))  # [count, 1, frames]
    start = reach * (2 * torch.rand(count, 2, 1, generator=generator) - 1)
    x, y = (start + speed * (0.04 * draw[:, :2] * t + 0.15 * draw[:, 2:3] * swing)).unbind(1)  # [count, frames]
    angle = 3 * start[:, 0] + 0.04 * speed[:, 0] * draw[:, 3] * t
    scale = torch.exp(0.02 * speed[:, 0] * draw[:, 4] * t)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    rotate = torch.stack([torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)], -2)
    return torch.cat([rotate, -rotate @ torch.stack([x, y], -1)[..., None]], -1)


def draw_clips(count: int, frames: int, size: int, generator: torch.Generator) -> Tensor:
    """Clips ``[count, 3, frames, size, size]`` in -1..1: soft-edged things that move over a moving background.

    Speeds go from 0 (one clip in seven stands still) to about two pixels a frame at 64 px.
    """
    speed = torch.rand(count, 1, 1, generator=generator).mul(1.17).sub(0.17).clamp(min=0)

    def film(layer: Tensor, zoom: float, reach: float, padding: str) -> Tensor:
        path = draw_path(count, frames, speed, reach, generator).flatten(0, 1) / zoom
        grid = F.affine_grid(path, [count * frames, 1, size, size], align_corners=False)
        return F.grid_sample(layer.repeat_interleave(frames, 0), grid, padding_mode=padding, align_corners=False)

    canvas = size * 3 // 2
    background = draw_texture(count, canvas, generator)
    patches = torch.sigmoid(12 * draw_fields(count, 1, canvas, generator) - 8)
    background = background.lerp(draw_texture(count, canvas, generator), patches)
    clips = film(background, zoom=1.5, reach=0.2, padding="reflection")
    axis = torch.linspace(-1.2, 1.2, size // 2)
    radius = (axis[:, None].abs() ** 3 + axis.abs() ** 3) ** (1 / 3)
    for zoom in (0.7, 0.5, 0.35):
        edge = 0.85 - radius + 0.12 * draw_fields(count, 1, size // 2, generator)
        thing = torch.cat([draw_texture(count, size // 2, generator), torch.sigmoid(25 * edge)], dim=1)
        rgb, alpha = film(thing, zoom=zoom, reach=0.8, padding="zeros").split([3, 1], dim=1)
        clips = clips.lerp(rgb, alpha)
    eight_bit = ((clips + 1) * 127.5).round() / 127.5 - 1
    return eight_bit.unflatten(0, (count, frames)).transpose(1, 2)


# --- a small VAE -----------------------------------------------------------------------------------------------------


def build_vae(*, is_residual: bool) -> AutoencoderKLWan:
    """An image autoencoder inflated in time, as Wan's VAE began (arXiv 2503.20314): only the latest frame counts."""
    vae = AutoencoderKLWan(
        base_dim=32,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        is_residual=is_residual,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        latents_mean=[0.0] * 16,
        latents_std=[1.0] * 16,
    )
    with torch.no_grad():
        for name, module in vae.named_modules():
            if isinstance(module, nn.Conv3d) and module.kernel_size[0] == 3:
                module.weight[:, :, :2] = 0
                module.weight[:, :, 2] *= math.sqrt(3)
                if name.endswith("time_conv") and module.bias is not None:  # hands frames on, twice when upsampling
                    identity = torch.eye(module.in_channels)
                    module.weight[:, :, 2, 0, 0] = identity.repeat(module.out_channels // module.in_channels, 1)
                    module.bias.zero_()
            if isinstance(module, nn.Conv2d | nn.Conv3d):  # channels last: faster, and one row per output for Muon
                module.weight.data = module.weight.data.movedim(1, -1).contiguous().movedim(-1, 1)
    return vae


def reconstruction_loss(output: Tensor, clips: Tensor) -> Tensor:
    """L1 at four scales and MSE."""
    error = (output - clips).transpose(1, 2).flatten(0, 1)  # [B * frames, 3, H, W]
    return sum((F.avg_pool2d(error, scale).abs().mean() for scale in (1, 2, 4, 8)), error.square().mean())


def train_vae(minutes: float, seed: int, *, is_residual: bool) -> tuple[AutoencoderKLWan, int]:
    """Train for `minutes` of CPU time: single frames for the first third, then clips of 5 to 17 frames at 64 px.

    Returns:
        The VAE, with the mean and deviation of its latents in its config, and the number of steps taken.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    vae = build_vae(is_residual=is_residual).train()
    kernels = [m.weight for m in vae.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)]
    matrices = [nn.Parameter(kernel.data.movedim(1, -1).flatten(1)) for kernel in kernels]  # same memory
    rest = [p for p in vae.parameters() if all(p is not kernel for kernel in kernels)]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.018, weight_decay=0, momentum=0.9),
        torch.optim.AdamW(rest, lr=0.018 / 8, betas=(0.9, 0.97), weight_decay=0),
    ]
    heats = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    start, step, done = time.process_time(), 0, 0.0
    while done < 1:
        in_video = done > 1 / 3
        heat = 0.5 * max(0.03, math.cos((done - 1 / 3) * 0.75 * math.pi)) if in_video else min(1, step / 40)
        latent_frames = (2, 3, 3, 5, 1)[step % 5] if in_video else 1
        clips = draw_clips(16 if latent_frames == 1 else 15 // latent_frames, 4 * latent_frames - 3, 64, generator)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(clips).latent_dist
            output = vae.decode(posterior.sample()).sample
        loss = reconstruction_loss(output.float(), clips) + 3e-5 * posterior.kl().sum() / posterior.mean.numel()
        vae.zero_grad()
        loss.backward()
        for matrix, kernel in zip(matrices, kernels, strict=True):
            matrix.grad = None if kernel.grad is None else kernel.grad.movedim(1, -1).flatten(1)
        nn.utils.clip_grad_norm_([*matrices, *rest], 1.0)
        for optimizer, heat_of_groups in zip(optimizers, heats, strict=True):
            for group, full in zip(optimizer.param_groups, heat_of_groups, strict=True):
                group["lr"] = full * heat
            optimizer.step()
        step += 1
        done = (time.process_time() - start) / (60 * minutes)
        if step % 100 == 0:
            print(f"  step {step}, {done:.0%}: loss {loss:.4f}", flush=True)
    latents = encode_video(vae.eval(), draw_clips(32, FRAMES, 64, generator))
    vae.register_to_config(
        latents_mean=latents.mean((0, 2, 3, 4)).tolist(), latents_std=latents.std((0, 2, 3, 4)).tolist()
    )
    return vae, step


def cached_vae(folder: Path, structure: str, seed: int, minutes: float) -> tuple[AutoencoderKLWan, int]:
    """The VAE trained before into `folder`, or a new one, kept there; and its training steps."""
    kept = folder / f"{structure.replace(' ', '')}-seed{seed}-{minutes:g}min"
    note = kept / "training.json"
    if not note.exists():
        print(f"training {kept.name}", flush=True)
        vae, steps = train_vae(minutes, seed, is_residual=STRUCTURES[structure])
        vae.save_pretrained(kept)
        note.write_text(json.dumps({"steps": steps}))
    return AutoencoderKLWan.from_pretrained(kept).eval(), json.loads(note.read_text())["steps"]


# --- held-out clips --------------------------------------------------------------------------------------------------


def real_clips(inputs: Path, size: int, count: int) -> dict[str, Tensor]:
    """Clips ``[count, 3, FRAMES, size, size]`` in -1..1: of the video, every second frame; of pans over the pictures;
    and of the pictures standing still."""
    pictures = [Image.open(path).convert("RGB") for path in sorted(inputs.glob("*.jpg"))]
    movies = sorted(inputs.glob("*.mp4"))
    if not pictures or not movies:
        raise FileNotFoundError(
            f"{inputs} has {len(pictures)} .jpg and {len(movies)} .mp4 files: at least 1 of each is needed"
        )
    with av.open(str(movies[0])) as container:
        shots = [fit_image(frame.to_image(), size, size) for frame in container.decode(video=0)]
    first = torch.linspace(0, len(shots) - 2 * FRAMES, count).long().tolist()
    pans, stills = [], []
    for number in range(count):
        picture = pictures[number % len(pictures)]
        width, height = picture.size
        side, travel = height * 3 // 4, height // (2 if number < len(pictures) else 6)  # fast pans, then slow ones
        views = []
        for step in range(FRAMES):
            left, top = width / 6 + travel * step / (FRAMES - 1), height / 8
            views.append(picture.resize((size, size), Image.Resampling.LANCZOS, (left, top, left + side, top + side)))
        pans.append(pixels(views))
        stills.append(pixels([views[(number // len(pictures)) * (FRAMES - 1)]] * FRAMES))
    return {
        "video": torch.cat([pixels(shots[start : start + 2 * FRAMES : 2]) for start in first]),
        "pans": torch.cat(pans),
        "stills": torch.cat(stills),
    }


# --- measuring -------------------------------------------------------------------------------------------------------


def is_still(clips: Tensor) -> bool:
    return bool((clips == clips[:, :, :1]).all())


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """dB per clip, of tensors ``[N, ...]`` in -1..1, cut at 100."""
    return (10 * torch.log10(4 / (a - b).flatten(1).square().mean(1))).clamp(max=100)


def jump(video: Tensor, frame: int) -> Tensor:
    """Mean change from `frame` to the next, in levels of 0..255, per clip."""
    return 127.5 * (video[:, :, frame + 1] - video[:, :, frame]).abs().flatten(1).mean(1)


class Results:
    """Figures per clip by (structure, seed, size, clips, picture at, way, slot) and metric."""

    def __init__(self) -> None:
        self.values: defaultdict[tuple[str, int, int, str, str, str, int], dict[str, Tensor]] = defaultdict(dict)

    def pooled(self, metric: str, **wanted: object) -> Tensor:
        """All figures of a metric whose keys match."""
        names = ("structure", "seed", "size", "clips", "picture", "way", "slot")
        found = [
            metrics[metric]
            for key, metrics in self.values.items()
            if metric in metrics and all(dict(zip(names, key, strict=True))[n] == v for n, v in wanted.items())
        ]
        return torch.cat(found) if found else torch.empty(0)


def measure(vae: AutoencoderKLWan, clips: Tensor, results: Results, key: tuple[str, int, int, str]) -> None:
    """Put the first or the last picture of a latent frame into its place, in each way, and decode."""
    latents = encode_video(vae, clips)  # [N, C, 5, h, w], normalised
    truth = decode_video(vae, latents)
    pictures = ("last",) if is_still(clips) else ("first", "last")
    for slot, at in itertools.product(SLOTS, pictures):
        begin, end = 4 * slot - 3, 4 * slot + 1
        own = clips[:, :, begin:end]
        picture = own[:, :, 0 if at == "first" else 3]
        known = {"in context": latents[:, :, slot]}
        copies = encode_video(vae, picture[:, :, None].repeat(1, 1, 9, 1, 1))  # a prefix encodes as it would alone
        known |= {way: copies[:, :, taken] for way, taken in ENCODINGS.items()}
        known["four frames"] = encode_video(vae, torch.cat([own[:, :, :1], own], dim=2))[:, :, 1]
        for way, latent in known.items():
            placed = torch.cat([latents[:, :, :slot], latent[:, :, None], latents[:, :, slot + 1 : slot + 2]], dim=2)
            video = decode_video(vae, placed)
            shown = video[:, :, begin:end]
            there = latents[:, :, slot]
            shift = latent.mean((0, 2, 3)) - there.mean((0, 2, 3))
            spread = latent.std((0, 2, 3)) / there.std((0, 2, 3))
            figures = {
                **{f"picture {i + 1}": psnr(shown[:, :, i], picture) for i in range(4)},
                "moment": psnr(shown, own),
                "before": psnr(video[:, :, :begin], truth[:, :, :begin]),
                "distance": ((latent - there).flatten(1).norm(dim=1) / there.flatten(1).norm(dim=1)),
                "shift": shift.square().mean().sqrt().repeat(len(clips)),
                "spread": spread.log().mean().exp().repeat(len(clips)),
                "jump in": jump(video, begin - 1) - jump(truth, begin - 1),
                "within": torch.stack([jump(video, i) for i in range(begin, end - 1)]).mean(0),
            }
            if slot < SLOTS[-1]:
                figures["after"] = psnr(video[:, :, end:], truth[:, :, end : end + 4])
                figures["jump out"] = jump(video, end - 1) - jump(truth, end - 1)
            results.values[*key, at, way, slot] = figures


def difference_from_conditions(vae: AutoencoderKLWan, clips: Tensor) -> float:
    """Largest difference of `PusaCondition`'s latents from those measured here, over both encodings."""
    picture = clips[:1, :, 8]  # [1, 3, H, W]
    copies = encode_video(vae, picture[:, :, None].repeat(1, 1, 9, 1, 1))[0]  # [C, 3, h, w]
    size, gaps = clips.shape[-1], []
    for way in ("single", "repeat"):
        condition = PusaCondition(image=(picture[0] + 1) / 2, frame_index=8, encode=way)
        shape = (copies.shape[0], 5, *copies.shape[2:])
        placement = place(
            [condition], encode=lambda v: encode_video(vae, v), shape=shape, num_frames=FRAMES, height=size, width=size
        )
        gaps.append((placement.latents[:, 2] - copies[:, ENCODINGS[way]]).abs().max().item())
    return max(gaps)


METRICS = {
    "picture 1": "the picture against decoded frame 1 of its latent frame, dB; then 2, 3 and 4",
    "picture 2": "",
    "picture 3": "",
    "picture 4": "",
    "moment": "the four decoded frames against the clip's own, dB",
    "before": "frames decoded before it against those of the clip's own latents, dB (100: equal)",
    "after": "the four frames after it, likewise",
    "distance": "from the clip's own latent, over its norm",
    "shift": "RMS over channels of the mean's difference from the clip's own latents",
    "spread": "standard deviation over theirs",
    "jump in": "change at the edge before, above that with the clip's own latent, levels of 255",
    "jump out": "change at the edge after, likewise",
    "within": "change from frame to frame inside, levels of 255",
}


def print_tables(results: Results) -> list[dict[str, object]]:
    """Mean and deviation over clips, latent frames and seeds; and how `repeat` compares with `single`, pairwise."""
    rows: list[dict[str, object]] = []
    groups = dict.fromkeys((key[0], *key[2:5]) for key in results.values)
    for structure, size, clips, at in groups:
        here = {"structure": structure, "size": size, "clips": clips, "picture": at}
        print(f"\n{structure} structure | {size} px | {clips} | the picture is the {at} of its four frames")
        print(f"{'':12}" + "".join(f"{metric:>14}" for metric in METRICS))
        for way in ("in context", *ENCODINGS, "four frames"):
            found = {metric: results.pooled(metric, **here, way=way) for metric in METRICS}
            print(f"{way:12}" + "".join(f"{f'{v.mean():.2f} +-{v.std():.2f}':>14}" for v in found.values()))
            means = {metric: float(f"{v.mean():.4g}") for metric, v in found.items()}
            rows.append({**here, "way": way, **means})
        for way in ("single", "repeat"):
            by_slot = [results.pooled("distance", **here, way=way, slot=slot).mean().item() for slot in SLOTS]
            print(f"  {way}, distance in latent frames {SLOTS}: " + ", ".join(f"{v:.3f}" for v in by_slot))
        seeds = sorted({key[1] for key in results.values if key[0] == structure})
        for metric in ("picture 1", "picture 4", "moment", "after", "distance"):
            gaps = [
                results.pooled(metric, **here, seed=seed, way="repeat")
                - results.pooled(metric, **here, seed=seed, way="single")
                for seed in seeds
            ]
            gap = torch.cat(gaps)
            error = gap.std() / len(gap) ** 0.5
            by_seed = ", ".join(f"{g.mean():+.2f}" for g in gaps)
            print(
                f"  repeat - single, {metric}: {gap.mean():+.2f} +-{error:.2f}, "
                f"above 0 in {(gap > 0).float().mean():.0%}; by seed {by_seed}"
            )
            rows.append({**here, "gap": metric, "mean": round(float(gap.mean()), 3), "error": round(float(error), 3)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder for the trained VAEs")
    parser.add_argument("--inputs", type=Path, help="folder of .jpg pictures and one .mp4, none of it trained on")
    parser.add_argument("--minutes", type=float, default=5, help="CPU time to train each VAE (default 5)")
    parser.add_argument("--seeds", type=int, default=2, help="VAEs of Wan 2.1's structure (default 2); one of 2.2's")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64], help="pixels (default 64)")
    parser.add_argument("--clips", type=int, default=8, help="clips of each kind (default 8)")
    options = parser.parse_args()
    torch.set_num_threads(1)

    sets: dict[tuple[int, str], Tensor] = {}
    for size in options.sizes:
        drawn = draw_clips(options.clips, FRAMES, size, torch.Generator().manual_seed(7))
        sets[size, "drawn"] = drawn
        if options.inputs:
            sets |= {(size, name): clips for name, clips in real_clips(options.inputs, size, options.clips).items()}
    results, models, start = Results(), [], time.perf_counter()
    for structure, seed in [*(("wan 2.1", seed) for seed in range(options.seeds)), ("wan 2.2", 0)]:
        vae, steps = cached_vae(options.cache, structure, seed, options.minutes)
        model: dict[str, object] = {"structure": structure, "seed": seed, "steps": steps}
        for (size, name), clips in sets.items():
            rebuilt = decode_video(vae, encode_video(vae, clips))
            model[f"{name} {size} px, dB"] = round(psnr(rebuilt, clips).mean().item(), 2)
            measure(vae, clips, results, (structure, seed, size, name))
        model["difference from PusaCondition"] = difference_from_conditions(vae, drawn)
        models.append(model)
        print(model, flush=True)
    print("\n".join(f"{metric}: {meaning}" for metric, meaning in METRICS.items() if meaning))
    rows = print_tables(results)
    seconds = round(time.perf_counter() - start)
    print(json.dumps({"benchmark": "keyframe_encoding", "seconds": seconds, "models": models, "rows": rows}))


if __name__ == "__main__":
    main()
