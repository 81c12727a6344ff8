"""``make demo``: one video of each kind with the model in the package, and all of them in one picture.

    python -m pusa.demo [--output FOLDER] [--gif FILE]

`--gif` makes four more videos and shows all eight side by side, as the README does.
"""

import argparse
import io
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pusa import media, zoo
from pusa.events import Note
from pusa.generate import generate
from pusa.request import GenerationRequest

PICTURES = Path(__file__).parent / "mini" / "pictures"
"""Pictures to start from, see `pusa.mini.world.example_pictures`."""

GIF_BYTES = 3_000_000
_MARKED_FRAMES = 4  # a given picture is marked for so long that one sees it
_MARGIN, _LINE = 6, 15  # pixels
_DARK, _LIGHT, _MARK = (24, 24, 24), (235, 235, 235), (255, 150, 30)


@dataclass(frozen=True)
class Clip:
    """A video to make: the file's name, what a stranger is told, and the request but for model and seed."""

    name: str
    title: str
    asked: Mapping[str, Any]


@dataclass(frozen=True)
class Made:
    """A video that was made: uint8 frames ``[F, H, W, 3]``, and which of them were given, ``[F]``."""

    clip: Clip
    frames: np.ndarray
    given: np.ndarray


def _picture(name: str, position: str = "0", noise: float = 0.0) -> dict[str, Any]:
    return {"file": str(PICTURES / name), "positions": [position], "noise": [noise]}


def clips(folder: Path) -> list[Clip]:
    """One of each kind; the last goes on from the first one's file in `folder`."""
    return [
        Clip("text-to-video", "text to video", {"prompt": "a red apple bounces on the grass"}),
        Clip(
            "image-to-video",
            "image to video",
            {"prompt": "a penguin slides to the right at the beach", "conditions": [_picture("penguin.png")]},
        ),
        Clip(
            "start-end",
            "start and end",
            {
                "prompt": "a star slides to the right in autumn",
                "conditions": [_picture("star-start.png"), _picture("star-end.png", "last")],
            },
        ),
        Clip(
            "extension",
            "extension",
            {
                "task": "extend",
                "prompt": "a red apple bounces on the grass",
                "conditions": [{"kind": "video", "file": str(folder / "text-to-video.mp4")}],
            },
        ),
    ]


def more_clips() -> list[Clip]:
    return [
        Clip("bus", "text to video", {"prompt": "a bus slides to the right in the desert"}),
        Clip("ghost", "text to video", {"prompt": "a ghost fades away in the forest"}),
        Clip(
            "view",
            "image to video",
            # What the words add to a picture they do not describe is little, and guidance makes it coarse.
            {"prompt": "a photo, the camera zooms in", "conditions": [_picture("view.jpg")], "guidance": 1.0},
        ),
        Clip("loop", "loop", {"task": "loop", "prompt": "a fish swings under the sea", "overlap": 5}),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m pusa.demo", description="Make a few videos and show them.")
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder to write into (default: demo)")
    parser.add_argument("--model", default="mini", help="model to make them with (default: mini)")
    parser.add_argument("--gif", type=Path, help="make four more, and show all eight in this file")
    options = parser.parse_args(arguments)
    folder: Path = options.output
    folder.mkdir(parents=True, exist_ok=True)
    known = zoo.find(options.model)
    print(f"model: {options.model}" + (f", {known.title}" if known else ""))

    made = [make(clip, folder, options.model) for clip in clips(folder)]
    still_sheet(made).save(folder / "contact-sheet.png")
    moving_sheet(made, folder / "contact-sheet.gif", columns=2)
    print(f"{folder / 'contact-sheet.gif'}  all of them, moving; {folder / 'contact-sheet.png'}  frame by frame")
    if options.gif:
        others = [make(clip, folder, options.model) for clip in more_clips()]
        moving_sheet([made[0], *others[:2], others[3], *made[1:3], others[2], made[3]], options.gif, columns=4)
        print(f"{options.gif}  all eight, moving")
    print(_what_next(folder, options.model))


def make(clip: Clip, folder: Path, model: str) -> Made:
    """Generate, and say how long it took."""
    path = folder / f"{clip.name}.mp4"
    request = GenerationRequest(model=model, seed=0, **clip.asked)
    began = time.monotonic()
    for event in generate(request, path):
        if isinstance(event, Note):
            print(f"  {event.message}")
    print(f"{path}  {clip.title}: {request.prompt}  ({time.monotonic() - began:.1f} s)", flush=True)
    frames = media.read_video(path)
    given = np.zeros(len(frames), bool)
    for condition in request.conditions:
        if condition.kind == "video":
            given[: media.probe_video(condition.file).frames] = True
        elif str(condition.positions[0]) == "last":
            given[-_MARKED_FRAMES:] = True
        else:
            given[:_MARKED_FRAMES] = True
    return Made(clip, frames, given)


def _what_next(folder: Path, model: str) -> str:
    here = Path(sys.executable).with_name("pusa")
    pusa = (
        "pusa"
        if shutil.which("pusa")
        else str(here.relative_to(Path.cwd()) if here.is_relative_to(Path.cwd()) else here)
    )
    other = "" if model == "mini" else f" --model {model}"
    return f"""
Next, for example:
  {pusa} models show {model} --words    all the words that this model knows
  {pusa} generate "an octopus spins under the sea"{other}
  {pusa} generate "a photo, the camera zooms in" --image YOUR.jpg --guidance 1{other}
  {pusa} extend {folder / "image-to-video.mp4"} --prompt "a penguin bounces at the beach"{other}
  {pusa} generate --help    keyframes, strength, sizes, other models
  {pusa} studio{other}    all of this in the browser, with a timeline for your pictures
"""


# ---- pictures of videos ----------------------------------------------------------------------------------------------


def still_sheet(made: Sequence[Made], *, columns: int = 8, tile: int = 120) -> Image.Image:
    """A row of frames for each video, evenly spread from its first to its last; what was given is marked."""
    rows = []
    for one in made:
        indices = np.linspace(0, len(one.frames) - 1, columns).round().astype(int)
        tiles = [_tile(one, index, tile) for index in indices]
        row = Image.new("RGB", (sum(t.width + _MARGIN for t in tiles) + _MARGIN, tiles[0].height + 2 * _LINE), _DARK)
        _write(row, (_MARGIN, 3), f"{one.clip.title}: {one.clip.asked['prompt']}", row.width)
        for number, picture in enumerate(tiles):
            row.paste(picture, (_MARGIN + number * (picture.width + _MARGIN), _LINE + 8))
        rows.append(row)
    return _stacked([*rows, _legend(rows[0].width)])


def moving_sheet(made: Sequence[Made], path: Path, *, columns: int, max_bytes: int = GIF_BYTES) -> None:
    """All videos side by side as a GIF, in the best quality that fits into `max_bytes`.

    Raises:
        ValueError: they do not fit at the smallest size.
    """
    for tile, every, colours in ((192, 1, 256), (160, 1, 128), (144, 2, 128), (112, 2, 96), (96, 2, 64), (96, 4, 64)):
        data = _gif(made, columns=columns, tile=tile, every=every, colours=colours)
        if len(data) <= max_bytes:
            path.write_bytes(data)
            return
    raise ValueError(f"{len(made)} videos do not fit into {max_bytes} bytes: show fewer")


def _gif(made: Sequence[Made], *, columns: int, tile: int, every: int, colours: int, fps: float = 16.0) -> bytes:
    longest = max(len(one.frames) for one in made)
    sheets = [_sheet(made, index, columns, tile) for index in range(0, longest, every)]
    shown = sheets[:: max(1, len(sheets) // 8)]  # one palette for all frames, so that what stands still costs nothing
    palette = _stacked(shown).quantize(colours, method=Image.Quantize.MEDIANCUT)
    frames = [sheet.quantize(palette=palette, dither=Image.Dither.NONE) for sheet in sheets]
    times = [round(100 * index * every / fps) for index in range(len(frames) + 1)]  # in GIF's hundredths of a second
    durations = [10 * (after - before) for before, after in pairwise(times)]
    durations[-1] += 700  # a rest before it begins again
    buffer = io.BytesIO()
    frames[0].save(
        buffer, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=True, disposal=1
    )
    return buffer.getvalue()


def _sheet(made: Sequence[Made], index: int, columns: int, tile: int) -> Image.Image:
    """The frames at one time under each other's titles; a video that is over shows its last frame."""
    cells = []
    for one in made:
        picture = _tile(one, min(index, len(one.frames) - 1), tile)
        cell = Image.new("RGB", (picture.width + _MARGIN, picture.height + 2 * _LINE + _MARGIN), _DARK)
        cell.paste(picture, (_MARGIN // 2, _MARGIN // 2))
        _write(cell, (_MARGIN // 2, picture.height + 4), one.clip.title, cell.width, _MARK)
        _write(cell, (_MARGIN // 2, picture.height + 4 + _LINE), one.clip.asked["prompt"], cell.width - _MARGIN)
        cells.append(cell)
    width, height = max(c.width for c in cells), max(c.height for c in cells)
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), _DARK)
    for number, cell in enumerate(cells):
        sheet.paste(cell, (number % columns * width, number // columns * height))
    return _stacked([sheet, _legend(sheet.width)])


def _tile(one: Made, index: int, width: int) -> Image.Image:
    frame = Image.fromarray(one.frames[index])
    picture = frame.resize((width, round(width * frame.height / frame.width)), Image.Resampling.LANCZOS)
    if one.given[index]:
        ImageDraw.Draw(picture).rectangle((0, 0, picture.width - 1, picture.height - 1), outline=_MARK, width=4)
    return picture


def _legend(width: int) -> Image.Image:
    line = Image.new("RGB", (width, _LINE + 6), _DARK)
    _write(line, (_MARGIN, 3), "orange frame: given to the model; everything else is made by it", width)
    return line


def _write(
    image: Image.Image, place: tuple[int, int], text: str, width: int, colour: tuple[int, int, int] = _LIGHT
) -> None:
    """A line of text, in smaller letters if it is too long for `width`."""
    size = next((s for s in range(12, 7, -1) if ImageFont.load_default(s).getlength(text) <= width), 7)
    ImageDraw.Draw(image).text(place, text, colour, ImageFont.load_default(size))


def _stacked(images: Sequence[Image.Image]) -> Image.Image:
    whole = Image.new("RGB", (max(i.width for i in images), sum(i.height for i in images)), _DARK)
    top = 0
    for one in images:
        whole.paste(one, (0, top))
        top += one.height
    return whole


if __name__ == "__main__":
    main()
