"""Prepare a dataset: encode videos and pictures with captions to latents and prompt embeddings.

Four passes: list the files, probe each (hash, size, length), encode the captions that are new, then decode and encode
the clips that are missing. Files that cannot be used are listed in ``skipped.jsonl``. A run that was stopped continues
where it was, because a clip's id comes from the content it was cut from.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from math import isqrt
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pusa import zoo
from pusa.data import sources
from pusa.data.clips import Cut, DecodedClip, Media, Scan, Size, clip_starts, frames_at, nearest_size, work
from pusa.data.dataset import DatasetWriter
from pusa.data.encoding import (
    ClipEncoder,
    StageProgress,
    add_prompts,
    check_clip_shape,
    devices,
    identity_of_vae,
    load_vae,
)
from pusa.data.original import OriginalFolder, is_original
from pusa.data.sources import Item
from pusa.data.workers import Failure, Workers, usable_cores
from pusa.events import Done, Events, Note, Report, Stage, as_events, report_until_stopped
from pusa.fsutil import replacing

SKIPPED_FILE = "skipped.jsonl"
_MAX_WORKERS = 8


@dataclass(frozen=True, kw_only=True)
class ClipSettings:
    """Choose how clips are cut; fields left open take the model's defaults.

    Attributes:
        model: a name of the zoo, a Hub id or a folder.
        sizes: (width, height) in pixels, multiples of the model's; each clip gets the one that needs the least cutting.
            Empty: the model's size, the same upright, and a square of the same area.
        frames: lengths that the model makes, 4n + 1 for Wan, 6n + 1 for Mochi, any for FVDM; each video gets the
            longest that it fills. Pictures always have one frame.
        fps: frames per second of clips; videos of another rate are converted by dropping or repeating frames.
        clips_per_video: at most so many are cut from one video; None: as many as fit.
        stride_seconds: from the beginning of one clip to the next; None: they follow each other.
        dtype: of the latents on disk.
    """

    model: str
    sizes: tuple[Size, ...] = ()
    frames: tuple[int, ...] = ()
    fps: float | None = None
    clips_per_video: int | None = 1
    stride_seconds: float | None = None
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        check_clip_shape(self.sizes, self.frames, zoo.defaults_of(self.model))
        for name in ("fps", "clips_per_video", "stride_seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name}={value} is not above 0")

    def resolved(self) -> "ClipSettings":
        """Fill the open fields from the model's defaults."""
        defaults = zoo.defaults_of(self.model)
        width, height = defaults.width, defaults.height
        multiple = defaults.size_multiple
        side = max(multiple, isqrt(width * height) // multiple * multiple)
        sizes = self.sizes or tuple(dict.fromkeys([(width, height), (height, width), (side, side)]))
        return replace(
            self,
            sizes=tuple(sorted(sizes)),
            frames=tuple(sorted(self.frames or (defaults.num_frames,))),
            fps=float(self.fps or defaults.fps),
        )

    def as_json(self) -> dict[str, Any]:
        values = asdict(self)
        del values["model"], values["dtype"]  # the dataset itself has them
        return {"made_by": "prepare", **values}


@dataclass
class Skipped:
    """Collect the files that were left out and why, for `SKIPPED_FILE`."""

    path: Path
    entries: list[dict[str, str]] = field(default_factory=list)

    def add(self, source: str, reason: str, *, path: Path | None = None, **more: str) -> None:
        """Add a file; `path` is removed from the beginning of its reason, as `source` names it."""
        reason = reason.removeprefix(str(path)).lstrip(" :") if path else reason
        self.entries.append({"source": source, "reason": reason, **more})

    @property
    def duplicates(self) -> int:
        return sum("duplicate_of" in entry for entry in self.entries)

    def write(self) -> None:
        lines = [
            json.dumps(entry, ensure_ascii=False) + "\n" for entry in sorted(self.entries, key=itemgetter("source"))
        ]
        with replacing(self.path) as part:
            part.write_text("".join(lines), encoding="utf-8")


@dataclass(frozen=True)
class FilePlan:
    """Hold the planned clips of one file: first frame -> clip id."""

    item: Item
    media: Media
    size: Size
    frames: int
    clips: Mapping[int, str]


def prepare(
    source: str | Path,
    output: Path,
    settings: ClipSettings,
    *,
    captions: Path | None = None,
    caption: str | None = None,
    workers: int | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Events:
    """Make a dataset from a source, or continue one.

    Args:
        source: see `pusa.data.sources.list_files`; or a folder in the layout of the original's training data, whose
            latents and embeddings are taken over; or a dataset on the Hub that is like one of these.
        output: the dataset's folder.
        settings: how clips are cut. When a dataset is continued, sizes and lengths that are new are added to it as
            further buckets, whose clips come beside those that are there; other settings must not change.
        captions, caption: see `pusa.data.sources.list_files`. A model without text has the numbers of its classes as
            captions, and files may have none; one without classes needs none, and takes none.
        workers: processes that decode; 0: none but this one. None: one per core, up to 8.
        stop: called at every step; True ends the run, and finished clips are kept.

    Yields:
        Events, see `pusa.events`; the last is ``done`` with `output`, unless `stop` ended the run.

    Raises:
        ValueError, FileNotFoundError: settings, source or output do not fit together. Raised before a model is
            loaded.
    """

    def run(report: Report) -> None:
        report_or_stop = report_until_stopped(report, stop)
        folder = Path(source).expanduser()
        if not folder.exists() and zoo.is_hub_id(source):
            report_or_stop(Stage("download"))
            folder = sources.download(str(source))
        if is_original(folder):
            _convert_original(folder, output, settings, report_or_stop)
        else:
            defaults = zoo.defaults_of(settings.model)
            default = caption if defaults.has_text else caption or ""
            listing = sources.list_files(folder, captions=captions, caption=default)
            if defaults.classes == 0:  # every prompt is empty
                listing.items = [replace(item, caption="") for item in listing.items]
            _prepare(listing, output, settings, workers, report_or_stop)
        report(Done({"dataset": output}))

    return as_events(run)


def _prepare(
    listing: sources.Listing, output: Path, settings: ClipSettings, workers: int | None, report: Report
) -> None:
    chosen = settings.resolved()
    count = min(usable_cores(), _MAX_WORKERS) if workers is None else workers
    skipped = Skipped(output / SKIPPED_FILE)
    length = zoo.defaults_of(chosen.model).max_sequence_length
    writing = DatasetWriter(
        output,
        model=chosen.model,
        dtype=chosen.dtype,
        settings=chosen.as_json(),
        growing=("sizes", "frames"),
        max_sequence_length=length,
    )
    with writing as writer, Workers(work, min(count, max(1, len(listing.items)))) as pool:
        for name, reason in listing.skipped:
            skipped.add(name, reason)
        plan = _plan(listing.items, _scan_files(listing.items, pool, skipped, report), chosen, skipped, report)
        skipped.write()
        if not plan:
            raise ValueError(f"none of {len(listing.items)} files can be used: {skipped.path} says why")
        add_prompts(writer, (planned.item.caption for planned in plan), report)
        captions = {planned.media.sha256: planned.item.caption for planned in plan}
        for clip in writer:  # of earlier buckets, too: the caption may have been corrected since
            writer.recaption(clip.id, captions.get(clip.sha256, clip.caption))
        _encode(plan, writer, pool, chosen, skipped, report)
        skipped.write()
        if not len(writer):
            raise ValueError(f"none of {len(listing.items)} files can be decoded: {skipped.path} says why")
    report(Note(_summary(writer, skipped)))


def _scan_files(items: list[Item], pool: Workers[Any], skipped: Skipped, report: Report) -> dict[int, Media]:
    found = {}
    progress = StageProgress(report, "look into files", len(items))

    def tasks() -> Iterator[Scan]:
        for index, item in enumerate(items):
            try:
                yield Scan(index, item.content())
            except (ValueError, OSError) as error:
                skipped.add(item.name, str(error))
                progress.advance()

    with closing(pool.run(tasks())) as results:
        for task, result in results:
            if isinstance(result, Failure):
                item = items[task.index]
                skipped.add(item.name, result.reason, path=item.path)
            else:
                found[task.index] = result
            progress.advance()
    return found


def _plan(
    items: list[Item], found: Mapping[int, Media], settings: ClipSettings, skipped: Skipped, report: Report
) -> list[FilePlan]:
    """Plan which clips to cut from which files, in the order of the source; of equal files the first is used."""
    assert settings.fps is not None
    first: dict[str, str] = {}
    plan = []
    enlarged = repeated = 0
    for index, item in enumerate(items):
        media = found.get(index)
        if media is None:
            continue
        if media.sha256 in first:
            name = first[media.sha256]
            skipped.add(item.name, f"has the same content as {name}", duplicate_of=name)
            continue
        first[media.sha256] = item.name
        frames, starts = 1, [0]
        if media.kind == "video":
            available = frames_at(media.seconds, settings.fps)
            fitting = [length for length in settings.frames if length <= available]
            if not fitting:
                skipped.add(
                    item.name,
                    f"is too short ({available} frames at {settings.fps:g} fps, the shortest clip has "
                    f"{settings.frames[0]}): give a smaller --frames as well",
                )
                continue
            frames = max(fitting)
            starts = clip_starts(
                available,
                frames,
                settings.fps,
                clips=settings.clips_per_video,
                stride_seconds=settings.stride_seconds,
            )
            repeated += media.fps < 0.95 * settings.fps
        size = nearest_size(media.width, media.height, settings.sizes)
        enlarged += size[0] > media.width or size[1] > media.height
        ids = {start: _clip_id(media, start, frames, size, settings.fps) for start in starts}
        plan.append(FilePlan(item, media, size, frames, ids))
    if enlarged:
        report(Note(f"{enlarged} of {len(plan)} files are smaller than their clips: they are enlarged"))
    if repeated:
        report(Note(f"{repeated} of {len(plan)} files are slower than the clips' frame rate: frames are repeated"))
    return plan


def _clip_id(media: Media, start: int, frames: int, size: Size, fps: float) -> str:
    """Make an id from the content of the clip, which does not depend on the file's place or name."""
    return f"{media.sha256[:16]}-{round(1000 * start / fps)}ms-{frames}f{fps:g}-{size[0]}x{size[1]}"


def _encode(
    plan: Iterable[FilePlan],
    writer: DatasetWriter,
    pool: Workers[Any],
    settings: ClipSettings,
    skipped: Skipped,
    report: Report,
) -> None:
    plan = list(plan)
    missing = {
        index: [start for start, clip_id in planned.clips.items() if clip_id not in writer]
        for index, planned in enumerate(plan)
    }
    total, to_encode = sum(len(planned.clips) for planned in plan), sum(map(len, missing.values()))
    if not to_encode:
        return
    report(Stage("load the VAE"))
    vae = load_vae(settings.model)
    writer.identify(vae=identity_of_vae(vae))
    encoder = ClipEncoder(vae, devices())
    progress = StageProgress(report, "encode clips", total, done=total - to_encode)

    def tasks() -> Iterator[Cut]:
        assert settings.fps is not None
        for index, planned in enumerate(plan):
            if missing[index]:
                media, content = planned.media, planned.item.content()
                starts = tuple(missing[index])
                yield Cut(index, content, media.kind, planned.size, planned.frames, settings.fps, starts)

    def decoded() -> Iterator[tuple[tuple[FilePlan, int], np.ndarray]]:
        with closing(pool.run(tasks())) as results:
            for task, result in results:
                planned = plan[task.index]
                if isinstance(result, Failure):
                    skipped.add(planned.item.name, result.reason, path=planned.item.path)
                    progress.advance(len(missing[task.index]))
                else:
                    assert isinstance(result, DecodedClip)
                    missing[task.index].remove(result.start)
                    yield (planned, result.start), result.pixels

    with closing(encoder.encode_all(decoded())) as clips:
        for (planned, start), latents in clips:
            _add(writer, planned, start, latents, settings)
            progress.advance()


def _add(writer: DatasetWriter, planned: FilePlan, start: int, latents: Tensor, settings: ClipSettings) -> None:
    assert settings.fps is not None
    writer.add(
        planned.clips[start],
        latents,
        planned.item.caption,
        fps=settings.fps,
        width=planned.size[0],
        height=planned.size[1],
        frames=planned.frames,
        source=planned.item.name,
        sha256=planned.media.sha256,
        start_seconds=start / settings.fps,
    )


# ---- the original's layout -------------------------------------------------------------------------------------------


def _convert_original(folder: Path, output: Path, settings: ClipSettings, report: Report) -> None:
    """Copy latents and embeddings in the original's layout; only the empty caption must be encoded."""
    if settings.sizes or settings.frames or settings.fps or settings.clips_per_video != 1 or settings.stride_seconds:
        raise ValueError(f"{folder} holds latents: their size, length and rate are given, leave those options out")
    report(Stage("look into files"))
    original = OriginalFolder(folder)
    skipped = Skipped(output / SKIPPED_FILE)
    for name, reason in original.skipped:
        skipped.add(name, reason)
    length = original.facts.max_sequence_length
    writing = DatasetWriter(
        output,
        model=settings.model,
        dtype=settings.dtype,
        settings={"made_by": "prepare"},
        max_sequence_length=length,
    )
    with writing as writer:
        clips = [clip for clip in original.clips if clip.caption]
        for clip in original.clips:
            if not clip.caption:
                skipped.add(clip.source, f"has no caption in {sources.METADATA_FILES[0]}")
        skipped.write()
        if not clips:
            raise ValueError(f"{folder} has no clips with captions: {skipped.path} says more")
        if not writer.has_prompt(""):
            add_prompts(writer, [], report, reference=(clips[0].caption, original.embeds(clips[0])))
        progress = StageProgress(report, "take over clips", len(clips), done=len(writer))
        for clip in clips:
            if clip.id in writer:
                continue
            writer.add_prompt(clip.caption, original.embeds(clip))
            writer.add(
                clip.id,
                original.latents(clip),
                clip.caption,
                fps=clip.fps,
                height=clip.height,
                width=clip.width,
                frames=clip.frames,
                source=clip.source,
            )
            progress.advance()
    report(Note(_summary(writer, skipped)))


# ---- summary ---------------------------------------------------------------------------------------------------------


def _summary(writer: DatasetWriter, skipped: Skipped) -> str:
    clips = list(writer)
    buckets = Counter((clip.width, clip.height, clip.frames) for clip in clips)
    words = [f"{width}x{height}x{frames}: {count}" for (width, height, frames), count in sorted(buckets.items())]
    moving = [clip.seconds for clip in clips if clip.frames > 1]
    pictures = len(clips) - len(moving)
    kinds = [f"{len(moving)} clip{'s' * (len(moving) > 1)} of {sum(moving):.0f} s"] if moving else []
    kinds += [f"{pictures} picture{'s' * (pictures > 1)}"] if pictures else []
    text = f"{' and '.join(kinds) or 'no clips'} ({', '.join(words)})"
    reasons = reasons_of(skipped.entries)
    counts = ((skipped.duplicates, "duplicate"), (sum(reasons.values()), "file"))
    left_out = " and ".join(f"{count} {what}{'s' * (count > 1)}" for count, what in counts if count)
    if left_out:
        text += f"; left out: {left_out}, see {skipped.path}"
    [(reason, count)] = reasons.most_common(1) or [("", 0)]
    return text + (f"; {count} of them: {reason}" if count > 1 else "")


def reasons_of(entries: Iterable[Mapping[str, str]]) -> Counter[str]:
    """Count the reasons why files were left out, without the numbers in them; duplicates do not count."""
    return Counter(re.sub(r" \([^)]*\)", "", entry["reason"]) for entry in entries if "duplicate_of" not in entry)
