"""Translate request bodies (OpenAI's and vLLM-Omni's names) to the fields of a `GenerationRequest`.

Values that `GenerationRequest` validates are passed on unchecked.
"""

import base64
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any
from urllib.parse import unquote_to_bytes

from pusa.defaults import GenerationDefaults
from pusa.numerals import check_noise_multiplier, parse_number, parse_numbers, parse_size
from pusa.request import (
    GenerationRequest,
    default_overlap,
    parse_positions,
    prompt_lines,
)
from pusa.server.errors import ServiceError
from pusa.server.http.json_input import MAX_PLAIN_BYTES, PIECE_BYTES
from pusa.server.http.schemas import (
    CreateVideo,
    EditVideo,
    ExtendVideo,
    FinalVideo,
    GenerationOptions,
    KeyframeInput,
    LoraChoice,
)
from pusa.server.http.validation import RENAMED, invalid_value, refused_value
from pusa.server.transfers.uploads import UploadInfo

EDIT_NOISE = 0.7
"""Noise multiplier for editing a whole video: high enough to change what is seen, low enough to keep where it is."""

_SAME_NAMES = tuple(name for name in GenerationRequest.model_fields if name != "lora")  # see `_parse_loras`
_TO_STANDARD_BASE64 = bytes.maketrans(b"-_", b"+/")
_WHITE_SPACE = b" \t\r\n\f\v"
_DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w-]+=[^;,]*)*)(;base64)?,", re.ASCII)


# ---- translation -----------------------------------------------------------------------------------------------------


def build_request(
    body: CreateVideo | ExtendVideo | EditVideo,
    *,
    defaults: GenerationDefaults,
    with_length: bool = True,
) -> dict[str, Any]:
    """Build the fields of a `GenerationRequest` without its conditions.

    Args:
        body: the client's fields; its own win over those of `extra_params`.
        defaults: the model's, for the frame rate.
        with_length: convert `seconds` to frames. An extension leaves that to `extension_length`.
    """
    fields: dict[str, Any] = {}
    for part in (body.extra_params, body):
        if part is not None:
            fields |= {name: getattr(part, name) for name in part.model_fields_set if getattr(part, name) is not None}
    request = {name: fields[name] for name in _SAME_NAMES if name in fields}
    request |= {ours: fields[theirs] for theirs, ours in RENAMED.items() if theirs in fields}
    if "size" in fields:
        width, height = parse_size(fields["size"])
        request = {"width": width, "height": height, **request}
    if with_length and "seconds" in fields and "frames" not in request:
        fps = float(fields.get("fps") or defaults.fps)
        request["frames"] = max(1, round(parse_seconds(fields["seconds"]) * fps))
    if isinstance(request.get("prompts"), str):
        request["prompts"] = prompt_lines(request["prompts"])
    names, scale = _parse_loras(fields.get("lora"))
    if names:
        request["lora"] = names
    if scale is not None:
        request.setdefault("alpha", scale)
    return request


def parse_seconds(value: str | float) -> float:
    """Parse a length in seconds, which clients send as text or as a number."""
    return parse_number(value, "seconds") if isinstance(value, str) else float(value)


def extension_length(seconds: float, request: Mapping[str, Any], defaults: GenerationDefaults) -> dict[str, int]:
    """Compute `frames` (with the overlap) and `overlap` of an extension that adds so many seconds.

    The overlap is the default of `GenerationRequest`.
    """
    factor = defaults.frames_per_latent
    new = max(factor, round(seconds * float(request.get("fps") or defaults.fps)))
    window = min(new + defaults.overlap, request.get("window") or defaults.num_frames)
    overlap = request.get("overlap") or default_overlap(window, factor, most=defaults.overlap)
    return {"frames": new + overlap, "overlap": overlap}


def _parse_loras(lora: Any) -> tuple[list[str], float | None]:
    if isinstance(lora, LoraChoice):
        return [lora.name], lora.scale
    if isinstance(lora, str):
        return [lora], None
    return list(lora or []), None


def build_conditions(
    body: GenerationOptions,
    keyframes: Sequence[tuple[KeyframeInput, str]],
    references: Mapping[str, UploadInfo],
    task: str | None,
) -> list[dict[str, Any]]:
    """Build the conditions of a `GenerationRequest`.

    Args:
        body: with `cond_positions`, `noise_multipliers` and so on.
        keyframes: each with the name of its upload.
        references: metadata of the uploads of input_reference by name, in order.
        task: the request's task, None for the default.

    Raises:
        ServiceError: 400 if the place of a file is ambiguous or missing.
    """
    options = merge_extra_params(body)
    noise = options.noise_multiplier
    shared: dict[str, Any] = {
        name: value for name, value in (("fit", options.fit), ("encode", options.encode)) if value is not None
    }
    positions, noises = read_positions(options), _parse_multipliers(options.noise_multipliers)
    placed = {name for _, name in keyframes}
    videos = [name for name, info in references.items() if info.kind == "video" and name not in placed]
    if keyframes:
        _check_keyframes(options, references, placed, videos)
        frames = [_keyframe_condition(frame, name, noise, shared) for frame, name in keyframes]
        return frames + [_video_condition(name, options, shared) for name in videos]
    if not references:
        for name in ("cond_positions", "noise_multipliers", "noise_multiplier"):
            if getattr(options, name) is not None:
                message = f"{name} is for pictures or a video: send input_reference or keyframes too"
                raise invalid_value(message, name, "needs_input", field=name)
        return []
    if len(videos) == len(references) and (len(videos) == 1 or task == "transition"):
        return [_video_condition(name, options, shared) for name in videos]
    if videos:
        raise invalid_value(
            f"input_reference has {len(videos)} video(s) among {len(references)} files: send one video, or pictures; "
            "two videos are joined by task=transition",
            "input_reference",
            "mixed_inputs",
            videos=len(videos),
            files=len(references),
        )
    image_positions = _image_positions(positions, len(references))
    noises = noises or [noise]
    if len(noises) not in (1, len(references)):
        raise invalid_value(
            f"noise_multipliers has {len(noises)} numbers for {len(references)} pictures: give 1 or {len(references)}",
            "noise_multipliers",
            "noise_count",
            given=len(noises),
            positions=len(references),
        )
    noises = noises * len(references) if len(noises) == 1 else noises
    return [
        {
            "kind": "image",
            "file": name,
            "positions": [place],
            **shared,
            **({} if multiplier is None else {"noise": [multiplier]}),
        }
        for name, place, multiplier in zip(references, image_positions, noises, strict=True)
    ]


def draft_conditions(body: CreateVideo, names: Sequence[str]) -> list[dict[str, Any]]:
    """Build the condition of the draft of a final, from the name of its upload.

    Raises:
        ServiceError: 400 for a noise multiplier without a draft.
    """
    noise = body.draft_noise_multiplier
    if noise is not None and not names:
        name = "draft_noise_multiplier"
        raise invalid_value(f"{name} is for a draft: send draft_reference too", name, "needs_input", field=name)
    given = {} if noise is None else {"noise": [noise]}
    return [{"kind": "draft", "file": name, "fit": "stretch", **given} for name in names]


def merge_extra_params(body: GenerationOptions) -> GenerationOptions:
    """Fill the options that the body leaves open from its `extra_params`."""
    extra = getattr(body, "extra_params", None)
    if extra is None:
        return body
    added = {name: getattr(extra, name) for name in extra.model_fields_set if getattr(body, name) is None}
    return body.model_copy(update=added)


def _check_keyframes(
    options: GenerationOptions, references: Mapping[str, UploadInfo], placed: Collection[str], videos: Sequence[str]
) -> None:
    if len(videos) > 1:
        message = f"{len(videos)} videos and keyframes are sent: send one video at most"
        raise invalid_value(message, "input_reference", "too_many_videos", given=len(videos), limit=1)
    for name in ("cond_positions", "noise_multipliers"):
        if getattr(options, name) is not None and not videos:
            message = f"{name} and keyframes say the same: send one of them"
            raise invalid_value(message, name, "said_twice", field=name)
    for number, name in enumerate(references):
        if name not in placed and name not in videos:
            message = f'file {number} of input_reference is in no keyframe: add {{"file": {number}, "latent": 0}}'
            raise invalid_value(message, "keyframes", "file_unused", name=str(number + 1))


def _video_condition(name: str, options: GenerationOptions, shared: Mapping[str, Any]) -> dict[str, Any]:
    condition = {"kind": "video", "file": name, **shared}
    if positions := read_positions(options):
        condition["positions"] = positions
    if (multipliers := parse_noise_multipliers(options)) is not None:
        condition["noise"] = multipliers
    return condition


def _keyframe_condition(
    frame: KeyframeInput, name: str, noise: float | None, shared: Mapping[str, Any]
) -> dict[str, Any]:
    multiplier = noise if frame.noise is None else frame.noise
    options = {key: value for key, value in (("fit", frame.fit), ("encode", frame.encode)) if value is not None}
    condition = {"kind": "image", "file": name, **shared, **options}
    if frame.position is not None:
        condition["positions"] = [frame.position]
    if multiplier is not None:
        condition["noise"] = [multiplier]
    return condition


def _image_positions(positions: list[Any], count: int) -> list[Any]:
    if positions:
        if len(positions) != count:
            raise invalid_value(
                f"cond_positions has {len(positions)} places for {count} pictures: give one for each",
                "cond_positions",
                "positions_count",
                given=len(positions),
                pictures=count,
            )
        return positions
    if count > 2:
        raise invalid_value(
            f"input_reference has {count} pictures: say where they go with cond_positions or keyframes",
            "input_reference",
            "positions_missing",
            pictures=count,
        )
    return [0, "last"][:count]


def read_positions(options: GenerationOptions) -> list[str]:
    """Split `cond_positions` into one text for each."""
    positions = options.cond_positions
    if isinstance(positions, str):
        try:
            positions = parse_positions(positions)
        except ValueError as error:
            raise refused_value(error, "cond_positions") from None
    return [str(position) for position in positions or []]


def parse_noise_multipliers(options: GenerationOptions) -> list[float] | None:
    """Parse `noise_multipliers`, or else the single `noise_multiplier`; None if the client gave neither."""
    single = options.noise_multiplier
    return _parse_multipliers(options.noise_multipliers) or (None if single is None else [single])


def _parse_multipliers(value: Any) -> list[Any]:
    if not isinstance(value, str):
        return list(value or [])
    try:
        numbers = parse_numbers(value)
        for number in numbers:
            check_noise_multiplier(number)
    except ValueError:
        message = f"noise_multipliers={value[:60]!r}: give numbers in 0..1 with commas: 0,0.2"
        raise invalid_value(message, "noise_multipliers", "noise_unknown", value=value[:60]) from None
    return numbers


# ---- data URLs -------------------------------------------------------------------------------------------------------


def decode_data_url(url: str, param: str) -> tuple[str, bytes]:
    """Decode a data URL to its content type and bytes.

    Raises:
        ServiceError: 400 for an invalid data URL, 413 for a long one without base64.
    """
    found = _DATA_URL.match(url[:300])
    if found is None:
        message = f"{param} is no data URL: send data:image/png;base64,... or the file itself"
        raise invalid_value(message, param, "not_a_data_url", field=param)
    text = url[found.end() :]
    if found[3]:
        return found[1] or "", decode_base64(text, param)
    if len(text) > MAX_PLAIN_BYTES:  # decoding escapes takes many times their memory
        message = f"{param} has more than {MAX_PLAIN_BYTES / 2**20:g} MiB that are not base64: send data:...;base64,..."
        raise ServiceError(413, "too_large", message, param, values={"limit": MAX_PLAIN_BYTES / 2**20})
    return found[1] or "", unquote_to_bytes(text)


def decode_base64(text: str, param: str) -> bytes:
    """Decode base64 in either alphabet, padded or not, with white space or without. Raises ServiceError (400)."""
    text = text.rstrip(f"={_WHITE_SPACE.decode()}")
    decoded, rest = bytearray(), b""
    try:
        if "=" in text:
            raise ValueError("data follows the padding")
        for start in range(0, len(text), PIECE_BYTES):
            piece = text[start : start + PIECE_BYTES].encode("ascii")
            rest += piece.translate(_TO_STANDARD_BASE64, _WHITE_SPACE)
            whole = len(rest) // 4 * 4
            decoded += base64.b64decode(rest[:whole], validate=True)
            rest = rest[whole:]
        decoded += base64.b64decode(rest + b"=" * (-len(rest) % 4), validate=True)
    except ValueError:
        raise invalid_value(f"{param} is not base64", param, "not_a_data_url", field=param) from None
    return bytes(decoded)


def format_seconds(value: str | float) -> str:
    """Format seconds with at most two decimals: 5, 2.06; text stays as the client wrote it."""
    return value if isinstance(value, str) else f"{float(value):.2f}".rstrip("0").rstrip(".")


def final_options(body: FinalVideo) -> dict[str, Any]:
    """Return `noise`, `size` and `steps` of `pusa.request.final_request`."""
    size = None if body.size is None else parse_size(body.size)
    return {"noise": body.noise_multiplier, "size": size, "steps": body.num_inference_steps}


def check_priority(priority: int | None, has_keys: bool) -> int:
    """Refuse a raised priority from clients with API keys: none may overtake the others."""
    if priority and priority > 0 and has_keys:
        message = f"priority={priority}: with API keys it is 0 or less, to let others go first"
        raise invalid_value(message, "priority", "priority_raised")
    return priority or 0
