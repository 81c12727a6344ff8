"""Measure what marking costs, and what a watermark survives: ``python benchmarks/provenance.py [cost] [watermark]``.

Cost: the time of encoding a clip, and of each mark; the quickest of several runs.
Robustness: a real video is marked, encoded as H.264, scaled and cropped, and read again.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pusa import media
from pusa.conditions import fit_image
from pusa.generate.inputs import Input, carry
from pusa.provenance.certificates import new_certificate
from pusa.provenance.marks import read_marks
from pusa.provenance.options import MarkOptions
from pusa.provenance.watermark import Watermarker, detect, load_watermarker, payload_of
from pusa.provenance.xmp import GENERATED, Mark, write_packet
from pusa.request import ConditionSpec, GenerationRequest
from pusa.zoo import defaults_of

WIDTH, HEIGHT, FRAMES = 832, 480, 81
RUNS = 15


def moving_picture(picture: np.ndarray, frames: int) -> np.ndarray:
    """Pan slowly over a picture: uint8 ``[frames, HEIGHT, WIDTH, 3]``."""
    large = np.asarray(fit_image(picture, WIDTH + frames, HEIGHT + frames))
    return np.stack([large[i : i + HEIGHT, i : i + WIDTH] for i in range(frames)])


def seconds_of(call: Callable[[], Any], runs: int = RUNS) -> float:
    """Return the least wall time of several calls in seconds: a busy machine only adds to it."""
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


def read_condition(source: Input) -> np.ndarray:
    """Read an image as a condition of the clip: uint8 ``[HEIGHT, WIDTH, 3]``."""
    return np.asarray(fit_image(source.read_image(), WIDTH, HEIGHT))


def measure_cost(folder: Path, photograph: Path) -> dict[str, float]:
    """Measure each mark by itself, in seconds, and all of them as a share of encoding the clip."""
    frames = moving_picture(np.asarray(media.read_image(photograph).convert("RGB")), FRAMES)
    certificate = new_certificate(folder / "certificate", organization="Benchmark")
    signer = MarkOptions(sign_cert=str(certificate["certificate"]), sign_key=str(certificate["key"])).signer()
    assert signer is not None
    packet = write_packet(Mark(GENERATED, "pusa (wan2.1-14b)", "1", tool="pusa 1", prompt="a duck"))
    spec = ConditionSpec(kind="image", file=str(photograph))
    request = GenerationRequest(prompt="a duck", width=WIDTH, height=HEIGHT, model="wan2.1-14b", conditions=[spec])
    resolved = request.resolved(defaults_of("wan2.1-14b"))
    source = Input(resolved.conditions[0], photograph, "0" * 64)
    carried = carry([source], resolved, {})
    metadata = {"pusa": "1", "request": carried.request.model_dump(mode="json"), "inputs": carried.contents}
    path = folder / "clip.mp4"

    def encode(**options: Any) -> None:
        with media.VideoWriter(path, width=WIDTH, height=HEIGHT, **options) as writer:
            writer.write(frames)

    encoding = seconds_of(encode, 5)
    encode(metadata=metadata, xmp=packet)
    copying = seconds_of(lambda: (carry([source], resolved, {}), read_condition(carried.inputs[0])))
    reading = seconds_of(lambda: (media.read_image(photograph), read_condition(source)))  # the work without a copy
    parts = {
        "read the marks of the input": seconds_of(lambda: read_marks(photograph)),
        "copy it, beside reading it": copying - reading,
        "write the packet": seconds_of(lambda: write_packet(Mark(GENERATED, "pusa", "1"))),
        "sign": seconds_of(lambda: signer.sign(path, source_type=GENERATED)),
    }
    print(f"encoding {FRAMES} frames of {WIDTH}x{HEIGHT}: {encoding:.2f} s")
    for name, seconds in parts.items():
        print(f"  {name:<28} {1000 * seconds:7.1f} ms  {100 * seconds / encoding:5.2f} %")
    share = sum(parts.values()) / encoding
    print(f"  {'together':<28} {1000 * sum(parts.values()):7.1f} ms  {100 * share:5.2f} %")
    return {"encoding": encoding, **parts, "share": share}


def measure_watermark(name: str, video: Path, count: int) -> list[dict[str, Any]]:
    """Measure the share of correct bits, and detection, after each attack."""
    marker = load_watermarker(name)
    given = media.read_video(video, max_frames=count, fit=(WIDTH, HEIGHT))
    frames = np.stack([np.asarray(fit_image(frame, WIDTH, HEIGHT)) for frame in given])
    payload = payload_of("benchmark", marker.bits)
    began = time.perf_counter()
    marked = marker.embed(frames, payload)
    each = (time.perf_counter() - began) / len(frames)
    noise = np.mean((marked.astype(np.float64) - frames) ** 2)
    print(f"{name}: {len(frames)} frames, {each:.2f} s a frame, {10 * np.log10(255**2 / noise):.1f} dB")
    attacks: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "none": lambda f: f,
        **{f"H.264, crf {crf}": _encoder(crf) for crf in (17, 23, 28, 35)},
        **{f"scaled to {p} %": _scaler(p / 100) for p in (75, 50, 25)},
        **{f"cropped to {p} %": _cropper(p / 100) for p in (90, 75, 50)},
        "50 %, then crf 28": lambda f: _encoder(28)(_scaler(0.5)(f)),
        "not marked at all": lambda _: frames,
    }
    return [_attack(attack, text, marked, marker, payload) for text, attack in attacks.items()]


def _attack(
    attack: Callable[[np.ndarray], np.ndarray], text: str, marked: np.ndarray, marker: Watermarker, payload: np.ndarray
) -> dict[str, Any]:
    found = detect(attack(marked), marker, payload)
    print(f"  {text:<20} {100 * (found.bit_accuracy or 0):6.1f} % of bits  {'found' if found.found else 'not found'}")
    return {"attack": text, "bit_accuracy": found.bit_accuracy, "found": found.found}


def _encoder(crf: int) -> Callable[[np.ndarray], np.ndarray]:
    def attack(frames: np.ndarray) -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "attacked.mp4"
            with media.VideoWriter(path, width=frames.shape[2], height=frames.shape[1], crf=crf) as writer:
                writer.write(frames)
            return media.read_video(path)

    return attack


def _scaler(scale: float) -> Callable[[np.ndarray], np.ndarray]:
    size = (round(WIDTH * scale / 2) * 2, round(HEIGHT * scale / 2) * 2)
    return lambda frames: np.stack([np.asarray(Image.fromarray(frame).resize(size)) for frame in frames])


def _cropper(share: float) -> Callable[[np.ndarray], np.ndarray]:
    top, left = round(HEIGHT * (1 - share) / 2), round(WIDTH * (1 - share) / 2)
    return lambda frames: np.ascontiguousarray(frames[:, top : HEIGHT - top, left : WIDTH - left])


def main() -> None:
    """Run the measurements named, with the inputs in PUSA_SHARED or beside the repository."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", default=["cost", "watermark"], help="cost, watermark")
    what = parser.parse_args().what
    inputs = Path(os.environ.get("PUSA_SHARED", Path(__file__).parents[2] / "shared")) / "inputs"
    results: dict[str, Any] = {}
    if "cost" in what:
        with tempfile.TemporaryDirectory() as folder:
            results["cost"] = measure_cost(Path(folder), inputs / "input_image.jpg")
    if "watermark" in what:
        results["watermark"] = measure_watermark("rivagan", inputs / "input_video.mp4", 8)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
