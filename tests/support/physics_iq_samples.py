"""Make a tiny Physics-IQ download of drawn clips: the layout and the names are the benchmark's."""

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from pusa.media import VideoWriter

VIEWS = ("perspective-left", "perspective-center", "perspective-right")
SCENARIOS = {"trimmed-ball-falls": "Solid Mechanics", "trimmed-ink-spreads": "Fluid Dynamics"}
BEFORE_SECONDS, AFTER_SECONDS = 3, 5
WIDTH, HEIGHT = 192, 112


def frames(scenario: int, view: int, take: int, fps: int, count: int, start: float = 0.0) -> Iterator[np.ndarray]:
    """Draw a bright square that moves over a shaded background; take 2 is a little faster. uint8 [H, W, 3]."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    shade = np.stack([40 + rows // 2, 60 + columns // 4, 90 + (rows + columns) // 8], axis=-1).astype(np.uint8)
    speed = (14 + 3 * view) * (1 + 0.08 * (take - 1))  # pixels a second
    for index in range(count):
        seconds = start + index / fps
        left = 8 + round(speed * seconds) if scenario == 0 else 60 + 10 * view
        top = 24 + 8 * view if scenario == 0 else 4 + round(0.6 * speed * seconds)
        frame = shade.copy()
        frame[top : top + 24, left : left + 24] = (235, 200 - 60 * scenario, 60)
        yield frame


def write_video(path: Path, pictures: Iterator[np.ndarray], fps: int, size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
    """Write every pixel of a video as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with VideoWriter(path, width=size[0], height=size[1], fps=fps, lossless=True) as writer:
        for picture in pictures:
            writer.write(picture[None])


def write_generated(path: Path, view: int, fps: int) -> None:
    """Write what a model might make of a view: another speed, a little late, and another size and shape."""
    pictures = frames(0, view, 3, fps, AFTER_SECONDS * fps, BEFORE_SECONDS - 0.1 * view)
    write_video(path, (picture[16:, :160] for picture in pictures), fps, (160, HEIGHT - 16))


def make_download(root: Path, *, fps: int = 8, scenarios: int = 1, takes: tuple[int, ...] = (1, 2)) -> Path:
    """Write `scenarios` x 3 views x 2 takes below `root`, with prompts that the embedded model knows; return `root`."""
    rows = []
    count = scenarios * len(VIEWS)
    for take in takes:
        for scenario, (name, category) in enumerate(list(SCENARIOS.items())[:scenarios]):
            for view, view_name in enumerate(VIEWS):
                number = f"{1 + (take - 1) * count + scenario * len(VIEWS) + view:04d}"
                ending = f"{view_name}_take-{take}_{name}.mp4"
                rows.append([f"{number}_{ending}", "a balloon moves to the right", category, ""])
                _write_scene(root, number, ending, scenario, view, take, fps)
    with (root / "descriptions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["scenario", "description", "category", "generated_video_name"], *rows])
    return root


def _write_scene(root: Path, number: str, ending: str, scenario: int, view: int, take: int, fps: int) -> None:
    def at(folder: str, kind: str) -> Path:
        return root / folder / f"{fps}FPS" / f"{number}_{kind}_{fps}FPS_{ending}"

    after = frames(scenario, view, take, fps, AFTER_SECONDS * fps, BEFORE_SECONDS)
    write_video(at("split-videos/testing", "testing-videos"), after, fps)
    if take == 1:
        before = list(frames(scenario, view, take, fps, BEFORE_SECONDS * fps))
        write_video(at("split-videos/conditioning", "conditioning-videos"), iter(before), fps)
        pictures = root / "switch-frames"
        pictures.mkdir(exist_ok=True)
        name = ending.replace("_take-1", "").replace(".mp4", ".jpg")
        Image.fromarray(before[-1]).save(pictures / f"{number}_switch-frames_anyFPS_{name}", quality=95)
