"""Embed bits in the pixels of a video, which survive where metadata do not, and detect them.

A watermark is named ``rivagan`` or ``videoseal:FILE``. `register` adds others. The first half of a payload is the same
in all files of pusa, so that a detector need not know the file; the second half is an identifier of the result.
"""

import hashlib
import importlib.util
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from pusa.fields import shown

CHUNK_FRAMES = 16  # embedded at once: methods made for video share work between neighbours
_MAX_DETECTED_FRAMES = 64  # spread over the video
_TAG = hashlib.sha256(b"made by pusa").digest()
_LIKELY = 1e-4  # a video without the mark passes for a marked one more rarely than this


class Watermarker(Protocol):
    """Embed and read `bits` bits. Implementations are registered by `register`.

    Attributes:
        name: as it is written in files.
        bits: length of a payload, a multiple of 16.
        min_pixels: of a frame's short side, below which the mark may be lost; may be missing.
    """

    name: str
    bits: int

    def embed(self, frames: np.ndarray, payload: np.ndarray) -> np.ndarray:
        """Embed a payload, uint8 ``[bits]`` of 0 and 1, in frames, uint8 ``[n, H, W, 3]``; return frames like them."""

    def read(self, frames: np.ndarray) -> np.ndarray:
        """Return a score for each bit and frame, float ``[n, bits]``: above 0 for 1, below 0 for 0."""


@dataclass(frozen=True)
class Detection:
    """Report a search for a watermark.

    Attributes:
        found: True if the tag is there, beyond what chance gives in one video of 10,000.
        probability: of so many correct bits of the tag in a video without the mark, 0..1.
        identifier: of the result, in hexadecimal digits; it means nothing unless found.
        bit_accuracy: share of correct bits of the whole payload, 0..1, where the identifier is known; else None.
    """

    found: bool
    probability: float
    identifier: str
    bit_accuracy: float | None = None


Factory = Callable[[str | None], Watermarker]
_FACTORIES: dict[str, Factory] = {}


def register(name: str, factory: Factory) -> None:
    """Add a kind of watermark under a name.

    Args:
        factory: called with the text after ``NAME:``, or None without it; raises ValueError, FileNotFoundError or
            RuntimeError, with the way out, where it cannot work.
    """
    _FACTORIES[name] = factory


def load_watermarker(text: str) -> Watermarker:
    """Load a watermark by ``NAME`` or ``NAME:FILE``.

    Raises:
        ValueError: the name is unknown, or the file is of another kind.
        FileNotFoundError: the file is missing.
        RuntimeError: a package is not installed.
    """
    name, colon, argument = text.partition(":")
    if name not in _FACTORIES:
        raise ValueError(f"watermark {shown(text)} is unknown: there are {', '.join(sorted(_FACTORIES))}")
    return _FACTORIES[name](argument if colon else None)


def watermark_for_replay(stored: Mapping[str, Any], asked: str | None) -> str | None:
    """Choose the watermark of a file that is made again: the one asked for, else that of the file.

    Raises:
        ValueError: the file's watermark needs a file that it does not name.
    """
    name = (stored.get("watermark") or {}).get("name")
    if asked is not None or name is None:
        return asked
    try:
        load_watermarker(name)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"its watermark is {name}: {error}; or make it without one: --watermark none") from error
    return name


def payload_of(identifier: str, bits: int) -> np.ndarray:
    """Make a payload, uint8 ``[bits]``: half the tag of pusa, half the hash of a text that identifies the result."""
    half = bits // 2
    digest = hashlib.sha256(identifier.encode()).digest()
    return np.concatenate([_bits(_TAG, half), _bits(digest, half)])


def payload_text(payload: np.ndarray) -> str:
    """Write the identifier of a payload in hexadecimal digits."""
    return np.packbits(payload[len(payload) // 2 :].astype(np.uint8)).tobytes().hex()


def embed_stream(
    frames: Iterable[np.ndarray], watermarker: Watermarker, payload: np.ndarray, chunk_frames: int = CHUNK_FRAMES
) -> Iterator[np.ndarray]:
    """Embed a payload in chunks of frames, uint8 ``[n, H, W, 3]``, and yield them as they come.

    At most `chunk_frames` frames, or one chunk of the input if that is more, are held.
    """
    held: list[np.ndarray] = []
    for chunk in frames:
        held.append(chunk)
        if sum(map(len, held)) >= chunk_frames:
            yield _embed(np.concatenate(held), watermarker, payload)
            held = []
    if held:
        yield _embed(np.concatenate(held), watermarker, payload)


def detect(frames: np.ndarray, watermarker: Watermarker, expected: np.ndarray | None = None) -> Detection:
    """Look for the watermark in frames, uint8 ``[n, H, W, 3]``.

    Args:
        expected: the payload, uint8 ``[bits]``, where it is known.
    """
    step = max(1, math.ceil(len(frames) / _MAX_DETECTED_FRAMES))
    scores = watermarker.read(frames[::step]).mean(axis=0)  # [bits]
    bits = (scores > 0).astype(np.uint8)
    half = watermarker.bits // 2
    correct = int((bits[:half] == _bits(_TAG, half)).sum())
    probability = sum(math.comb(half, n) for n in range(correct, half + 1)) / 2**half
    accuracy = None if expected is None else float((bits == expected).mean())
    return Detection(probability < _LIKELY, probability, payload_text(bits), accuracy)


def _embed(frames: np.ndarray, watermarker: Watermarker, payload: np.ndarray) -> np.ndarray:
    marked = watermarker.embed(frames, payload)
    if marked.shape != frames.shape or marked.dtype != np.uint8:
        raise RuntimeError(
            f"watermark {watermarker.name} made {marked.dtype} {list(marked.shape)} of uint8 {list(frames.shape)}"
        )
    return marked


def _bits(data: bytes, count: int) -> np.ndarray:
    return np.unpackbits(np.frombuffer(data, np.uint8))[:count]


# ---- RivaGAN ---------------------------------------------------------------------------------------------------------


class RivaGan:
    """Embed 32 bits with RivaGAN (arXiv 1909.01285), whose networks the package ``invisible-watermark`` contains.

    Each frame is marked alone, at a short side of 256 pixels: the difference is scaled up and added to the frame. That
    is quicker than at full size, and scaling a video afterwards does not hurt the mark. Only the two ONNX files of the
    package are used, with onnxruntime.
    """

    name, bits, min_pixels = "rivagan", 32, 256
    _SHORT_SIDE = 256

    def __init__(self, argument: str | None = None) -> None:
        if argument is not None:
            raise ValueError(f"watermark rivagan:{argument}: rivagan brings its networks and takes no file")
        spec = importlib.util.find_spec("imwatermark")
        if spec is None or spec.origin is None or importlib.util.find_spec("onnxruntime") is None:
            raise RuntimeError("watermark rivagan is not installed: pip install 'pusa[watermark]'")
        import onnxruntime

        folder = Path(spec.origin).parent
        self._encoder, self._decoder = (
            onnxruntime.InferenceSession(
                str(folder / f"rivagan_{part}.onnx"), providers=onnxruntime.get_available_providers()
            )
            for part in ("encoder", "decoder")
        )

    def embed(self, frames: np.ndarray, payload: np.ndarray) -> np.ndarray:
        import torch
        from torch.nn.functional import interpolate

        data = payload[None].astype(np.float32)  # [1, 32]
        small = _resize(frames, self._SHORT_SIDE)  # [n, h, w, 3]
        marked = np.concatenate([self._encoder.run(None, {"frame": _pixels(f), "data": data})[0] for f in small])
        difference = marked[:, :, 0].clip(-1, 1) * 127.5 - (small.transpose(0, 3, 1, 2) - 127.5)  # [n, 3, h, w]
        full = interpolate(torch.from_numpy(difference.astype(np.float32)), frames.shape[1:3], mode="bilinear")
        return (frames + full.permute(0, 2, 3, 1).numpy()).round().clip(0, 255).astype(np.uint8)

    def read(self, frames: np.ndarray) -> np.ndarray:
        small = _resize(frames, self._SHORT_SIDE)
        return np.concatenate([self._decoder.run(None, {"frame": _pixels(frame)})[0] for frame in small])


def _resize(frames: np.ndarray, short_side: int) -> np.ndarray:
    """Scale frames to a short side; both sides become multiples of 8."""
    height, width = frames.shape[1:3]
    scale = short_side / min(height, width)
    size = (max(8, round(width * scale / 8) * 8), max(8, round(height * scale / 8) * 8))
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR)) for frame in frames])


def _pixels(frame: np.ndarray) -> np.ndarray:
    """Convert a frame uint8 ``[H, W, 3]`` to fp32 ``[1, 3, 1, H, W]`` in -1..1."""
    return np.ascontiguousarray(frame.transpose(2, 0, 1)[None, :, None], dtype=np.float32) / 127.5 - 1.0


# ---- VideoSeal -------------------------------------------------------------------------------------------------------


class VideoSeal:
    """Embed 256 bits with Meta's VideoSeal (arXiv 2412.09492), from its TorchScript file, ``y_256b_img.jit``.

    The user downloads the file: nothing is fetched. Its program runs in this process: take it from its makers only.
    """

    name, bits, min_pixels = "videoseal", 256, 256

    def __init__(self, argument: str | None = None) -> None:
        if not argument:
            raise ValueError("watermark videoseal needs its TorchScript file: videoseal:y_256b_img.jit")
        if not Path(argument).is_file():
            raise FileNotFoundError(f"watermark videoseal:{argument}: there is no such file; download y_256b_img.jit")
        import torch

        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self._model: Any = torch.jit.load(argument, map_location=self._device).eval()
        except RuntimeError as error:
            raise ValueError(f"watermark videoseal:{argument} is no TorchScript file: y_256b_img.jit is one") from error

    def embed(self, frames: np.ndarray, payload: np.ndarray) -> np.ndarray:
        import torch

        message = torch.from_numpy(payload[None].astype(np.float32)).to(self._device)  # [1, 256]
        with torch.inference_mode():
            marked = self._model.embed(self._pixels(frames), message, is_video=True)
        levels = (marked.clamp(0, 1) * 255).round().byte()
        return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()

    def read(self, frames: np.ndarray) -> np.ndarray:
        import torch

        with torch.inference_mode():
            scores = self._model.detect(self._pixels(frames), is_video=True)  # [n, 1 + 256]: the first is a mask
        return scores[:, 1:].float().cpu().numpy()

    def _pixels(self, frames: np.ndarray) -> Any:
        """Convert frames to fp32 ``[n, 3, H, W]`` in 0..1 on the model's device."""
        import torch

        return torch.from_numpy(np.ascontiguousarray(frames)).to(self._device).permute(0, 3, 1, 2).float() / 255


register(RivaGan.name, RivaGan)
register(VideoSeal.name, VideoSeal)
