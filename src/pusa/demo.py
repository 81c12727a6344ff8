"""``make demo``: one video of each kind with the model in the package, and one picture of them all."""

import argparse
import time
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFilter

from pusa import media, zoo
from pusa.generate import generate
from pusa.request import GenerationRequest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder to write into (default: demo)")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    model = zoo.get("mini" if "mini" in zoo.ZOO else "tiny")
    print(f"model: {model.name}, {model.title}")

    _picture("orange", 0.3).save(folder / "start.png")
    _picture("royalblue", 0.7).save(folder / "end.png")
    start, end = str(folder / "start.png"), str(folder / "end.png")
    text_video = str(folder / "text-to-video.mp4")
    tasks: dict[str, dict[str, Any]] = {
        "text-to-video": {"prompt": "a ball rolls to the right on the grass"},
        "image-to-video": {"prompt": "the ball rolls to the right", "conditions": [{"file": start}]},
        "start-end": {
            "prompt": "the ball rolls to the right",
            "conditions": [{"file": start}, {"file": end, "positions": ["last"], "noise": [0.5]}],
        },
        "extension": {
            "task": "extend",
            "prompt": "the ball rolls on",
            "conditions": [{"kind": "video", "file": text_video}],
        },
    }
    sheets = []
    for name, asked in tasks.items():
        path = folder / f"{name}.mp4"
        began = time.monotonic()
        for event in generate(GenerationRequest(model=model.name, seed=0, **asked), path):
            if event.kind == "note":
                print(f"  {event.message}")
        print(f"{path}  ({time.monotonic() - began:.1f} s)")
        sheets.append(media.contact_sheet(path, columns=6, max_width=960))
    sheet = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), "white")
    top = 0
    for one in sheets:
        sheet.paste(one, (0, top))
        top += one.height
    sheet.save(folder / "contact-sheet.png")
    print(f"{folder / 'contact-sheet.png'}  (all of them in one picture)")


def _picture(colour: str, place: float, size: int = 256) -> Image.Image:
    """A ball on a meadow, drawn here so that the demo needs no file."""
    sky = Image.linear_gradient("L").resize((size, size))
    image = Image.composite(Image.new("RGB", sky.size, "white"), Image.new("RGB", sky.size, "skyblue"), sky)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, size * 2 // 3, size, size), fill="yellowgreen")
    radius, x, y = size // 8, int(size * place), size * 2 // 3 - size // 12
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    return image.filter(ImageFilter.GaussianBlur(1))


if __name__ == "__main__":
    main()
