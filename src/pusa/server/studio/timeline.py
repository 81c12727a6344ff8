"""Show a clip's latent frames as cells, with the conditions and noise multipliers that hold them.

`timeline_value` makes the timeline's value from the page's fields, `field_texts` makes the fields' texts from a value
that a visitor has edited. ``assets/timeline.js`` draws it and handles pointers and keys.
"""

from collections.abc import Sequence
from typing import Any, Literal
from urllib.parse import quote

import gradio as gr

from pusa.defaults import GenerationDefaults
from pusa.numerals import MAX_VALUES, is_noise_multiplier
from pusa.positions import nearest_of
from pusa.request import ConditionSpec, Position, placeholder_request, preset_noise
from pusa.server.studio.forms import (
    Form,
    FormDefaults,
    FormError,
    check_noise_count,
    format_list,
    read_noise,
    read_positions,
)

Clip = tuple[int, float, int]
"""Frames of a clip, frames per second, and frames of a latent frame after the first."""


def timeline(value: dict[str, Any]) -> gr.HTML:
    """Make the page's timeline; its value is one of `timeline_value`.

    It raises ``edit`` after a visitor has changed it, and ``refresh`` after fields have changed: the handler answers
    with a new value, and the number ``asked`` of the old one.

    A subclass would be clearer, but Gradio writes a stub file beside every subclass of its components.
    """
    return gr.HTML(
        value,
        html_template='<div class="pusa-timeline"></div>',
        js_on_load="pusa.timeline(element, props, watch, trigger, ['edit', 'refresh'])",
        apply_default_css=False,
        elem_id="timeline",
        elem_classes="pusa-own",
    )


def timeline_value(form: Form, defaults: FormDefaults) -> dict[str, Any]:
    """Make the timeline's value from the page's fields.

    Returns:
        ``count`` cells of a clip of ``frames`` frames at ``fps``, of which each cell after the first holds
        ``frames_per_latent``; ``marks`` in the order of the text fields, each with
        ``cell``, ``noise`` and ``place`` as the visitor wrote it, and with ``src`` of its image or a ``role``;
        ``video`` and ``second_video``, the addresses of the videos whose frames the cells show; ``bridge``, the cells
        of a loop that lead back to its beginning; ``mode``, the edits that are possible; ``error``, the mistake in the
        fields as `FormError.as_json` or None.
    """
    factor = defaults.generation.frames_per_latent
    frames = nearest_of(int(form.frames or defaults.generation.num_frames), factor, 1)
    fps = float(form.fps or defaults.generation.fps)
    value: dict[str, Any] = {
        "mode": "none",
        "frames": frames,
        "fps": fps,
        "frames_per_latent": factor,
        "count": defaults.latents_of(frames),
        "marks": [],
        "video": None,
        "error": None,
    }
    try:
        value |= _content(form, defaults, frames, fps)
    except FormError as error:
        value["mode"] = form.tab
        value["error"] = error.as_json()
    return value


def is_value(value: dict[str, Any]) -> bool:
    """Tell whether a page's timeline has all that `field_texts` reads."""
    marks = value.get("marks")
    is_list = isinstance(marks, list) and len(marks) <= MAX_VALUES
    number = value.get("asked")
    is_number = number is None or (type(number) is int and 0 <= number < 2**53)
    return isinstance(value.get("mode"), str) and is_number and is_list and all(map(_is_mark, marks or []))


def _is_mark(mark: Any) -> bool:
    if not isinstance(mark, dict) or not isinstance(mark.get("place", ""), str | None):
        return False
    cell, noise = mark.get("cell"), mark.get("noise")
    if type(cell) is not int or not isinstance(noise, int | float) or isinstance(noise, bool):
        return False
    return 0 <= cell < 100_000 and is_noise_multiplier(noise) and len(mark.get("place") or "") <= 40


def field_texts(value: dict[str, Any]) -> tuple[str, str]:
    """Write positions and noise multipliers of an edited timeline as texts of the fields.

    A mark that the visitor has not moved keeps its text (``last``).
    """
    marks = value["marks"] if value["mode"] == "images" else sorted(value["marks"], key=lambda mark: mark["cell"])
    places = [str(mark.get("place") or int(mark["cell"])) for mark in marks]
    return format_list(places), format_list([float(mark["noise"]) for mark in marks])


def address(path: str | None) -> str | None:
    """Return the address of a file that the browser has sent to Gradio."""
    return f"gradio_api/file={quote(path)}" if path else None


def _content(form: Form, defaults: FormDefaults, frames: int, fps: float) -> dict[str, Any]:
    clip = frames, fps, defaults.generation.frames_per_latent
    match form.tab, form.mode:
        case "image", _:
            mark = {"cell": 0, "place": "0", "noise": float(form.noise), "src": address(form.image)}
            return {"mode": "image", "marks": [mark]}
        case "images", _:
            marks = _marks(form, "image", clip, defaults.generation)
            for mark, image in zip(marks, form.images, strict=False):
                mark["src"] = address(image)
            return {"mode": "images", "marks": marks}
        case "video", "complete":
            return {
                "mode": "video",
                "marks": _marks(form, "video", clip, defaults.generation),
                "video": address(form.video),
            }
        case "video", "loop":
            return _loop(form, defaults, frames)
        case "video", _:
            return _continuation(form, defaults, frames)
    return {}


def _marks(
    form: Form, kind: Literal["image", "video"], clip: Clip, defaults: GenerationDefaults
) -> list[dict[str, Any]]:
    is_image = kind == "image"
    positions = read_positions(form.positions if is_image else form.video_positions)
    noise = read_noise(form.multipliers if is_image else form.video_multipliers)
    noise = noise or preset_noise(form.preset, kind, len(positions), defaults)
    check_noise_count(noise, len(positions))
    per_position = noise if len(noise) == len(positions) else noise * len(positions)
    marks = [
        {"cell": _cell(position, clip), "place": str(position), "noise": value}
        for position, value in zip(positions, per_position, strict=True)
    ]
    cells = [mark["cell"] for mark in marks]
    twice = next((cell for cell in cells if cells.count(cell) > 1), None)
    if twice is not None:
        raise FormError(text=f"two conditions hold latent frame {twice}: move one of them")
    return marks


def _cell(place: Position, clip: Clip) -> int:
    try:
        return place.latent_index(*clip)
    except ValueError as error:
        raise FormError(text=str(error)) from None


def overlap_of(form: Form, defaults: FormDefaults) -> int:
    """Return the frames that a continuation takes over, as the request resolves them. Raises FormError."""
    videos = {"extend": 1, "transition": 2}.get(form.task, 0)
    try:
        request = placeholder_request(
            defaults.generation,
            task=form.task,
            conditions=[ConditionSpec(kind="video", file="video")] * videos,
            frames=int(form.frames or 0) or None,
            overlap=int(form.overlap or 0) or None,
        )
        return request.resolved(defaults.generation).overlap
    except ValueError as error:
        raise FormError(text=str(error)) from None


def _continuation(form: Form, defaults: FormDefaults, frames: int) -> dict[str, Any]:
    kept, count = defaults.latents_of(overlap_of(form, defaults)), defaults.latents_of(frames)
    marks = _fixed(range(kept), "video_end")
    if form.mode == "transition":
        marks += _fixed(range(count - kept, count), "video_start")
    return {
        "mode": "fixed",
        "marks": marks,
        "video": address(form.video),
        "second_video": address(form.second_video),
    }


def _loop(form: Form, defaults: FormDefaults, frames: int) -> dict[str, Any]:
    kept, count = defaults.latents_of(overlap_of(form, defaults)), defaults.latents_of(frames)
    marks: list[dict[str, Any]] = []
    if form.loop_image:
        marks = [{"cell": 0, "noise": float(form.noise), "src": address(form.loop_image), "role": "picture"}]
    window = defaults.latents_of(min(frames, defaults.generation.num_frames))
    bridge = range(count - (window - 2 * kept), count)
    return {"mode": "fixed", "marks": marks, "bridge": [bridge.start, bridge.stop]}


def _fixed(cells: Sequence[int], role: str) -> list[dict[str, Any]]:
    return [{"cell": cell, "noise": 0.0, "role": role} for cell in cells]
