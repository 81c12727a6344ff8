"""From what clients send to a `GenerationRequest`: OpenAI's and vLLM-Omni's names, files by index, seconds, sizes.

The values stay unchecked here where `GenerationRequest` checks them; it is the only judge of a request.
"""

import base64
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar, get_args
from urllib.parse import unquote_to_bytes

from pydantic import ValidationError

from pusa.fields import StrictModel, explain, shown
from pusa.numerals import check_noise_multiplier, parse_number, parse_numbers, parse_size
from pusa.request import OVERLAP_FRAMES, ConditionSpec, GenerationRequest, ModelDefaults, parse_positions
from pusa.server.errors import ServiceError
from pusa.server.http.json_input import MAX_PLAIN_BYTES
from pusa.server.http.schemas import (
    CreateVideo,
    EditVideo,
    ExtendVideo,
    Keyframe,
    Knobs,
    LoraChoice,
    RemixVideo,
    UrlReference,
    VideoReference,
)
from pusa.server.uploads import Probed

M = TypeVar("M", bound=StrictModel)

EDIT_NOISE = 0.7
"""Noise multiplier of a whole video that is made again after a prompt: enough to change what is seen, not where."""

_RENAMED = {
    "num_frames": "frames",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "guidance_scale_2": "guidance_2",
    "flow_shift": "shift",
    "lora_alpha": "alpha",
    "lora_alpha_2": "alpha_2",
}
_SAME = ("width", "height", "fps", "seed", "negative_prompt", "preset", "window", "overlap", "task", "prompt", "model")
_FIELDS = {
    name
    for model in (
        *(CreateVideo, EditVideo, ExtendVideo, RemixVideo, Keyframe, UrlReference, VideoReference, LoraChoice),
        *(GenerationRequest, ConditionSpec),
    )
    for name in model.model_fields
}


def _holds_number(annotation: Any) -> bool:
    return annotation in (int, float) or any(map(_holds_number, get_args(annotation)))


_NUMBERS = {
    name
    for model in (Knobs, CreateVideo, Keyframe, LoraChoice)
    for name, field in model.model_fields.items()
    if _holds_number(field.annotation) and name not in ("extra_params", "keyframes", "lora")
}
_BY_REQUEST = {ours: theirs for theirs, ours in _RENAMED.items()}
_STANDARD = bytes.maketrans(b"-_", b"+/")
_DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w-]+=[^;,]*)*)(;base64)?,", re.ASCII)


# ---- checking --------------------------------------------------------------------------------------------------------


def checked(model: type[M], values: Mapping[str, Any], *, is_text: bool) -> M:
    """The fields of a request.

    Args:
        is_text: they come from a form, where numbers are text and a field left empty is one left out.

    Raises:
        ServiceError: 400, about the first field that is wrong.
    """
    if is_text:
        values = {name: value for name, value in values.items() if value != "" or name == "prompt"}
        _check_numbers(values)
    else:
        values = {name: value for name, value in values.items() if value is not None}
    try:
        return model.model_validate(values, strict=not is_text)
    except ValidationError as error:
        raise refusal(error) from None


def _check_numbers(values: Any) -> None:
    """Refuse text of a form that is no number where one belongs: pydantic takes more than `parse_number` does."""
    if isinstance(values, list):
        for value in values:
            _check_numbers(value)
    elif isinstance(values, dict):
        for name, value in values.items():
            texts = value if isinstance(value, list) else [] if name == "noise_multipliers" else [value]
            for text in texts:  # as one text, noise_multipliers are several numbers: `_numbers` reads them
                if isinstance(text, str) and name in _NUMBERS and text not in ("", "last"):
                    _check_number(text, name)
            _check_numbers(value)


def _check_number(text: str, name: str) -> None:
    try:
        parse_number(text, name)
    except ValueError as error:
        raise invalid(str(error), name) from None


def refusal(error: ValidationError) -> ServiceError:
    """What is wrong with the fields of a request, in the client's words."""
    first, *others = error.errors(include_url=False)
    param = str(first["loc"][0])[:100] if first["loc"] else None
    code = {"extra_forbidden": "unknown_parameter", "missing": "missing_parameter"}.get(first["type"], "invalid_value")
    if _is_plain(first):
        told = explain(ValidationError.from_exception_data(error.title, [first]))  # type: ignore[list-item]
    else:
        told = _of_choice([first, *(other for other in others if other["loc"][:1] == first["loc"][:1])])
    return ServiceError(400, code, told, _BY_REQUEST.get(param or "", param))


def _is_plain(error: Any) -> bool:
    """Whether `explain` can find the field: elsewhere several kinds of values are possible, which pydantic names in
    the location."""
    where = error["loc"]
    in_list = where[:1] in (("keyframes",), ("conditions",))
    return len(where) <= 1 or (in_list and all(isinstance(part, int) or part in _FIELDS for part in where))


def _of_choice(errors: Sequence[Any]) -> str:
    """What is wrong with a value that may be of several kinds: the kind that fits best says it."""
    deepest = max(errors, key=lambda error: len(error["loc"]))
    if deepest["type"] == "value_error":
        return str(deepest["ctx"]["error"])
    parts = [part for part in deepest["loc"] if isinstance(part, int) or part in _FIELDS]
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")
    if deepest["type"] == "extra_forbidden":
        unknown = "" if deepest["loc"][-1] in parts else f".{deepest['loc'][-1]}"
        return f"{shown(name + unknown)} is unknown: leave it out"
    return f"{name}={shown(deepest['input'])}: {deepest['msg'][:1].lower()}{deepest['msg'][1:]}"


def invalid(message: str, param: str | None = None) -> ServiceError:
    return ServiceError(400, "invalid_value", message, param)


# ---- translating -----------------------------------------------------------------------------------------------------


def request_of(
    body: CreateVideo | ExtendVideo | EditVideo,
    *,
    defaults: ModelDefaults,
    with_length: bool = True,
) -> dict[str, Any]:
    """The request as JSON without its conditions, to be checked by `GenerationRequest`.

    Args:
        body: the client's fields; those of its `extra_params` count where it says nothing itself.
        defaults: of the model, for the frame rate.
        with_length: its `seconds` are the length of what is made; elsewhere they stay out (see `added_length`).
    """
    said: dict[str, Any] = {}
    for part in (body.extra_params, body):
        if part is not None:
            said |= {name: getattr(part, name) for name in part.model_fields_set if getattr(part, name) is not None}
    request = {name: said[name] for name in _SAME if name in said}
    request |= {ours: said[theirs] for theirs, ours in _RENAMED.items() if theirs in said}
    if "size" in said:
        width, height = parse_size(said["size"])
        request = {"width": width, "height": height, **request}
    if with_length and "seconds" in said and "frames" not in request:
        fps = float(said.get("fps") or defaults.fps)
        request["frames"] = max(1, round(seconds_of(said["seconds"]) * fps))
    names, scale = _loras(said.get("lora"))
    if names:
        request["lora"] = names
    if scale is not None:
        request.setdefault("alpha", scale)
    return request


def seconds_of(said: str | float) -> float:
    """A length that a client gives as text or as a number."""
    return parse_number(said, "seconds") if isinstance(said, str) else float(said)


def added_length(seconds: float, request: Mapping[str, Any], defaults: ModelDefaults) -> dict[str, int]:
    """`frames` and `overlap` of an extension that adds so many seconds: what is taken over comes on top.

    The overlap is what `GenerationRequest` would take by itself.
    """
    new = max(4, round(seconds * float(request.get("fps") or defaults.fps)))
    window = min(new + OVERLAP_FRAMES, request.get("window") or defaults.num_frames)
    overlap = request.get("overlap") or max(1, min(OVERLAP_FRAMES, (window // 2 - 1) // 4 * 4 + 1))
    return {"frames": new + overlap, "overlap": overlap}


def _loras(lora: Any) -> tuple[list[str], float | None]:
    if isinstance(lora, LoraChoice):
        return [lora.name], lora.scale
    if isinstance(lora, str):
        return [lora], None
    return list(lora or []), None


def conditions_of(
    body: Knobs, keyframes: Sequence[tuple[Keyframe, str]], references: Mapping[str, Probed], task: str | None
) -> list[dict[str, Any]]:
    """What is known of the video.

    Args:
        body: with `cond_positions`, `noise_multipliers` and so on.
        keyframes: each with the name of its upload.
        references: the uploads of input_reference by name, in their order.

    Raises:
        ServiceError: 400, where it is not clear what goes where.
    """
    knobs = merged(body)
    noise = knobs.noise_multiplier
    shared: dict[str, Any] = {
        name: value for name, value in (("fit", knobs.fit), ("encode", knobs.encode)) if value is not None
    }
    positions, noises = positions_of(knobs), _numbers(knobs.noise_multipliers)
    placed = {name for _, name in keyframes}
    videos = [name for name, probed in references.items() if probed.kind == "video" and name not in placed]
    if keyframes:
        _check_keyframes(knobs, references, placed, videos)
        frames = [_at(frame, name, noise, shared) for frame, name in keyframes]
        return frames + [_of_video(name, knobs, shared) for name in videos]
    if not references:
        for name in ("cond_positions", "noise_multipliers", "noise_multiplier"):
            if getattr(knobs, name) is not None:
                raise invalid(f"{name} is for pictures or a video: send input_reference or keyframes too", name)
        return []
    if len(videos) == len(references) and (len(videos) == 1 or task == "transition"):
        return [_of_video(name, knobs, shared) for name in videos]
    if videos:
        raise invalid(
            f"input_reference has {len(videos)} video(s) among {len(references)} files: send one video, or pictures; "
            "two videos are joined by task=transition",
            "input_reference",
        )
    places = _places(positions, len(references))
    noises = noises or [noise]
    if len(noises) not in (1, len(references)):
        raise invalid(
            f"noise_multipliers has {len(noises)} numbers for {len(references)} pictures: give 1 or {len(references)}",
            "noise_multipliers",
        )
    noises = noises * len(references) if len(noises) == 1 else noises
    return [
        {"kind": "image", "file": name, "positions": [place], **shared, **({} if level is None else {"noise": [level]})}
        for name, place, level in zip(references, places, noises, strict=True)
    ]


def merged(body: Knobs) -> Knobs:
    """The knobs with those of `extra_params` where the body itself says nothing."""
    extra = getattr(body, "extra_params", None)
    if extra is None:
        return body
    added = {name: getattr(extra, name) for name in extra.model_fields_set if getattr(body, name) is None}
    return body.model_copy(update=added)


def _check_keyframes(
    knobs: Knobs, references: Mapping[str, Probed], placed: Collection[str], videos: Sequence[str]
) -> None:
    if len(videos) > 1:
        raise invalid(f"{len(videos)} videos and keyframes are sent: send one video at most", "input_reference")
    for name in ("cond_positions", "noise_multipliers"):
        if getattr(knobs, name) is not None and not videos:
            raise invalid(f"{name} and keyframes say the same: send one of them", name)
    for number, name in enumerate(references):
        if name not in placed and name not in videos:
            told = f'file {number} of input_reference is in no keyframe: add {{"file": {number}, "latent": 0}}'
            raise invalid(told, "keyframes")


def _of_video(name: str, knobs: Knobs, shared: Mapping[str, Any]) -> dict[str, Any]:
    positions, level = positions_of(knobs), noises_of(knobs)
    own = {"positions": positions} if positions else {}
    return {"kind": "video", "file": name, **shared, **own, **({} if level is None else {"noise": level})}


def _at(frame: Keyframe, name: str, noise: float | None, shared: Mapping[str, Any]) -> dict[str, Any]:
    level = noise if frame.noise is None else frame.noise
    own = {key: value for key, value in (("fit", frame.fit), ("encode", frame.encode)) if value is not None}
    condition = {"kind": "image", "file": name, **shared, **own}
    if frame.position is not None:
        condition["positions"] = [frame.position]
    if level is not None:
        condition["noise"] = [level]
    return condition


def _places(positions: list[Any], count: int) -> list[Any]:
    if positions:
        if len(positions) != count:
            raise invalid(
                f"cond_positions has {len(positions)} places for {count} pictures: give one for each", "cond_positions"
            )
        return positions
    if count > 2:
        raise invalid(
            f"input_reference has {count} pictures: say where they go with cond_positions or keyframes",
            "input_reference",
        )
    return [0, "last"][:count]


def positions_of(knobs: Knobs) -> list[str]:
    """`cond_positions`, each as text."""
    given = knobs.cond_positions
    if isinstance(given, str):
        try:
            given = parse_positions(given)
        except ValueError as error:
            raise invalid(str(error), "cond_positions") from None
    return [str(position) for position in given or []]


def noises_of(knobs: Knobs) -> list[float] | None:
    """`noise_multipliers`, or the one `noise_multiplier`."""
    one = knobs.noise_multiplier
    return _numbers(knobs.noise_multipliers) or (None if one is None else [one])


def _numbers(given: Any) -> list[Any]:
    if not isinstance(given, str):
        return list(given or [])
    try:
        numbers = parse_numbers(given)
        for number in numbers:
            check_noise_multiplier(number)
    except ValueError:
        told = f"noise_multipliers={given[:60]!r}: give numbers in 0..1 with commas: 0,0.2"
        raise invalid(told, "noise_multipliers") from None
    return numbers


# ---- files inside the request ----------------------------------------------------------------------------------------


def data_of(url: str, param: str) -> tuple[str, bytes]:
    """The content type and the bytes of a data URL.

    Raises:
        ServiceError: 400 for what is none.
    """
    found = _DATA_URL.match(url[:300])
    if found is None:
        raise invalid(f"{param} is no data URL: send data:image/png;base64,... or the file itself", param)
    text = url[found.end() :]
    if found[3]:
        return found[1] or "", decoded(text, param)
    if len(text) > MAX_PLAIN_BYTES:  # every escape is a piece of its own while it is read
        told = f"{param} has more than {MAX_PLAIN_BYTES / 2**20:g} MiB that are not base64: send data:...;base64,..."
        raise ServiceError(413, "too_large", told, param)
    return found[1] or "", unquote_to_bytes(text)


def decoded(text: str, param: str) -> bytes:
    """The bytes of base64, in either alphabet, padded or not.

    Raises:
        ServiceError: 400.
    """
    try:
        plain = text.encode("ascii").translate(_STANDARD, b" \t\r\n\f\v").rstrip(b"=")
        return base64.b64decode(plain + b"=" * (-len(plain) % 4), validate=True)
    except ValueError:
        raise invalid(f"{param} is not base64", param) from None


def shown_number(value: float) -> str:
    """Seconds as people write them: 5, 2.06."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
