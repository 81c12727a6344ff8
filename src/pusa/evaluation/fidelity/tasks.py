"""Lay out the tasks: what of a clip the model is given, what it makes, and which frames of the result are which.

A clip is a user's video at the model's size and frame rate. Every layout puts the frames of the result at the places
that they have in the clip, so that frame i of the one is compared with frame i of the other.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, Literal, get_args

from pusa.positions import frames_of, latent_frames
from pusa.request import GenerationRequest, ResolvedRequest

TaskName = Literal["vae", "i2v", "start-end", "keyframes", "completion", "transition", "extension"]
TASKS: tuple[TaskName, ...] = get_args(TaskName)
"""``vae`` is no task of users: all latent frames are given, so that the result is the clip through the VAE."""

EXTENSIONS = 3


@dataclass(frozen=True)
class Given:
    """Name a file that a request is given, cut out of the clip.

    Attributes:
        first, last: frames of the clip, both included; one frame is a picture.
        positions: latent frames of the result; none: all that the file has, or where the task puts it.
    """

    first: int
    last: int
    positions: tuple[int, ...] = ()

    @property
    def is_picture(self) -> bool:
        return self.first == self.last and bool(self.positions)

    @property
    def file(self) -> str:
        """The name of the file in the folder of the clip's inputs."""
        return f"{self.first:04d}.png" if self.is_picture else f"{self.first:04d}-{self.last:04d}.mp4"


@dataclass(frozen=True)
class Layout:
    """Say which frames of a result are given and where it joins them.

    Attributes:
        frames: of the result.
        task: of the request.
        request_frames: the request's own number, which counts overlaps.
        files: what the request is given.
        given: frames of the result that show what was given.
        joints: the first frame after each border between given and made frames.
        middles: the frame farthest from its given neighbours, for each stretch between two given ones.
        extensions: first frame of each extension after the first one, where windows are chained.
    """

    frames: int
    task: Literal["generate", "extend", "transition"]
    request_frames: int
    files: tuple[Given, ...]
    given: tuple[int, ...]
    joints: tuple[int, ...]
    middles: tuple[int, ...] = ()
    extensions: tuple[int, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Layout":
        files = tuple(Given(**{**entry, "positions": tuple(entry["positions"])}) for entry in values["files"])
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list | tuple)}
        return cls(**{**values, **lists, "files": files})


def cut(layout: Layout, frames: int) -> Layout:
    """Leave out of a layout what is after the first `frames` frames, for a clip that is shorter than an extension."""
    if frames >= layout.frames:
        return layout

    def before(places: Sequence[int]) -> tuple[int, ...]:
        return tuple(place for place in places if place < frames)

    return replace(
        layout,
        frames=frames,
        given=before(layout.given),
        joints=before(layout.joints),
        middles=before(layout.middles),
        extensions=before(layout.extensions),
    )


def lay_out(task: TaskName, resolved: ResolvedRequest, extensions: int = EXTENSIONS) -> Layout:
    """Lay a task out for clips of the length of a resolved request.

    Args:
        resolved: an extension; its `frames` are the length of clips, its `window` and `overlap` those of continuations.
        extensions: in a row.

    Raises:
        ValueError: the clips are too short for the task.
    """
    layouts: dict[TaskName, Callable[[ResolvedRequest], Layout]] = {
        "vae": lambda request: _kept(request, range(latent_frames(request.frames, request.frames_per_latent))),
        "i2v": lambda request: _pictures(request, (0,)),
        "start-end": lambda request: _pictures(request, (0, -1)),
        "keyframes": _keyframes,
        "completion": _completion,
        "transition": _transition,
        "extension": lambda request: _extension(request, extensions),
    }
    return layouts[task](resolved)


def _keyframes(request: ResolvedRequest) -> Layout:
    count = latent_frames(request.frames, request.frames_per_latent)
    return _pictures(request, (0, count // 2, -1))


def _pictures(request: ResolvedRequest, places: Sequence[int]) -> Layout:
    """Lay out pictures at latent frames; a picture is the last frame that its latent frame stands for."""
    factor = request.frames_per_latent
    count = latent_frames(request.frames, factor)
    indices = [place % count for place in places]
    if len(set(indices)) < len(indices) or count < len(indices) + 1:
        least = frames_of(len(indices) + 1, factor)
        raise ValueError(
            f"frames={request.frames} leave nothing to make beside {len(indices)} pictures: give at least {least}"
        )
    frames = [frames_of(index + 1, factor) - 1 for index in indices]
    return Layout(
        request.frames,
        "generate",
        request.frames,
        tuple(Given(frame, frame, (index,)) for frame, index in zip(frames, indices, strict=True)),
        tuple(frames),
        _joints(indices, count, factor),
        _middles(frames),
    )


def _completion(request: ResolvedRequest) -> Layout:
    """Keep both ends of the clip, 3 of 21 latent frames each as in the paper's figure 11, at least 2."""
    count = latent_frames(request.frames, request.frames_per_latent)
    kept = max(2, round(count / 7))
    if 2 * kept >= count:
        least = frames_of(2 * kept + 1, request.frames_per_latent)
        raise ValueError(f"frames={request.frames} leave nothing to complete: give at least {least}")
    return _kept(request, [*range(kept), *range(count - kept, count)])


def _kept(request: ResolvedRequest, indices: Sequence[int]) -> Layout:
    factor, frames = request.frames_per_latent, request.frames
    given = [frame for index in indices for frame in _frames_at(index, factor)]
    return Layout(
        frames,
        "generate",
        frames,
        (Given(0, frames - 1, tuple(indices)),),
        tuple(given),
        _joints(indices, latent_frames(frames, factor), factor),
        _middles(given),
    )


def _transition(request: ResolvedRequest) -> Layout:
    """Cut the middle out of the clip, a third at least, and join its ends."""
    factor = request.frames_per_latent
    kept = min(latent_frames(request.overlap, factor), latent_frames(request.frames, factor) // 3)
    if kept < 1:
        raise ValueError(
            f"frames={request.frames} are too short for a transition: give at least {frames_of(3, factor)}"
        )
    beginning, end = frames_of(kept, factor), request.frames - factor * kept
    given = (*range(beginning), *range(end, request.frames))
    files = (Given(0, beginning - 1), Given(end, request.frames - 1))
    return Layout(request.frames, "transition", request.frames, files, given, (beginning, end), _middles(given))


def _extension(request: ResolvedRequest, extensions: int) -> Layout:
    factor = request.frames_per_latent
    kept, window = latent_frames(request.overlap, factor), latent_frames(request.window, factor)
    beginning, new = frames_of(kept, factor), factor * (window - kept)
    total = beginning + extensions * new
    later = tuple(beginning + new * number for number in range(1, extensions))
    files = (Given(0, beginning - 1),)
    return Layout(total, "extend", total, files, tuple(range(beginning)), (beginning,), extensions=later)


def _frames_at(index: int, factor: int) -> range:
    return range(frames_of(index, factor) if index else 0, frames_of(index + 1, factor))


def _joints(indices: Sequence[int], count: int, factor: int) -> tuple[int, ...]:
    """List the first frame after each border between a latent frame that is given and one that is not."""
    is_given = [index in set(indices) for index in range(count)]
    return tuple(_frames_at(index, factor)[0] for index in range(1, count) if is_given[index] != is_given[index - 1])


def _middles(given: Sequence[int]) -> tuple[int, ...]:
    pairs = pairwise(given)
    return tuple((before + after) // 2 for before, after in pairs if after - before > 1)


def request_of(
    layout: Layout,
    fields: Mapping[str, Any],
    folder: str,
    *,
    noise: Sequence[float] | None = None,
    encode: Literal["single", "repeat"] | None = None,
) -> GenerationRequest:
    """Make the request of a layout.

    Args:
        fields: of the request, without task and conditions: model, prompt, seed, width, height, fps, window, steps, ...
        folder: with the files of `Layout.files`.
        noise: noise multipliers, one for all conditions, or one for each picture or each kept latent frame; the last
            repeats. None: the preset's. Joined videos are shown beside what is made, and always kept as they are.
        encode: of pictures after the first frame; None: the model's.
    """
    conditions: list[dict[str, Any]] = []
    pictures = 0
    for entry in layout.files:
        values: dict[str, Any] = {"kind": "image" if entry.is_picture else "video", "file": f"{folder}/{entry.file}"}
        if entry.positions:
            values["positions"] = list(entry.positions)
        if entry.is_picture:
            values["noise"] = None if noise is None else [noise[min(pictures, len(noise) - 1)]]
            values["encode"] = encode
            pictures += 1
        elif layout.task == "generate" and noise is not None:
            values["noise"] = [noise[min(number, len(noise) - 1)] for number in range(len(entry.positions))]
        conditions.append({name: value for name, value in values.items() if value is not None})
    task = {"task": layout.task, "frames": layout.request_frames, "conditions": conditions}
    overlap = {} if layout.task == "generate" else {"overlap": layout.files[0].last + 1}
    return GenerationRequest(**{**fields, **task, **overlap})
