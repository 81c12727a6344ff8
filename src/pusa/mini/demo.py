"""Generate one video of each kind with the embedded model, and show all of them in one picture (``make demo``).

    python -m pusa.demo [--output FOLDER] [--gif FILE]

`--gif` generates four more videos and shows all eight side by side, as the README does.
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

from PIL import Image, ImageDraw, ImageOps

from pusa import media, zoo
from pusa.events import Note
from pusa.generate import generate
from pusa.media.previews import BACKGROUND, Strip, draw_label, grid, spread
from pusa.request import GenerationRequest

PICTURES = Path(__file__).parent / "pictures"
"""Pictures to start from, see `pusa.mini.world.example_pictures`."""

GIF_BYTES = 3_000_000
_OUTLINED_FRAMES = 4  # a picture that was given is outlined for so long that people see it
_MARGIN, _LINE = 6, 15  # pixels
_FONT_SIZES = range(12, 6, -1)
_OUTLINE = (255, 150, 30)


@dataclass(frozen=True)
class Clip:
    """Describe a video to generate: its file's name, its title for people, its request without model and seed."""

    name: str
    title: str
    request: Mapping[str, Any]


def _picture(name: str, position: str = "0", noise: float = 0.0) -> dict[str, Any]:
    return {"file": str(PICTURES / name), "positions": [position], "noise": [noise]}


def clips(folder: Path) -> list[Clip]:
    """List one clip of each kind; the last extends the first one's file in `folder`."""
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
    """List the four clips that only `--gif` generates."""
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
    """Run the demo with command line `arguments`; None: those of this process."""
    parser = argparse.ArgumentParser(prog="python -m pusa.demo", description="Make a few videos and show them.")
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder to write into (default: demo)")
    parser.add_argument("--model", default="mini", help="model to make them with (default: mini)")
    parser.add_argument("--gif", type=Path, help="make four more, and show all eight in this file")
    options = parser.parse_args(arguments)
    folder: Path = options.output
    folder.mkdir(parents=True, exist_ok=True)
    model = zoo.find(options.model)
    print(f"model: {options.model}" + (f", {model.title}" if model else ""))

    strips = [make(clip, folder, options.model) for clip in clips(folder)]
    still_sheet(strips).save(folder / "contact-sheet.png")
    moving_sheet(strips, folder / "contact-sheet.gif", columns=2)
    print(f"{folder / 'contact-sheet.gif'}  all of them, moving; {folder / 'contact-sheet.png'}  frame by frame")
    if options.gif:
        more = [make(clip, folder, options.model) for clip in more_clips()]
        moving_sheet([strips[0], *more[:2], more[3], *strips[1:3], more[2], strips[3]], options.gif, columns=4)
        print(f"{options.gif}  all eight, moving")
    print(_next_commands(folder, options.model))


def make(clip: Clip, folder: Path, model: str) -> Strip:
    """Generate a clip into `folder`, print how long it took, and return its frames, those of its inputs held."""
    path = folder / f"{clip.name}.mp4"
    request = GenerationRequest(model=model, seed=0, **clip.request)
    began = time.monotonic()
    for event in generate(request, path):
        if isinstance(event, Note):
            print(f"  {event.message}")
    print(f"{path}  {clip.title}: {request.prompt}  ({time.monotonic() - began:.1f} s)", flush=True)
    frames = media.read_video(path)
    held: set[int] = set()
    for condition in request.conditions:
        if condition.kind == "video":
            held.update(range(media.probe_video(condition.file).frames))
        elif str(condition.positions[0]) == "last":
            held.update(range(len(frames) - _OUTLINED_FRAMES, len(frames)))
        else:
            held.update(range(_OUTLINED_FRAMES))
    return Strip(clip.request["prompt"], frames, held=held, title=clip.title)


def _next_commands(folder: Path, model: str) -> str:
    program = Path(sys.executable).with_name("pusa")
    if program.is_relative_to(Path.cwd()):
        program = program.relative_to(Path.cwd())
    pusa = "pusa" if shutil.which("pusa") else str(program)
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


def still_sheet(strips: Sequence[Strip], *, columns: int = 8, tile: int = 120) -> Image.Image:
    """Draw a row of `columns` frames per video, evenly spread from its first to its last, each `tile` pixels wide."""
    rows = []
    for strip in strips:
        tiles = [_tile(strip, index, tile) for index in spread(len(strip.frames), columns)]
        border = (_MARGIN, _LINE + 8, _MARGIN, _LINE - 8)
        row = ImageOps.expand(grid(tiles, columns, gap=_MARGIN), border, BACKGROUND)
        draw_label(row, (_MARGIN, 3), strip.heading, row.width, sizes=_FONT_SIZES)
        rows.append(row)
    return grid([*rows, _legend(rows[0].width)], 1)


def moving_sheet(strips: Sequence[Strip], path: Path, *, columns: int, max_bytes: int = GIF_BYTES) -> None:
    """Write all videos side by side as a GIF, in the best quality that fits into `max_bytes`.

    Raises:
        ValueError: they do not fit at the smallest size.
    """
    for tile, every, colours in ((192, 1, 256), (160, 1, 128), (144, 2, 128), (112, 2, 96), (96, 2, 64), (96, 4, 64)):
        data = _gif(strips, columns=columns, tile=tile, every=every, colours=colours)
        if len(data) <= max_bytes:
            path.write_bytes(data)
            return
    raise ValueError(f"{len(strips)} videos do not fit into {max_bytes} bytes: show fewer")


def _gif(strips: Sequence[Strip], *, columns: int, tile: int, every: int, colours: int, fps: float = 16.0) -> bytes:
    longest = max(len(strip.frames) for strip in strips)
    sheets = [_moment(strips, index, columns, tile) for index in range(0, longest, every)]
    # One palette for all frames, so that what stands still costs nothing.
    palette = grid(sheets[:: max(1, len(sheets) // 8)], 1).quantize(colours, method=Image.Quantize.MEDIANCUT)
    frames = [sheet.quantize(palette=palette, dither=Image.Dither.NONE) for sheet in sheets]
    times = [round(100 * index * every / fps) for index in range(len(frames) + 1)]  # in GIF's hundredths of a second
    durations = [10 * (after - before) for before, after in pairwise(times)]
    durations[-1] += 700  # a rest before it begins again
    buffer = io.BytesIO()
    frames[0].save(
        buffer, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=True, disposal=1
    )
    return buffer.getvalue()


def _moment(strips: Sequence[Strip], index: int, columns: int, tile: int) -> Image.Image:
    """Draw frame `index` of all videos above their titles; a video that is over shows its last frame."""
    cells = []
    for strip in strips:
        picture = _tile(strip, min(index, len(strip.frames) - 1), tile)
        half = _MARGIN // 2
        cell = ImageOps.expand(picture, (half, half, _MARGIN - half, 2 * _LINE + _MARGIN - half), BACKGROUND)
        below = picture.height + 4
        draw_label(cell, (half, below), strip.title, cell.width, sizes=_FONT_SIZES, colour=_OUTLINE)
        draw_label(cell, (half, below + _LINE), strip.label, cell.width - _MARGIN, sizes=_FONT_SIZES)
        cells.append(cell)
    sheet = grid(cells, columns)
    return grid([sheet, _legend(sheet.width)], 1)


def _tile(strip: Strip, index: int, width: int) -> Image.Image:
    frame = Image.fromarray(strip.frames[index])
    picture = frame.resize((width, round(width * frame.height / frame.width)), Image.Resampling.LANCZOS)
    if index in strip.held:
        ImageDraw.Draw(picture).rectangle((0, 0, picture.width - 1, picture.height - 1), outline=_OUTLINE, width=4)
    return picture


def _legend(width: int) -> Image.Image:
    line = Image.new("RGB", (width, _LINE + 6), BACKGROUND)
    text = "orange frame: given to the model; everything else is made by it"
    draw_label(line, (_MARGIN, 3), text, width, sizes=_FONT_SIZES)
    return line


if __name__ == "__main__":
    main()
