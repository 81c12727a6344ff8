"""The timeline: a clip's latent frames as cells that show what is fixed where, and how noisy it may be.

`shown` makes its value from the page's fields, `edited` turns what was done on it back into the fields' texts. The
drawing, and all that hands do to it, is in ``assets/timeline.js``.
"""

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import gradio as gr

from pusa.positions import latent_frames, nearest_of
from pusa.request import GenerationRequest, Position
from pusa.server.studio.forms import (
    MAX_PLACES,
    Form,
    FormDefaults,
    FormError,
    joined,
    parse_multipliers,
    parse_positions,
)


def timeline(value: dict[str, Any]) -> gr.HTML:
    """The part of the page. Its value is as `shown` makes it.

    The event ``edit`` says that a person has changed it, ``refresh`` that fields have changed: the answer to that is
    a value with the number ``asked`` that the old one has.

    A subclass would name it better, but Gradio writes a stub file beside every subclass of its components.
    """
    return gr.HTML(
        value,
        html_template='<div class="pusa-timeline"></div>',
        js_on_load="pusa.timeline(element, props, watch, trigger, ['edit', 'refresh'])",
        apply_default_css=False,
        elem_id="timeline",
        elem_classes="pusa-own",
    )


def shown(form: Form, defaults: FormDefaults) -> dict[str, Any]:
    """The timeline's value.

    Returns:
        ``count`` cells of a clip of ``frames`` frames at ``fps``; ``marks`` in the order of the text fields, each with
        ``cell``, ``noise`` and ``place`` as it was written, and with ``src`` of its picture or a ``role``; ``video``
        and ``second_video`` the addresses of the videos whose frames the cells show; ``bridge`` the cells of a loop
        that lead back to its beginning; ``mode`` says what hands may do; ``error`` what is not understood.
    """
    frames = nearest_of(int(form.frames or defaults.known.num_frames), 4, 1)
    fps = float(form.fps or defaults.known.fps)
    value: dict[str, Any] = {
        "mode": "none",
        "frames": frames,
        "fps": fps,
        "count": latent_frames(frames),
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
    """Tell whether a page's timeline has all that `edited` reads."""
    marks = value.get("marks")
    is_list = isinstance(marks, list) and len(marks) <= MAX_PLACES
    asked = value.get("asked")
    is_asked = asked is None or (type(asked) is int and 0 <= asked < 2**53)
    return isinstance(value.get("mode"), str) and is_asked and is_list and all(map(_is_mark, marks or []))


def _is_mark(mark: Any) -> bool:
    if not isinstance(mark, dict) or not isinstance(mark.get("place", ""), str | None):
        return False
    cell, noise = mark.get("cell"), mark.get("noise")
    if type(cell) is not int or not isinstance(noise, int | float) or isinstance(noise, bool):
        return False
    return 0 <= cell < 100_000 and 0 <= noise <= 1 and len(mark.get("place") or "") <= 40


def edited(value: dict[str, Any]) -> tuple[str, str]:
    """Positions and noise multipliers as texts. A place that was not moved stays as it was written (``last``)."""
    marks = value["marks"] if value["mode"] == "images" else sorted(value["marks"], key=lambda mark: mark["cell"])
    places = [str(mark.get("place") or int(mark["cell"])) for mark in marks]
    return joined(places), joined([float(mark["noise"]) for mark in marks])


def address(path: str | None) -> str | None:
    """Where the browser finds a file that it has sent to Gradio."""
    return f"gradio_api/file={quote(path)}" if path else None


def _content(form: Form, defaults: FormDefaults, frames: int, fps: float) -> dict[str, Any]:
    match form.tab, form.mode:
        case "image", _:
            mark = {"cell": 0, "place": "0", "noise": float(form.noise), "src": address(form.image)}
            return {"mode": "image", "marks": [mark]}
        case "images", _:
            marks = _marks(form.positions, form.multipliers, frames, fps)
            for mark, image in zip(marks, form.images, strict=False):
                mark["src"] = address(image)
            return {"mode": "images", "marks": marks}
        case "video", "complete":
            marks = _marks(form.video_positions, form.video_multipliers, frames, fps)
            return {"mode": "video", "marks": marks, "video": address(form.video)}
        case "video", "loop":
            return _loop(form, defaults, frames)
        case "video", _:
            return _joined(form, defaults, frames)
    return {}


def _marks(positions: str, multipliers: str, frames: int, fps: float) -> list[dict[str, Any]]:
    places, noise = parse_positions(positions), parse_multipliers(multipliers)
    if len(noise) > 1 and len(noise) != len(places):
        raise FormError("error.multiplier_count", multipliers=len(noise), positions=len(places))
    marks: list[dict[str, Any]] = []
    for number, place in enumerate(places):
        level = noise[number] if len(noise) > 1 else noise[0] if noise else 0.2
        marks.append({"cell": _cell(place, frames, fps), "place": str(place), "noise": level})
    cells = [mark["cell"] for mark in marks]
    twice = next((cell for cell in cells if cells.count(cell) > 1), None)
    if twice is not None:
        raise FormError(text=f"two conditions hold latent frame {twice}: move one of them")
    return marks


def _cell(place: Position, frames: int, fps: float) -> int:
    try:
        return place.latent_index(frames, fps)
    except ValueError as error:
        raise FormError(text=str(error)) from None


def overlap_of(form: Form, defaults: FormDefaults) -> int:
    """Frames that a continuation takes over, as the request would resolve them. Raises FormError."""
    video = {"kind": "video", "file": "video"}
    given = {"extend": [video], "transition": [video, video], "loop": []}[form.mode]
    values: dict[str, Any] = {"frames": form.frames and int(form.frames), "overlap": form.overlap and int(form.overlap)}
    try:
        request = GenerationRequest.model_validate(
            {"task": form.mode, "prompt": "-", "conditions": given, **{k: v for k, v in values.items() if v}}
        )
        return request.resolved(defaults.known).overlap
    except ValueError as error:
        raise FormError(text=str(error)) from None


def _joined(form: Form, defaults: FormDefaults, frames: int) -> dict[str, Any]:
    kept, count = latent_frames(overlap_of(form, defaults)), latent_frames(frames)
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
    kept, count = latent_frames(overlap_of(form, defaults)), latent_frames(frames)
    marks: list[dict[str, Any]] = []
    if form.loop_image:
        marks = [{"cell": 0, "noise": float(form.noise), "src": address(form.loop_image), "role": "picture"}]
    window = latent_frames(min(frames, defaults.known.num_frames))
    bridge = range(count - (window - 2 * kept), count)
    return {"mode": "fixed", "marks": marks, "bridge": [bridge.start, bridge.stop]}


def _fixed(cells: Sequence[int], role: str) -> list[dict[str, Any]]:
    return [{"cell": cell, "noise": 0.0, "role": role} for cell in cells]
