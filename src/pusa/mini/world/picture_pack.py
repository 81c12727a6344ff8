"""Pack all training pictures of the small model into one file, for a machine without downloads.

``pusa mini pictures PACK.safetensors`` writes the pack: the sprites of the first things, the panoramas and the
photographs, the latter two compressed as WebP. Loading it cuts out the squares that the camera sees. Its metadata hold
the credits, the notices that have to stay with the pictures, and the hashes of the downloads.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pusa.fsutil import replacing
from pusa.mini.world import pictures
from pusa.mini.world.scenery import CANVAS
from pusa.mini.world.vocabulary import THINGS

LARGEST_BYTES = 12_000_000
PACKED_THINGS = 40
SPRITE_SIZE = 128
"""Pixels, about the largest size of things in clips of 128 pixels."""

_FORMAT = "pusa pictures 1"
_SHORT_SIDE = 1152  # the smallest squares are still one and a half times as large as the canvas
_QUALITY = 95
_ROWS = {1.0: 1, 2 / 3: 2, 5 / 12: 3, 1 / 4: 4}
"""Size of a photograph's squares as a share of its short side, to the number of squares along that side."""


def make_pack(cache: Path, path: Path) -> None:
    """Write the pack of the pictures that `pictures.fetch` has downloaded into `cache`.

    Raises:
        FileNotFoundError: a picture is missing. ValueError: the pack would be larger than `LARGEST_BYTES`.
    """
    sprites = pictures.load_sprites(cache, size=SPRITE_SIZE, things=PACKED_THINGS)
    panoramas = {
        f"panorama {number:02d}": pictures.as_image(p) for number, p in enumerate(pictures.load_panoramas(cache))
    }
    photographs = {f"photograph {name}": _smaller(image) for name, image in pictures.open_photographs(cache)}
    sources = [*cache.glob("*.tgz"), *cache.glob("*.deb")]
    hashes = {source.name: hashlib.sha256(source.read_bytes()).hexdigest() for source in sorted(sources)}
    write_pack(path, sprites, {**panoramas, **photographs}, sources=hashes)


def write_pack(
    path: Path, sprites: Tensor, images: Mapping[str, Image.Image], *, sources: Mapping[str, str] | None = None
) -> None:
    """Write a pack of sprites ``[N, 4, S, S]`` in 0..1 and images named ``panorama ...`` or ``photograph ...``.

    The same pictures give the same bytes, with the same versions of the libraries that compress them.

    Raises:
        ValueError: it would be larger than `LARGEST_BYTES`, or a panorama is too small for its views; nothing is
            written.
    """
    tensors = {"sprites": (sprites * 255).round().to(torch.uint8).contiguous()}
    for name, image in images.items():
        for _ in _windows(name, image.size):
            pass
        lossless = name.startswith("panorama")  # small pictures, which the world enlarges
        file = io.BytesIO()
        image.save(file, "WEBP", lossless=lossless, quality=100 if lossless else _QUALITY, method=4)
        tensors[name] = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
    size = sum(tensor.numel() for tensor in tensors.values())
    if size > LARGEST_BYTES - 20_000:  # of header
        raise ValueError(f"the pictures take {size / 1e6:.1f} MB and a pack may take {LARGEST_BYTES / 1e6:.0f} MB")
    about = {
        "format": _FORMAT,
        "things": [names[1] for names in THINGS[: len(sprites)]],
        "credits": [list(credit) for credit in pictures.CREDITS],
        "notices": pictures.NOTICES,
        "sources": dict(sources or {}),
        "sha256": _digest(tensors),
    }
    with replacing(path) as part:  # one entry of metadata: they have no order
        save_file(tensors, part, metadata={"pusa": json.dumps(about, ensure_ascii=False)})


def load_pack(path: Path) -> tuple[Tensor, Tensor]:
    """Load sprites and views of photographs from a pack, like `pictures.load_sprites` and `pictures.load_photographs`.

    Returns:
        ``[N, 4, S, S]`` of the first N of `THINGS`, RGB premultiplied by alpha, and ``[P, 3, CANVAS, CANVAS]``, both
        in 0..1.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is no pack, or a damaged one.
    """
    tensors, _ = _read(path)
    images = [name for name in tensors if name != "sprites"]
    with ThreadPoolExecutor(max_workers=8) as threads:  # Pillow works outside of Python's lock
        views = list(chain.from_iterable(threads.map(lambda name: _views(name, tensors[name]), images)))
    if not views:
        raise ValueError(f"{path} holds no photographs: make it anew with `pusa mini pictures {path}`")
    photographs = torch.stack(views).float().div_(255)
    return tensors["sprites"].float() / 255, photographs


def read_about(path: Path) -> dict[str, object]:
    """Read the credits, licences, notices and sources of a pack.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is no pack, or a damaged one.
    """
    return _read(path)[1]


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: make it with `pusa mini pictures {path}`, which downloads")
    remedy = f"make it anew with `pusa mini pictures {path}`"
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("pusa", "{}"))
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is no pack of pictures or is damaged ({error}): {remedy}") from None
    if not isinstance(about, dict) or about.get("format") != _FORMAT:
        raise ValueError(f"{path} is no pack of pictures ({_FORMAT!r} is not in its metadata): {remedy}")
    if about.get("sha256") != _digest(tensors):
        raise ValueError(f"{path} is damaged (its contents do not have the hash that it names): {remedy}")
    return tensors, about


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {list(tensors[name].shape)}".encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _views(name: str, packed: Tensor) -> list[Tensor]:
    """Cut a compressed picture into its squares, uint8 ``[3, CANVAS, CANVAS]`` each."""
    with Image.open(io.BytesIO(packed.numpy().tobytes())) as file:
        image = file.convert("RGB")
    views = []
    for left, top, size in _windows(name, image.size):
        box = (left, top, left + size, top + size)
        view = image.resize((CANVAS, CANVAS), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
        views.append(torch.from_numpy(np.array(view)).permute(2, 0, 1).contiguous())
    return views


def _windows(name: str, size: tuple[int, int]) -> Iterable[tuple[int, int, int]]:
    """List the squares of a picture: left, top and size in pixels.

    Raises:
        ValueError: its name says neither panorama nor photograph, or it is too small.
    """
    width, height = size
    if name.startswith("panorama"):
        windows = [(x, top, side) for side, top, step in pictures.PANORAMA_VIEWS for x in range(0, width - side, step)]
        if not windows or height < max(top + side for side, top, _ in pictures.PANORAMA_VIEWS):
            raise ValueError(f"{name} of {width} x {height} pixels is too small: 512 x 256 is expected")
        return windows
    if not name.startswith("photograph"):
        raise ValueError(f"{name!r} is neither a panorama nor a photograph")
    short, windows = min(size), []
    for part, rows in _ROWS.items():
        side = int(part * short)
        lefts, tops = (_spread(length - side, round(rows * length / short)) for length in size)
        windows += [(left, top, side) for top in tops for left in lefts]
    return windows


def _spread(length: int, count: int) -> list[int]:
    """Return `count` evenly spaced positions from 0 to `length`; the middle if `count` is 1."""
    return [length // 2] if count == 1 else [round(length * i / (count - 1)) for i in range(count)]


def _smaller(image: Image.Image) -> Image.Image:
    ratio = min(1.0, _SHORT_SIDE / min(image.size))
    size = (round(ratio * image.width), round(ratio * image.height))
    return image.resize(size, Image.Resampling.LANCZOS)
