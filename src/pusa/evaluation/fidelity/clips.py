"""Find the user's clips and their prompts, and cut out of them what requests are given."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pusa import media
from pusa.conditions import fit_image
from pusa.data.sources import VIDEO_SUFFIXES, list_files
from pusa.evaluation.fidelity.tasks import Layout
from pusa.fsutil import replacing, sha256_of
from pusa.request import ResolvedRequest


@dataclass(frozen=True)
class Clip:
    """Hold a video of the user's: its name, unique in the run and fit for a file, its prompt and its content's hash."""

    name: str
    prompt: str
    path: Path
    sha256: str


def find_clips(source: Path, *, prompts: Path | None = None, prompt: str | None = None) -> tuple[list[Clip], list[str]]:
    """Find videos and their prompts.

    Args:
        source: a folder of videos, a table of them, or one video; see `pusa.data.sources.list_files`.
        prompts: a CSV, JSON or JSONL table of files and prompts, which wins over texts beside the videos.
        prompt: of clips that have none; it may be empty. None: such clips are left out.

    Returns:
        The clips in the order of their names, and a note for each file that is left out.

    Raises:
        FileNotFoundError, ValueError: there is no such source, or it has no video with a prompt.
    """
    if prompts is not None and not prompts.is_file():
        raise FileNotFoundError(f"{prompts}: no such file: give a CSV, JSON or JSONL table of files and prompts")
    try:
        listing = list_files(source, captions=prompts, caption=prompt)
    except ValueError as error:
        raise ValueError(_about_prompts(str(error))) from error
    notes = [f"{name} {_about_prompts(reason)}" for name, reason in listing.skipped]
    videos = [item for item in listing.items if item.path is not None and item.path.suffix.lower() in VIDEO_SUFFIXES]
    if not videos:
        raise ValueError(f"{source} has no video with a prompt: " + ("; ".join(notes) or "it holds other files only"))
    names = list(_unique(Path(item.name).with_suffix("").as_posix() for item in videos))
    clips = [
        Clip(name, item.caption, item.path, sha256_of(item.path))
        for name, item in zip(names, videos, strict=True)
        if item.path is not None
    ]
    return clips, notes


def _about_prompts(text: str) -> str:
    """Name the option that this measurement has in a message about captions."""
    return text.replace("--caption", "--prompt")


def _unique(names: Iterable[str]) -> Iterator[str]:
    """Make names of files of at most 60 letters out of paths."""
    seen: set[str] = set()
    for name in names:
        short = re.sub(r"[^\w.+]+", "-", name).strip("-.")[:60] or "clip"
        number = 1
        while (unique := short if number == 1 else f"{short}-{number}") in seen:
            number += 1
        seen.add(unique)
        yield unique


def inputs_folder(inputs: Path, clip: Clip, resolved: ResolvedRequest) -> Path:
    """Return the folder of a clip's files at a size and a rate; another content has another folder."""
    size = f"{resolved.width}x{resolved.height}-{resolved.fps:g}fps"
    return inputs / f"{clip.name}-{size}-{clip.sha256[:12]}"


def prepare_inputs(clip: Clip, resolved: ResolvedRequest, layouts: Sequence[Layout], inputs: Path) -> Path:
    """Write the clip at the size and the rate of a request, and what each layout gives of it, unless it is there.

    Returns:
        The file of the clip itself, as long as the longest layout can use; the others are beside it.

    Raises:
        ValueError: the clip has fewer frames than the request.
        MediaError: it cannot be read.
    """
    folder = inputs_folder(inputs, clip, resolved)
    wanted = {entry.file: entry for layout in layouts for entry in layout.files}
    longest = max(layout.frames for layout in layouts)
    real = folder / f"real-{longest:04d}.mp4"  # of each length its own: the points of a sweep share the folder
    if real.is_file() and all((folder / name).is_file() for name in wanted):
        return real
    frames = read_clip(clip.path, resolved, longest)
    if len(frames) < resolved.frames:
        raise ValueError(
            f"{clip.path.name} has {len(frames)} frames at {resolved.fps:g} fps, {resolved.frames} are needed: "
            "leave it out, or ask for fewer --frames"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, entry in wanted.items():
        if entry.is_picture:
            with replacing(folder / name) as part:
                Image.fromarray(frames[entry.first]).save(part, "PNG")
        else:
            _write_video(folder / name, frames[entry.first : entry.last + 1], resolved.fps)
    _write_video(real, frames, resolved.fps)
    return real


def read_clip(path: Path, resolved: ResolvedRequest, most_frames: int) -> np.ndarray:
    """Read a video as a request would: its frames at its rate, cut to its size, uint8 ``[F, H, W, 3]``."""
    size = resolved.width, resolved.height
    frames = media.iter_video(path, fps=resolved.fps, fit=size, max_frames=most_frames)
    return np.stack([np.asarray(fit_image(frame, *size, "crop")) for frame in frames])


def _write_video(path: Path, frames: np.ndarray, fps: float) -> None:
    _, height, width, _ = frames.shape
    with media.VideoWriter(path, width=width, height=height, fps=fps, lossless=True) as writer:
        writer.write(frames)
