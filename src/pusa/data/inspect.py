"""Inspect a dataset before training: write an HTML page and a contact sheet.

Motion and detail are measured on the latents that will be trained on; thumbnails are decoded from them.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import jinja2
import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pusa.data.dataset import ClipInfo, LatentDataset
from pusa.data.encoding import StageProgress, decode_spread, devices, load_vae
from pusa.data.format import LATENTS_FOLDER
from pusa.data.prepare import SKIPPED_FILE, reasons_of
from pusa.events import Done, Events, Note, Report, Stage, as_events, report_until_stopped
from pusa.generate import prompt_hints
from pusa.generate.prompt_hints import vocabulary
from pusa.media.previews import Strip, as_data_uri, grid, spread, strip_sheet, write_picture
from pusa.resources import readable, readable_time

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).parent / "templates" / "inspect.html"
_MEASURED_CLIPS = 4000  # enough for medians and histograms; each must be read from disk
_THUMBNAIL_SIDE = 240  # pixels
_STILL, _BLURRED = 0.35, 0.7  # shares of the median motion and detail
_GAP = 4  # pixels between frames
_NAMES = 5  # clips named in a note
_UNKNOWN_WORDS = 20  # named in a note; the page has all
_COMMON = (
    "a an and are as at be been being but by for from had has have he her his in into is it its of on or over she so "
    "that the their them then there they this through to under up was were what which while who with"
)
_COMMON_WORDS = frozenset(_COMMON.split())


@dataclass(frozen=True)
class Measures:
    """Hold what was measured of one clip.

    Attributes:
        motion: mean change of a latent from one latent frame to the next: 0 is a still, unrelated frames have about
            1.1. The step from the first to the second is left out, as the VAE encodes the first frame alone and even a
            still differs there. None for a picture.
        detail: the share of the latents' variance that a 3 x 3 blur removes; low for blurred and enlarged clips.
    """

    motion: float | None
    detail: float


def measure(latents: Tensor) -> Measures:
    """Measure motion and detail of latents ``[C, F, h, w]``."""
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
    """Write an HTML page in one file and, under the same name, a contact sheet (PNG).

    Args:
        folder: as for `LatentDataset`.
        output: the page.
        clips: how many to decode and show, from least to most motion; 0: none, and no sheet.
        frames: how many to show of each clip.
        model: the model whose VAE decodes; None: the one that the dataset names.
        stop: called at every step; True ends the run, and nothing is written.

    Yields:
        Events, see `pusa.events`; ``done`` for the page and for the sheet.

    Raises:
        FileNotFoundError, ValueError: there is no dataset, or a number is out of range.
    """
    if clips < 0 or frames < 1:
        raise ValueError(f"clips={clips}, frames={frames}: at least 0 clips of at least 1 frame")

    def run(report: Report) -> None:
        report_or_stop = report_until_stopped(report, stop)
        data = LatentDataset(folder)
        if not output.parent.is_dir():
            raise FileNotFoundError(f"{output.parent} is no folder: make it first")
        measures = _measure_clips(data, report_or_stop)
        strips = (
            list(_strips(data, measures, clips, frames, model or data.facts.model, report_or_stop)) if clips else []
        )
        skipped = [entry for one in data.folders for entry in _read_skipped(one / SKIPPED_FILE)]
        unknown = unknown_words(data)
        if unknown:
            report(Note(_unknown_note(unknown, data.facts.model)))
        facts = _facts(data, measures, skipped, unknown, report_or_stop)
        output.write_text(page(facts, strips), encoding="utf-8")
        report(Done({"page": output}))
        if strips:
            sheet = output.with_suffix(".png")
            title = f"{data.folders[0].resolve().name}, from still to lively"
            write_picture(strip_sheet(strips, columns=frames, cell_width=_THUMBNAIL_SIDE, title=title), sheet)
            report(Done({"contact_sheet": sheet}))

    return as_events(run)


def _measure_clips(data: LatentDataset, report: Report) -> dict[int, Measures]:
    count = min(len(data), _MEASURED_CLIPS)
    progress = StageProgress(report, "measure", count)
    measures = {}
    for number in range(count):
        index = number * len(data) // count
        measures[index] = measure(data.latents(index))
        progress.advance()
    return measures


def _strips(
    data: LatentDataset, measures: dict[int, Measures], count: int, frames: int, model: str, report: Report
) -> Iterator[Strip]:
    """Decode frames of clips, evenly spread over their order by motion."""
    try:
        if not model:
            raise ValueError("the dataset does not say which model it is for: give --model")
        report(Stage("load the VAE"))
        vae = load_vae(model).to(devices()[0])
    except (ValueError, OSError, RuntimeError) as error:
        report(Note(f"no pictures, for the VAE cannot be loaded: {error}"))
        return
    order = sorted(measures, key=lambda index: (measures[index].motion or 0.0, index))
    chosen = [order[place] for place in spread(len(order), count)]
    progress = StageProgress(report, "decode", len(chosen))
    for index in chosen:
        numbers, pixels = decode_spread(vae, data.latents(index)[None], frames)
        clip = data.clips[index]
        yield Strip(clip.caption, pixels, numbers, title=describe_clip(clip, measures[index]))
        progress.advance()


def describe_clip(clip: ClipInfo, measures: Measures) -> str:
    """Format a line about a clip: ``fox.mp4 at 2.50 s: 81 frames, motion 0.31, detail 0.52``."""
    start = f" at {clip.start_seconds:.2f} s" if clip.start_seconds else ""
    parts = [f"{clip.frames} frames" if clip.frames > 1 else "picture"]
    parts += [] if measures.motion is None else [f"motion {measures.motion:.2f}"]
    return f"{clip.source or clip.id}{start}: {', '.join([*parts, f'detail {measures.detail:.2f}'])}"


def _read_skipped(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


# ---- contents of the page --------------------------------------------------------------------------------------------


def unknown_words(data: LatentDataset) -> list[tuple[str, int]]:
    """Count in how many clips' captions each word occurs that the model does not know; the most frequent come first.

    Empty for a model that reads any text.
    """
    if not data.facts.model or not vocabulary(data.facts.model):
        return []
    counts: Counter[str] = Counter()
    for caption, clips in Counter(clip.caption for clip in data.clips).items():
        counts.update(dict.fromkeys((one.word for one in prompt_hints.unknown_words(caption, data.facts.model)), clips))
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _unknown_note(unknown: list[tuple[str, int]], model: str) -> str:
    named = ", ".join(f"{word} ({count})" for word, count in unknown[:_UNKNOWN_WORDS])
    more = f" and {len(unknown) - _UNKNOWN_WORDS} more" if len(unknown) > _UNKNOWN_WORDS else ""
    return (
        f"{len(unknown)} words of captions are not in the vocabulary of {model}, which cannot tell them apart "
        f"(clips): {named}{more}. `pusa models show {model}` lists its words"
    )


def _facts(
    data: LatentDataset,
    measures: dict[int, Measures],
    skipped: list[dict[str, str]],
    unknown: list[tuple[str, int]],
    report: Report,
) -> dict[str, Any]:
    clips = data.clips
    captions = Counter(clip.caption for clip in clips)
    tokens = _tokens(data, report)
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
        "unknown_words": unknown,
        "notes": list(_notes(data, measures, captions, tokens)),
        "duplicates": duplicates,
        "skipped": others,
        "reasons": reasons_of(others).most_common(12),
    }


def _tokens(data: LatentDataset, report: Report) -> dict[str, int]:
    """Count the tokens of each caption: the rows of its embeddings."""
    first_clips: dict[str, int] = {}
    for index, clip in enumerate(data.clips):
        first_clips.setdefault(clip.caption, index)
    chosen = list(first_clips.items())[:_MEASURED_CLIPS]
    progress, tokens = StageProgress(report, "read captions", len(chosen)), {}
    for text, index in chosen:
        tokens[text] = data.embeds(index).shape[0]
        progress.advance()
    return tokens


def _buckets(clips: Sequence[ClipInfo]) -> list[dict[str, Any]]:
    counts = Counter((clip.width, clip.height, clip.frames) for clip in clips)
    return [
        {"size": f"{width} x {height}", "frames": frames, "count": count, "share": count / len(clips)}
        for (width, height, frames), count in sorted(counts.items(), key=lambda item: -item[1])
    ]


def _words(captions: Counter[str]) -> list[tuple[str, int]]:
    """Count in how many clips' captions each word occurs; return the most frequent."""
    counts: Counter[str] = Counter()
    for caption, clips in captions.items():
        words = {word.strip(".,;:!?\"'()[]").lower() for word in caption.split()}
        counts.update({word: clips for word in words if len(word) > 1 and not word.isdigit()})
    uncommon = [(word, count) for word, count in counts.items() if word not in _COMMON_WORDS]
    return sorted(uncommon, key=lambda item: (-item[1], item[0]))[:40]


def _notes(
    data: LatentDataset, measures: dict[int, Measures], captions: Counter[str], tokens: dict[str, int]
) -> Iterator[dict[str, str]]:
    """Yield what deserves a look before training: a line of text, and the clips it is about."""

    def named(indices: Sequence[int]) -> str:
        names = [data.clips[index].source or data.clips[index].id for index in indices[:_NAMES]]
        return ", ".join(names) + (f" and {len(indices) - _NAMES} more" if len(indices) > _NAMES else "")

    moving = {index: m.motion for index, m in measures.items() if m.motion is not None}
    if moving:
        middle = median(moving.values())
        still = sorted((i for i, motion in moving.items() if motion < _STILL * middle), key=lambda i: moving[i])
        if still:
            subject = _plural(len(still), "clip hardly moves", "clips hardly move")
            yield {"text": f"{subject}, compared with the others", "names": named(still)}
    if measures:
        middle = median(m.detail for m in measures.values())
        soft = [i for i, m in measures.items() if m.detail < _BLURRED * middle]
        if soft:
            subject = _plural(len(soft), "clip is blurred", "clips are blurred")
            yield {"text": f"{subject}, compared with the others", "names": named(soft)}
    long = [caption for caption, count in tokens.items() if count >= data.max_sequence_length]
    if long:
        subject = _plural(len(long), "caption fills", "captions fill")
        text = f"{subject} all {data.max_sequence_length} tokens: what is longer was cut"
        yield {"text": text, "names": "; ".join(caption[:60] + "..." for caption in long[:3])}
    caption, count = captions.most_common(1)[0]
    if count > max(2, 0.1 * len(data)):
        yield {"text": f"{count} clips share one caption", "names": caption[:120]}
    short = [index for index, clip in enumerate(data.clips) if len(clip.caption.split()) < 3]
    if short:
        subject = _plural(len(short), "caption has", "captions have")
        yield {"text": f"{subject} fewer than three words", "names": named(short)}
    small = [indices for indices in data.buckets.values() if len(indices) < 4]
    if small:
        rare = sum(map(len, small))
        subject = _plural(rare, "clip is in a bucket", "clips are in buckets")
        yield {"text": f"{subject} of fewer than four, which fill no batch", "names": ""}


def _plural(count: int, one: str, several: str) -> str:
    return f"{count} {one if count == 1 else several}"


def histogram(title: str, unit: str, values: Sequence[float], about: str, *, bins: int = 24) -> dict[str, Any]:
    """Count values in bins of equal width, for the page; {} for no values."""
    if not values:
        return {}
    low, high = min(values), max(values)
    whole = all(float(value).is_integer() for value in values)
    is_each = low == high or (whole and high - low < bins)  # a bar for each value
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


# ---- page -----------------------------------------------------------------------------------------------------------


def page(facts: dict[str, Any], strips: list[Strip]) -> str:
    """Render the page as one self-contained HTML file. The template escapes captions and names."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"bytes": readable, "duration": readable_time, "uri": as_uri}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(strips=strips, **facts)


def as_uri(strip: Strip) -> str:
    """Join the frames of a strip side by side as a JPEG ``data:`` URI.

    Their longest side becomes 240 pixels, but at most threefold, so that clips of small models can be seen.
    """
    height, width = strip.frames.shape[1:3]
    scale = min(_THUMBNAIL_SIDE / max(width, height), 3.0)
    size = max(1, round(scale * width)), max(1, round(scale * height))
    frames = [Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS) for frame in strip.frames]
    return as_data_uri(grid(frames, len(frames), gap=_GAP), quality=85)
