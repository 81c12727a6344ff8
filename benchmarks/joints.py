"""Seams and drift: how visible are joints of extensions, transitions and loops; how colours change over ten windows.

    python benchmarks/joints.py [--model NAME_OR_FOLDER] [--lora FILE] [--video FILE] [--seeds 3]

Seam: the mean absolute difference between the two frames at a joint over that between neighbours within eight frames of
it; 1 is no seam. "the VAE alone" is the joint between the given video and its own reconstruction. Kept: PSNR in dB of
the frames taken over at noise 0 against the VAE's own picture. Drift: how far mean colour (0..255) and contrast of
the last of ten windows are from those of the first, for ways to go on. Memory: peak resident memory of `pusa generate`
for a video and for one ten times as long.

With random weights (`tiny`) only the memory figures mean anything.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pusa import PusaCondition, PusaPipeline, media, zoo
from pusa.conditions import fit_image, pixels
from pusa.evaluation.metrics import EQUAL_DB, as_video, drift, psnr, seam
from pusa.long_video import advance_by, chain, roll, spans
from pusa.mini.evaluation.joints import generate_frames, vae_seam
from pusa.request import GenerationRequest

WINDOWS = 10


class Bench:
    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.folder, self.model = folder, args.model
        self.pipe = PusaPipeline.from_pretrained(args.model)
        self.pipe.set_progress_bar_config(disable=True)
        if args.lora:
            self.pipe.load_pusa(args.lora, alpha=args.alpha)
        self.defaults = zoo.defaults_of(args.model)
        self.alpha = args.alpha
        self.prompt = args.prompt
        d = self.defaults
        self.size = (d.width, d.height)
        self.window = (d.num_frames - 1) // 4 + 1
        self.overlap = max(2, min(4, self.window // 3))
        self.clip_file = self._clip(args.video)

    def _clip(self, video: Path | None) -> Path:
        """A short clip at the model's size: cut from a real video, or drawn (a disc that moves over a gradient)."""
        frames = 40
        if video is not None:
            source = media.read_video(video, fps=self.defaults.fps, fit=self.size, max_frames=frames)
            clip = np.stack([np.asarray(fit_image(f, *self.size)) for f in source])
        else:
            y, x = np.mgrid[0 : self.size[1], 0 : self.size[0]]
            radius = self.size[1] / 6
            clip = np.stack([np.dstack([x * 2 % 256, y * 3 % 256, np.full_like(x, 90)]).astype(np.uint8)] * frames)
            for i, frame in enumerate(clip):
                frame[(x - 8 - i) ** 2 + (y - self.size[1] / 2) ** 2 < radius**2] = (240, 200, 60)
        path = self.folder / "clip.mp4"
        with media.VideoWriter(path, width=self.size[0], height=self.size[1], fps=self.defaults.fps) as writer:
            writer.write(clip)
        return path

    # ---- joints ----

    def film(self, seed: int, **asked: Any) -> np.ndarray:
        d = self.defaults
        request = GenerationRequest(
            model="tiny",  # the pipeline is given
            prompt=self.prompt,
            seed=seed,
            width=d.width,
            height=d.height,
            frames=d.num_frames,
            window=d.num_frames,
            overlap=4 * self.overlap - 3,
            steps=d.steps,
            guidance=float(d.guidance),
            shift=float(d.shift),
            alpha=self.alpha,
            fps=float(d.fps),
            negative_prompt="",
            **asked,
        )
        return generate_frames(request, self.pipe)

    def joints(self, seeds: int) -> dict[str, dict[str, float]]:
        given = {"kind": "video", "file": str(self.clip_file)}
        length = len(media.read_video(self.clip_file))
        tasks: dict[str, tuple[dict[str, Any], Callable[[np.ndarray], list[int]]]] = {
            "extension, noise 0": (
                {"task": "extend", "conditions": [{**given, "noise": [0.0]}]},
                lambda f: [length],
            ),
            "extension, noise 0.2": (
                {"task": "extend", "conditions": [{**given, "noise": [0.2]}]},
                lambda f: [length],
            ),
            "transition, noise 0": (
                {"task": "transition", "conditions": [{**given, "noise": [0.0]}] * 2},
                lambda f: [length, len(f) - length],
            ),
            "loop": ({"task": "loop"}, lambda f: [len(f)]),
        }
        results: dict[str, dict[str, float]] = {}
        for name, (asked, joints_of) in tasks.items():
            seams = []
            for seed in range(seeds):
                frames = self.film(seed, **asked)
                joints = joints_of(frames)
                if name == "loop":
                    frames = np.concatenate([frames, frames[:9]])
                seams += [float(seam(as_video(frames), joint)) for joint in joints]
            spread = statistics.pstdev(seams)
            results[name] = {"seam": statistics.mean(seams), "spread": spread}
        results["the VAE alone"] = {"seam": self.vae_seam(), "spread": 0.0}
        return results

    def vae_seam(self) -> float:
        """Measure the joint between an input video and its reconstruction: the part that the VAE's loss adds."""
        clip = media.read_video(self.clip_file)
        whole = clip[: (len(clip) - 1) // 4 * 4 + 1]
        z = self.pipe.encode_frames(pixels([fit_image(frame, *self.size) for frame in whole]))
        rebuilt = media.to_uint8(torch.cat(list(self.pipe.decode_stream(z)), 2))
        return float(vae_seam(as_video(whole), as_video(rebuilt)))

    def kept(self) -> float:
        """The frames taken over, decoded with what was made after them, against the VAE's own picture of them."""
        tail = media.read_video(self.clip_file, last_frames=4 * self.overlap - 3)
        known = PusaCondition(video=tail)
        latents = self.denoise([known], self.window, torch.Generator().manual_seed(0))
        z = self.pipe.encode_frames(pixels([fit_image(f, *self.size) for f in tail]))
        own = media.to_uint8(torch.cat(list(self.pipe.decode_stream(z)), 2))
        shown = media.to_uint8(torch.cat(list(self.pipe.decode_stream(latents)), 2))[: len(own)]
        return float(psnr(as_video(shown), as_video(own)).mean())

    # ---- drift ----

    def denoise(self, conditions: list[PusaCondition], length: int, generator: torch.Generator) -> Tensor:
        d = self.defaults
        return self.pipe(
            self.prompt,
            conditions=conditions,
            width=d.width,
            height=d.height,
            num_frames=4 * length - 3,
            num_inference_steps=d.steps,
            guidance_scale=d.guidance,
            generator=generator,
            output_type="latent",
            max_sequence_length=d.max_sequence_length,
        ).frames

    def ways(self, seed: int) -> dict[str, Iterator[np.ndarray]]:
        """Ways to make ten windows; each yields uint8 frames."""
        total = self.window + (WINDOWS - 1) * (self.window - self.overlap)
        covered = spans(total, self.window, self.overlap)

        def in_latents(noise: float) -> Iterator[np.ndarray]:
            generator = torch.Generator().manual_seed(seed)

            def window(span: Any, known: list[PusaCondition]) -> Tensor:
                noisy = [PusaCondition(latents=c.latents, noise_multiplier=noise) for c in known]
                return self.denoise(noisy, span.length, generator)

            for chunk in self.pipe.decode_stream(chain(covered, window)):
                yield media.to_uint8(chunk)

        def over_frames() -> Iterator[np.ndarray]:
            generator = torch.Generator().manual_seed(seed)
            known: list[PusaCondition] = []
            kept = 4 * self.overlap - 3
            for _ in covered:
                latents = self.denoise(known, self.window, generator)
                frames = media.to_uint8(torch.cat(list(self.pipe.decode_stream(latents)), 2))
                yield frames[kept if known else 0 :]
                known = [PusaCondition(video=frames[-kept:])]

        def as_wave() -> Iterator[np.ndarray]:
            generator = torch.Generator().manual_seed(seed)
            d = self.defaults
            first = self.denoise([], self.window, generator)
            call = {
                "prompt": self.prompt,
                "width": d.width,
                "height": d.height,
                "guidance_scale": d.guidance,
                "max_sequence_length": d.max_sequence_length,
            }
            wave_length = self.window - self.overlap
            steps_per_frame = max(1, round(d.steps / wave_length))

            def noise() -> Tensor:
                return torch.randn(1, *first.shape[1:2], 1, *first.shape[3:], generator=generator)

            wave = roll(
                advance_by(self.pipe, **call),
                first,
                noise,
                window=wave_length,
                steps_per_frame=steps_per_frame,
                shift=d.shift,
            )
            pieces = (z for part in ([first[:, :, : self.overlap]], islice(wave, total - self.overlap)) for z in part)
            for chunk in self.pipe.decode_stream(pieces):
                yield media.to_uint8(chunk)

        return {
            "latents, noise 0": in_latents(0.0),
            "latents, noise 0.2": in_latents(0.2),
            "frames encoded again": over_frames(),
            "wave": as_wave(),
        }

    def drift(self, seeds: int) -> dict[str, dict[str, float]]:
        results: dict[str, dict[str, float]] = {}
        length = 4 * (self.window - self.overlap)
        for name in self.ways(0):
            rows = []
            for seed in range(seeds):
                frames = np.concatenate(list(self.ways(seed)[name]))
                rows.append(tuple(map(float, drift(as_video(frames), length))))
                if seed == 0:
                    media.contact_sheet(frames, frames=24, columns=8).save(
                        self.folder / f"drift-{name.replace(', ', '-').replace(' ', '-')}.png"
                    )
            colours, contrasts, motions = zip(*rows, strict=True)
            results[name] = {
                "colour": statistics.mean(colours),
                "colour_spread": statistics.pstdev(colours),
                "contrast_ratio": statistics.mean(contrasts),
                "motion_ratio": statistics.mean(motions),
            }
        return results


def peak_memory_mb(frames: int) -> float:
    """Measure a fresh process that makes a video of `frames` frames with `tiny`."""
    code = (
        "import resource, sys, tempfile, pathlib\n"
        "from pusa.generate import generate\nfrom pusa.request import GenerationRequest\n"
        "folder = pathlib.Path(tempfile.mkdtemp())\n"
        f"request = GenerationRequest(model='tiny', prompt='a cat', frames={frames}, steps=1, guidance=1.0, seed=0)\n"
        "list(generate(request, folder / 'out.mp4'))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)\n"
    )
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini" if "mini" in zoo.ZOO else "tiny")
    parser.add_argument("--lora", type=Path)
    parser.add_argument("--alpha", type=float, default=1.4)
    parser.add_argument("--prompt", default="a duck slides to the right under the sea")
    parser.add_argument("--video", type=Path, help="a real video to extend (default: one that is drawn)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="folder for contact sheets of the ten windows")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.output or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(args, folder)
        result: dict[str, Any] = {
            "model": args.model,
            "window": bench.window,
            "overlap": bench.overlap,
            "seeds": args.seeds,
            "joints": bench.joints(args.seeds),
            "kept_psnr_db": bench.kept(),
            "drift_over_windows": WINDOWS,
            "drift": bench.drift(args.seeds),
            "memory_mb": {frames: peak_memory_mb(frames) for frames in (97, 961)},
            "own_peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
    print(f"{'joint':24} {'seam':>7} {'+-':>6}")
    for name, row in result["joints"].items():
        print(f"{name:24} {row['seam']:7.2f} {row['spread']:6.2f}")
    kept = result["kept_psnr_db"]
    print(f"frames taken over, against the VAE's own picture: {'equal' if kept >= EQUAL_DB else f'{kept:.1f} dB'}")
    print(f"\n{f'{WINDOWS} windows, continued by':24} {'colour':>7} {'+-':>6} {'contrast':>9} {'motion':>7}")
    for name, row in result["drift"].items():
        print(
            f"{name:24} {row['colour']:7.2f} {row['colour_spread']:6.2f} {row['contrast_ratio']:9.2f} "
            f"{row['motion_ratio']:7.2f}"
        )
    print("\npeak memory: " + ", ".join(f"{f} frames {m:.0f} MB" for f, m in result["memory_mb"].items()))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
