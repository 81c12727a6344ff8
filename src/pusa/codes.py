"""Name errors and notes by stable codes with values, from which a page writes them in its visitor's language.

The message in English says the same, for logs, programs and people on the command line. A code stays what it is once it
is published; `ERRORS` and `NOTES` list them with the names of their values. Imports nothing of pusa.
"""

import math
from collections.abc import Mapping
from typing import Any, Self

_LONGEST_NUMBER = 64  # bits


class CodedError(ValueError):
    """A mistake in a request.

    Args:
        code: one of `ERRORS`.
        message: for people, in English.
        values: those of the code's text, plain JSON.
    """

    def __init__(self, code: str, message: str, **values: Any) -> None:
        super().__init__(message)
        self.code, self.values = code, values

    def __reduce__(self) -> Any:
        return _coded_error, (type(self), self.code, str(self), self.values)


def _coded_error(kind: type[CodedError], code: str, message: str, values: Mapping[str, Any]) -> CodedError:
    return kind(code=code, message=message, **values)


class CodedText(str):
    """A note in English, with its code (one of `NOTES`) and the values of its text."""

    code: str
    values: dict[str, Any]

    def __new__(cls, code: str, message: str, **values: Any) -> Self:
        text = super().__new__(cls, message)
        text.code, text.values = code, values
        return text

    def __getnewargs_ex__(self) -> tuple[tuple[str, str], dict[str, Any]]:
        return (self.code, str(self)), self.values


def code_of(error: object, default: str = "") -> str:
    """Return the code of a `CodedError` or a `CodedText`; of anything else the default."""
    return str(getattr(error, "code", "") or default) if isinstance(error, CodedError | CodedText) else default


def plain(value: Any) -> Any:
    """Return a value as JSON that every program and database takes: whole characters, numbers of usual size."""
    if isinstance(value, str):
        return value.replace("\0", "").encode(errors="replace").decode()
    if isinstance(value, Mapping):
        return {str(plain(str(name))): plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, int) and value.bit_length() > _LONGEST_NUMBER:
        return f"a number of {value.bit_length()} bits"
    return value


def detail_of(note: str) -> dict[str, Any]:
    """Return a note as plain JSON: its code ("" if it has none), values and message."""
    return {"code": code_of(note), "values": plain(values_of(note)), "message": str(note)}


def values_of(error: object) -> dict[str, Any]:
    """Return the values of a `CodedError` or a `CodedText`; none of anything else."""
    return dict(error.values) if isinstance(error, CodedError | CodedText) else {}


ERRORS: Mapping[str, tuple[str, ...]] = {
    "internal_error": (),
    "invalid_value": (),
    "invalid_body": (),
    "unknown_parameter": ("field",),
    "missing_parameter": ("field",),
    "too_large": ("limit",),
    "too_many_files": ("limit",),
    "unsupported_media_type": (),
    "request_timeout": (),
    "range_not_satisfiable": (),
    "busy": (),
    "stopping": (),
    "unavailable": (),
    "queue_unavailable": (),
    "storage_unavailable": (),
    "too_many_connections": (),
    "too_many_streams": ("limit",),
    "too_many_wrong_keys": (),
    "disk_full": (),
    "files_full": ("used", "size", "limit"),
    "queue_full": ("limit", "seconds", "scope"),
    "idempotency_key_reused": (),
    "invalid_api_key": (),
    "forbidden": (),
    "unknown_host": (),
    "unknown_origin": (),
    "not_found": (),
    "method_not_allowed": (),
    "conflict": (),
    "not_supported": (),
    "video_not_found": (),
    "file_not_found": (),
    "file_gone": (),
    "file_damaged": (),
    "no_result": ("status",),
    "not_ready": ("status",),
    "not_failed": ("status",),
    "not_waiting": ("status",),
    "not_a_wave": (),
    "not_running": (),
    "no_request": (),
    "model_not_found": ("name", "offered"),
    "lora_not_found": ("name", "offered", "count"),
    "does_not_fit": ("problem", "lacks", "needs", "has", "way", "size", "frames"),
    "model_not_loaded": ("reason",),
    "model_too_large": ("reason",),
    "model_files_missing": ("reason",),
    "invalid_file": ("name",),
    "file_empty": ("name",),
    "file_too_large": ("name", "mebibytes", "limit"),
    "format_not_read": ("name", "format"),
    "file_unreadable": ("name", "format"),
    "file_cut_short": ("name",),
    "file_breaks_reader": ("name",),
    "picture_too_large": ("name", "width", "height", "megapixels", "limit"),
    "picture_far_too_large": ("name", "limit"),
    "not_a_picture": ("name", "format"),
    "not_a_video": ("name", "format"),
    "frame_size_changes": ("name",),
    "decoding_too_slow": ("name", "limit"),
    "video_too_long": ("name", "seconds", "limit"),
    "video_too_many_frames": ("name", "frames", "limit"),
    "no_frames": ("name",),
    "codec_not_read": ("name", "codec"),
    "part_of_picture": (),
    "frame_outside": ("frame", "frames"),
    "part_outside": ("seconds",),
    "part_too_large": ("name", "limit"),
    "part_too_small": ("width", "height", "least"),
    "not_a_data_url": ("field",),
    "url_not_fetched": (),
    "wrong_kind": ("name", "kind"),
    "file_missing": ("name",),
    "file_unused": ("name",),
    "below_minimum": ("field", "value", "minimum"),
    "above_maximum": ("field", "value", "maximum"),
    "not_a_choice": ("field", "value", "choices"),
    "not_a_whole_number": ("field", "value"),
    "not_a_number": ("field", "value"),
    "too_long": ("field", "given", "limit"),
    "empty_value": ("field",),
    "invalid_text": ("value",),
    "list_too_long": ("given", "limit"),
    "size_unknown": ("field", "value"),
    "priority_raised": (),
    "too_many_pixels": ("size", "given", "limit"),
    "too_many_frames": ("size", "given", "limit"),
    "too_many_steps": ("size", "given", "limit"),
    "mark_required": (),
    "metadata_limited": ("asked", "allowed"),
    "prompt_missing": (),
    "prompt_not_empty": ("field", "value"),
    "class_unknown": ("field", "value", "last"),
    "prompts_empty": ("number",),
    "prompts_time_missing": ("number",),
    "prompts_first_time": ("start",),
    "prompts_time_units": ("before", "after"),
    "prompts_time_order": ("before", "after"),
    "prompts_too_many": ("given", "frames", "window", "windows"),
    "prompt_in_no_window": ("start", "window", "windows"),
    "position_unknown": ("value",),
    "position_twice": ("position",),
    "position_taken": ("first", "second", "latent"),
    "position_outside": ("value", "unit", "count", "last"),
    "position_in_bridge": ("latent", "last"),
    "positions_count": ("given", "pictures"),
    "positions_missing": ("pictures",),
    "picture_positions": ("given",),
    "noise_count": ("given", "positions"),
    "noise_outside": ("value",),
    "noise_unknown": ("value",),
    "overlap_noise_count": ("given", "overlap", "needed"),
    "needs_input": ("field",),
    "said_twice": ("field",),
    "mixed_inputs": ("videos", "files"),
    "too_many_videos": ("given", "limit"),
    "source_too_short": ("latent", "frames", "latents"),
    "source_too_long": ("latents", "start", "count"),
    "task_videos": ("task", "needed", "given"),
    "task_no_images": ("task",),
    "task_no_positions": ("task",),
    "transition_too_long": ("frames", "window"),
    "overlap_too_large": ("overlap", "window", "most"),
    "video_too_short": ("name", "frames", "fps", "needed"),
    "window_too_long": ("window", "longest"),
    "no_shift": (),
    "no_guidance": (),
    "guidance_range": ("start", "stop"),
    "no_fast_mode": ("model",),
    "no_wave_for_experts": ("model",),
    "schedule_unknown": ("value",),
    "wave_no_final": (),
    "wave_no_guidance_range": (),
    "wave_too_quick": ("schedule", "steps", "window", "overlap", "least"),
    "not_a_draft": (),
    "draft_positions": (),
    "drafts_too_many": ("given",),
    "draft_beside_final": (),
    "task_no_draft": ("task",),
    "final_too_large": ("width", "height", "limit"),
    "cancelled": (),
    "invalid_request": (),
    "input_gone": (),
    "input_damaged": (),
    "out_of_memory": (),
    "worker_lost": (),
    "stalled": (),
    "timed_out": ("seconds",),
    "storage_error": (),
    "film_too_short": ("given",),
    "film_too_long": ("seconds", "limit"),
    "enhancer_off": (),
    "enhancer_failed": (),
    "enhancer_busy": (),
}
"""Codes of errors, of requests and of jobs that failed, with the names of their values."""


NOTES: Mapping[str, tuple[str, ...]] = {
    "side_rounded": ("field", "before", "after", "multiple"),
    "length_rounded": ("field", "before", "after", "multiple"),
    "prompt_only_names": (),
    "unknown_words": ("model", "count", "words", "nearest", "unknown"),
    "prompt_cut": ("which", "number", "tokens", "limit", "lost"),
    "weights_missing": ("model", "used"),
    "alpha_unused": ("alpha",),
    "second_expert_unused": (),
    "computes_all": ("reason",),
    "checkpoint_lost": ("step",),
    "checkpoint_unused": (),
    "made_again": (),
    "model_reloaded": (),
    "smaller_plan": (),
    "not_compiled": ("reason",),
    "no_previews": (),
    "not_growing": ("reason",),
    "lora_used": ("name", "strength", "expert", "left"),
    "fast_lora_used": ("name", "strength", "expert", "left"),
    "fast_lora_replaced": (),
    "no_pusa_lora": (),
    "conditions_not_followed": (),
    "model_recognised": ("name", "family"),
    "pusa_lora_missing": ("name", "family"),
    "input_transparent": ("name",),
    "input_profile_damaged": ("name",),
    "input_colors_converted": ("name", "profile"),
    "input_hdr": ("name", "transfer"),
    "input_deinterlaced": ("name",),
    "input_sound": ("name",),
    "watermark_small": ("name", "least", "size"),
    "marks_not_named": ("name",),
    "credentials_not_kept": ("name",),
}
"""Codes of the notes of a run, with the names of their values."""
