"""Download and load the training pictures of the small model: sprites and photographs with free licences.

- Microsoft's Fluent Emoji (MIT) as LobeHub publishes them on npm (MIT), for the things.
- Panoramas of Poly Haven (CC0) in the npm package ``@pmndrs/assets``, and photographs of the Debian package
  ``lomiri-wallpapers-16.04``, those under CC0 or CC-BY-4.0 only, for the backgrounds.

The package ships none of them; `CREDITS` goes into the model card.
"""

import base64
import io
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pusa.mini.world.scenery import CANVAS
from pusa.mini.world.vocabulary import THINGS

CREDITS = (
    ("sprites", "Fluent Emoji 3D, npm @lobehub/fluent-emoji-3d 1.1.0", "MIT, Microsoft Corporation; MIT, LobeHub"),
    ("panoramas", "Poly Haven, 18 HDRIs in npm @pmndrs/assets 1.7.0", "CC0-1.0"),
    ("photograph", "Clemens Engelhardt: seeding (Debian lomiri-wallpapers-16.04)", "CC0-1.0"),
    ("photographs", "Aitzol Berasategi: aitzgorri, friends, life, picosdeeuropa, sunset (ibidem)", "CC-BY-4.0"),
    ("photographs", 'Trevor "Freespace": Picture 0B, Picture 1A (ibidem)', "CC-BY-4.0"),
    ("photograph", "Abhishek Mudgal: umang (ibidem)", "CC-BY-4.0"),
    ("photograph", "Jakub Mede: Wine (ibidem)", "CC-BY-4.0"),
)
_PACKAGES = ("@lobehub/fluent-emoji-3d@1.1.0", "unicode-emoji-json@0.9.0", "@pmndrs/assets@1.7.0")
_DEBIAN_PACKAGE = "lomiri-wallpapers-16.04"
NOTICES = """Fluent Emoji: Copyright (c) Microsoft Corporation.
@lobehub/fluent-emoji-3d: Copyright (c) 2023 LobeHub.
unicode-emoji-json: Copyright (c) 2019 Mu-An Chiou.

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.

The sprites are under this license and were made smaller. The photographs, from the Debian package
lomiri-wallpapers-16.04 (2018), were made smaller and compressed anew, those under CC-BY-4.0 according to
https://creativecommons.org/licenses/by/4.0/, without any warranty; those under CC0-1.0 according to
https://creativecommons.org/publicdomain/zero/1.0/. The panoramas were exposed for a screen.
"""
"""Notices that have to stay with copies of these pictures; `CREDITS` says who made which."""

_PHOTOGRAPHS = (  # the others of that package are CC-BY-SA
    "seeding_by_Clements_Engelhardt",
    "aitzgorri_by_Aitzol_Berasategi",
    "friends_by_Aitzol_Berasategi",
    "life_by_Aitzol_Berasategi",
    "picosdeeuropa_by_Aitzol_Berasategi",
    "sunset_by_Aitzol_Berasategi",
    "Picture_0B_by_freespace",
    "Picture_1A_by_freespace",
    "umang_by_Abhishek_Mudgal",
    "Wine_by_Jakkub_Mede",
)

PANORAMA_VIEWS = ((176, 46, 102), (112, 72, 85))
"""Squares cut out of a panorama: size, top and horizontal step in pixels."""


def fetch(cache: Path) -> None:
    """Download the missing packages into `cache`.

    Raises:
        FileNotFoundError: npm, apt-get or dpkg-deb is not installed (a Debian or Ubuntu machine with npm has them).
        RuntimeError: one of them could not fetch a package.
    """
    cache.mkdir(parents=True, exist_ok=True)
    if len(list(cache.glob("*.tgz"))) < len(_PACKAGES):
        _run(cache, "npm", "pack", *_PACKAGES)
    if not list(cache.glob(f"{_DEBIAN_PACKAGE}_*.deb")):
        _run(cache, "apt-get", "download", _DEBIAN_PACKAGE)
    if not (cache / "usr").exists():
        _run(cache, "dpkg-deb", "-x", next(cache.glob(f"{_DEBIAN_PACKAGE}_*.deb")).name, ".")


def _run(cache: Path, program: str, *arguments: str) -> None:
    if shutil.which(program) is None:
        raise FileNotFoundError(f"{program} is not installed: it fetches the pictures the small model is trained on")
    done = subprocess.run([program, *arguments], cwd=cache, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{program} {' '.join(arguments)} failed: {done.stderr.strip().splitlines()[-1]}")


def load_sprites(cache: Path, *, size: int = 112, things: int = len(THINGS)) -> Tensor:
    """Load the sprites of the first `things` of `THINGS` from the downloads of `fetch` in `cache`.

    Returns:
        ``[things, 4, size, size]``, RGB premultiplied by alpha, 0..1.

    Raises:
        FileNotFoundError: a package lacks a picture.
    """
    with tarfile.open(next(cache.glob("unicode-emoji-json-*.tgz"))) as archive:
        names = json.load(archive.extractfile("package/data-by-emoji.json"))  # type: ignore[arg-type]
    points = {entry["name"]: "-".join(f"{ord(char):x}" for char in emoji) for emoji, entry in names.items()}
    art = next(cache.glob("lobehub-fluent-emoji-3d-*.tgz"))
    sprites = []
    with tarfile.open(art) as archive:
        members = {Path(member.name).stem: member for member in archive if member.name.endswith(".webp")}
        for name, *_ in THINGS[:things]:
            point = points[name]
            member = members.get(point) or members.get(point.replace("-fe0f", ""))
            if member is None:
                raise FileNotFoundError(f"{art.name} has no picture of {name} ({point})")
            with Image.open(archive.extractfile(member)) as image:  # type: ignore[arg-type]
                picture = image.convert("RGBa").resize((size, size), Image.Resampling.LANCZOS)
            sprites.append(np.frombuffer(picture.tobytes(), np.uint8).reshape(size, size, 4))
    return torch.from_numpy(np.stack(sprites)).permute(0, 3, 1, 2).float() / 255


def load_photographs(cache: Path) -> Tensor:
    """Load square views of all photographs from the downloads in `cache`: ``[N, 3, CANVAS, CANVAS]`` in 0..1."""
    views: list[Tensor] = []
    for panorama in load_panoramas(cache):
        for size, top, step in PANORAMA_VIEWS:
            views += [panorama[:, top : top + size, left : left + size] for left in range(0, 512 - size, step)]
    for _, image in open_photographs(cache):
        small = image.resize((round(768 * image.width / image.height), 768), Image.Resampling.BOX)
        picture = torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 255
        for size in (768, 512, 320):
            for top in range(0, 769 - size, 224):
                lefts = range(0, picture.shape[2] - size + 1, 352)
                views += [picture[:, top : top + size, left : left + size] for left in lefts]
    square = [F.interpolate(v[None], (CANVAS, CANVAS), mode="bicubic", antialias=True) for v in views]
    return torch.cat(square).clamp(0, 1)


def open_photographs(cache: Path) -> Iterator[tuple[str, Image.Image]]:
    """Open the photographs of the downloads in `cache` in full size, each with its name."""
    for name in _PHOTOGRAPHS:
        with Image.open(cache / "usr" / "share" / "backgrounds" / f"{name}.jpg") as image:
            yield name, image.convert("RGB")


def load_panoramas(cache: Path) -> Iterator[Tensor]:
    """Load panoramas 360 degrees wide, ``[3, 256, 512]`` in 0..1, exposed so that the brightest tenth is white."""
    package = next(cache.glob("pmndrs-assets-*.tgz"))
    import av  # only here: loading a picture pack does not need it

    with tarfile.open(package) as archive:
        for name in sorted(name for name in archive.getnames() if name.endswith(".exr.js")):
            text = archive.extractfile(name).read().decode()  # type: ignore[union-attr]
            match = re.search(r"base64,([A-Za-z0-9+/=]+)", text)
            if match is None:
                raise FileNotFoundError(f"{package.name}: {name} holds no picture")
            with av.open(io.BytesIO(base64.b64decode(match[1])), "r", format="exr_pipe") as container:
                frame = next(container.decode(video=0))
            # Half precision, plane by plane: a conversion by ffmpeg wraps round at the brightest spots.
            green, blue, red = (
                np.frombuffer(bytes(plane), np.float16).reshape(frame.height, -1)[:, : frame.width]
                for plane in frame.planes
            )
            linear = torch.from_numpy(np.stack([red, green, blue])).float().clamp(0, 1e4)  # [3, H, W]
            shown = linear / torch.quantile(linear[:, 64:192], 0.9)
            # The files' compression rings around lamps and the sun: blocks of 8 x 8 are wrong there, so they are glare.
            glare = F.max_pool2d((shown.amax(0) > 3).float()[None], 9, stride=1, padding=4)
            ringing = F.max_pool2d((shown.amin(0) < 0.002).float()[None], 3, stride=1, padding=1)
            yield torch.where(glare * ringing > 0, torch.ones(()), shown.clamp(0, 1) ** (1 / 2.2))


def as_image(picture: Tensor) -> Image.Image:
    """Convert a picture ``[3, H, W]`` in 0..1 to an image."""
    return Image.fromarray((picture.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())
