"""`pusa data inspect`: a page and a contact sheet of a dataset, so that people look before they train.

Motion and detail are measured on the latents, which is what will be trained on; pictures are decoded from them.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from PIL import Image
from torch import Tensor

from pusa.data.dataset import ClipInfo, LatentDataset
from pusa.data.encoding import Progress, devices, load_vae, stopping
from pusa.data.format import LATENTS_FOLDER
from pusa.data.inspect_page import Strip, contact_sheet, page
from pusa.data.prepare import SKIPPED_FILE, reasons_of
from pusa.events import Done, Events, Note, Report, Stage, as_events
from pusa.media import to_uint8
from pusa.models.vae import decode_chunks

logger = logging.getLogger(__name__)

_MEASURED_CLIPS = 4000  # more say nothing new, and would have to be read from the disk
_THUMBNAIL_SIDE = 240  # pixels
_STILL, _BLURRED = 0.35, 0.7  # of the median
_NAMES = 5  # shown of what is worth a look
_COMMON = (
    "a an and are as at be been being but by for from had has have he her his in into is it its of on or over she so "
    "that the their them then there they this through to under up was were what which while who with"
)
_COMMON_WORDS = frozenset(_COMMON.split())


@dataclass(frozen=True)
class Measures:
    """Of one clip.

    motion: mean change of a latent from one latent frame to the next: 0 is a still, unrelated frames have about 1.1.
        The step from the first to the second is left out, as the VAE encodes the first frame alone and even a still
        differs there. None for a picture.
    detail: the share of the latents' variance that a 3 x 3 blur removes; low for blurred and enlarged clips.
    """

    motion: float | None
    detail: float


def measure(latents: Tensor) -> Measures:
    """Measures of latents ``[C, F, h, w]``."""
    steps = latents.diff(dim=1).abs().mean(dim=(0, 2, 3))  # [F - 1]
    motion = float(steps[1:].mean() if len(steps) > 1 else steps.mean()) if len(steps) else None
    z = latents.transpose(0, 1)  # [F, C, h, w]
    blurred = F.avg_pool2d(F.pad(z, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    variance = (z - z.mean(dim=(2, 3), keepdim=True)).square().mean()
    return Measures(motion, float((z - blurred).square().mean() / variance.clamp(min=1e-9)))


def inspect(
    folder: str | Path,
    output: Path,
    *,
    clips: int = 12,
    frames: int = 4,
    model: str | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Events:
    """Write a page (HTML, all in one file) and, beside it under the same name, a contact sheet (PNG).

    Args:
        folder: as for `LatentDataset`.
        output: the page.
        clips: to decode, from the stillest to the liveliest; 0: none, and no sheet.
        frames: shown of each.
        model: whose VAE decodes; None: the one that the dataset names.
        stop: asked at every step; True ends the run, and nothing is written.

    Yields:
        Events, see `pusa.events`; ``done`` for the page and for the sheet.

    Raises:
        FileNotFoundError, ValueError: there is no dataset, or a number is out of range.
    """
    if clips < 0 or frames < 1:
        raise ValueError(f"clips={clips}, frames={frames}: at least 0 clips of at least 1 frame")

    def run(report: Report) -> None:
        told = stopping(report, stop)
        data = LatentDataset(folder)
        if not output.parent.is_dir():
            raise FileNotFoundError(f"{output.parent} is no folder: make it first")
        measures = _measured(data, told)
        strips = list(_strips(data, measures, clips, frames, model or data.facts.model, told)) if clips else []
        skipped = [entry for one in data.folders for entry in _skipped(one / SKIPPED_FILE)]
        output.write_text(page(_facts(data, measures, skipped), strips), encoding="utf-8")
        report(Done({"page": output}))
        if strips:
            sheet = output.with_suffix(".png")
            contact_sheet(strips).save(sheet)
            report(Done({"contact_sheet": sheet}))

    return as_events(run)


def _measured(data: LatentDataset, report: Report) -> dict[int, Measures]:
    count = min(len(data), _MEASURED_CLIPS)
    progress = Progress(report, "measure", count)
    measures = {}
    for number in range(count):
        index = number * len(data) // count
        measures[index] = measure(data.latents(index))
        progress.advance()
    return measures


def _strips(
    data: LatentDataset, measures: dict[int, Measures], count: int, frames: int, model: str, report: Report
) -> Iterator[Strip]:
    """Pictures of clips, evenly spread over their order by motion."""
    try:
        if not model:
            raise ValueError("the dataset does not say which model it is for: give --model")
        report(Stage("load the VAE"))
        vae = load_vae(model).to(devices()[0])
    except (ValueError, OSError, RuntimeError) as error:
        report(Note(f"no pictures, for the VAE cannot be loaded: {error}"))
        return
    order = sorted(measures, key=lambda index: (measures[index].motion or 0.0, index))
    count = min(count, len(order))
    chosen = [order[number * (len(order) - 1) // max(1, count - 1)] for number in range(count)]
    progress = Progress(report, "decode", len(chosen))
    for index in chosen:
        clip = data.clips[index]
        yield Strip(clip, measures[index].motion, measures[index].detail, _thumbnails(vae, data.latents(index), frames))
        progress.advance()


def _thumbnails(vae: AutoencoderKLWan, latents: Tensor, count: int) -> list[Image.Image]:
    """`count` frames from the first to the last of ``[C, F, h, w]``; only these are held."""
    total = 4 * latents.shape[1] - 3
    wanted = {round(number * (total - 1) / max(1, count - 1)) for number in range(min(count, total))}
    images: list[Image.Image] = []
    number = 0
    for chunk in decode_chunks(vae, latents[None]):
        for offset, frame in enumerate(to_uint8(chunk)):
            if number + offset in wanted:
                images.append(_thumbnail(Image.fromarray(frame)))
        number += chunk.shape[2]
    return images


def _thumbnail(image: Image.Image) -> Image.Image:
    """The longest side of one length, so that clips of a small model can be seen, too."""
    scale = min(_THUMBNAIL_SIDE / max(image.size), 3.0)
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _skipped(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


# ---- what the page says ----------------------------------------------------------------------------------------------


def _facts(data: LatentDataset, measures: dict[int, Measures], skipped: list[dict[str, str]]) -> dict[str, Any]:
    clips = data.clips
    captions = Counter(clip.caption for clip in clips)
    tokens = _tokens(data)
    motions = [m.motion for m in measures.values() if m.motion is not None]
    details = [m.detail for m in measures.values()]
    duplicates = [entry for entry in skipped if "duplicate_of" in entry]
    others = [entry for entry in skipped if "duplicate_of" not in entry]
    return {
        "name": data.folders[0].resolve().name,
        "model": data.facts.model,
        "made_by": (data.facts.settings or {}).get("made_by", ""),
        "hash": data.hash,
        "clips": len(clips),
        "measured": len(measures),
        "seconds": sum(clip.seconds for clip in clips),
        "pictures": sum(clip.frames == 1 for clip in clips),
        "sources": len({clip.sha256 or clip.source for clip in clips}),
        "captions": len(captions),
        "bytes": sum(
            path.stat().st_size for folder in data.folders for path in (folder / LATENTS_FOLDER).glob("*.safetensors")
        ),
        "buckets": _buckets(clips),
        "histograms": [
            histogram("Length", "seconds", [clip.seconds for clip in clips], "how long the clips are"),
            histogram("Motion", "", motions, "mean change of the latents from frame to frame: 0 is a still"),
            histogram("Detail", "", details, "share of the variance that a small blur removes: low is blurred"),
            histogram("Captions", "words", [len(clip.caption.split()) for clip in clips], "words per caption"),
        ],
        "words": _words(captions),
        "notes": list(_notes(data, measures, captions, tokens)),
        "duplicates": duplicates,
        "skipped": others,
        "reasons": reasons_of(others).most_common(12),
    }


def _tokens(data: LatentDataset) -> dict[str, int]:
    """Tokens of each caption: the rows of its embeddings."""
    first: dict[str, int] = {}
    for index, clip in enumerate(data.clips):
        first.setdefault(clip.caption, index)
    chosen = list(first.items())[:_MEASURED_CLIPS]
    return {caption: data.embeds(index).shape[0] for caption, index in chosen}


def _buckets(clips: Sequence[ClipInfo]) -> list[dict[str, Any]]:
    counts = Counter((clip.width, clip.height, clip.frames) for clip in clips)
    return [
        {"size": f"{width} x {height}", "frames": frames, "count": count, "share": count / len(clips)}
        for (width, height, frames), count in sorted(counts.items(), key=lambda item: -item[1])
    ]


def _words(captions: Counter[str]) -> list[tuple[str, int]]:
    """The words that most clips have in their captions."""
    counts: Counter[str] = Counter()
    for caption, clips in captions.items():
        words = {word.strip(".,;:!?\"'()[]").lower() for word in caption.split()}
        counts.update({word: clips for word in words if len(word) > 1 and not word.isdigit()})
    told = [(word, count) for word, count in counts.items() if word not in _COMMON_WORDS]
    return sorted(told, key=lambda item: (-item[1], item[0]))[:40]


def _notes(
    data: LatentDataset, measures: dict[int, Measures], captions: Counter[str], tokens: dict[str, int]
) -> Iterator[dict[str, str]]:
    """What people would want to know before they train: a line, and which clips it is about."""

    def named(indices: Sequence[int]) -> str:
        names = [data.clips[index].source or data.clips[index].id for index in indices[:_NAMES]]
        return ", ".join(names) + (f" and {len(indices) - _NAMES} more" if len(indices) > _NAMES else "")

    moving = {index: m.motion for index, m in measures.items() if m.motion is not None}
    if moving:
        middle = median(moving.values())
        still = sorted((i for i, motion in moving.items() if motion < _STILL * middle), key=lambda i: moving[i])
        if still:
            told = _many(len(still), "clip hardly moves", "clips hardly move")
            yield {"text": f"{told}, compared with the others", "names": named(still)}
    if measures:
        middle = median(m.detail for m in measures.values())
        soft = [i for i, m in measures.items() if m.detail < _BLURRED * middle]
        if soft:
            told = _many(len(soft), "clip is blurred", "clips are blurred")
            yield {"text": f"{told}, compared with the others", "names": named(soft)}
    long = [caption for caption, count in tokens.items() if count >= data.max_sequence_length]
    if long:
        told = _many(len(long), "caption fills", "captions fill")
        text = f"{told} all {data.max_sequence_length} tokens: what is longer was cut"
        yield {"text": text, "names": "; ".join(caption[:60] + "..." for caption in long[:3])}
    caption, count = captions.most_common(1)[0]
    if count > max(2, 0.1 * len(data)):
        yield {"text": f"{count} clips share one caption", "names": caption[:120]}
    short = [index for index, clip in enumerate(data.clips) if len(clip.caption.split()) < 3]
    if short:
        told = _many(len(short), "caption has", "captions have")
        yield {"text": f"{told} fewer than three words", "names": named(short)}
    small = [indices for indices in data.buckets.values() if len(indices) < 4]
    if small:
        rare = sum(map(len, small))
        told = _many(rare, "clip is in a bucket", "clips are in buckets")
        yield {"text": f"{told} of fewer than four, which fill no batch", "names": ""}


def _many(count: int, one: str, several: str) -> str:
    return f"{count} {one if count == 1 else several}"


def histogram(title: str, unit: str, values: Sequence[float], about: str, *, bins: int = 24) -> dict[str, Any]:
    """Counts in bins of equal width, for the page; empty for no values."""
    if not values:
        return {}
    low, high = min(values), max(values)
    whole = all(float(value).is_integer() for value in values)
    is_each = low == high or (whole and high - low < bins)  # each value has its bar
    edges = low - 0.5 + np.arange(int(high - low) + 2) if is_each else np.linspace(low, high, bins + 1)
    counts, edges = np.histogram(values, edges)
    return {
        "title": title,
        "unit": unit,
        "about": about,
        "low": _short(low),
        "median": _short(median(values)),
        "high": _short(high),
        "bars": [
            {
                "height": round(100 * count / counts.max(), 1),
                "label": f"{_short(left + 0.5)}: {count}" if is_each else _range(left, right, count),
            }
            for count, left, right in zip(counts.tolist(), edges[:-1], edges[1:], strict=True)
        ],
    }


def _range(left: float, right: float, count: int) -> str:
    return f"{_short(left)} to {_short(right)}: {count}"


def _short(value: float) -> str:
    return f"{value:.3g}"
