"""Decide what a result says about itself: its metadata, its XMP packet, its watermark and its signature."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pusa import __version__
from pusa.events import Note, Report
from pusa.generate import inputs
from pusa.generate.inputs import Input
from pusa.media.source import MediaError, one_line
from pusa.provenance.c2pa import Ingredient, content_type_of
from pusa.provenance.marks import FileMarks, mark_from_stored, read_marks
from pusa.provenance.options import NO_WATERMARK, MarkOptions
from pusa.provenance.watermark import (
    Watermarker,
    embed_stream,
    load_watermarker,
    payload_of,
    payload_text,
    watermark_for_replay,
)
from pusa.provenance.xmp import COMPOSITE, GENERATED, InputMark, Mark, write_packet
from pusa.request import Metadata, ResolvedRequest

_RELATIONSHIPS = {"extend": "parentOf", "transition": "componentOf"}


@dataclass(frozen=True)
class ResultMarks:
    """Hold all marks of a result.

    Attributes:
        metadata: JSON object for the file; None stores none.
        for_latents: JSON object for latents that could not be decoded: what `decode` needs to make the same marks.
        xmp: packet for the file, or empty.
        seal: signs a complete file; None does not sign.
        watermark: embedded in every frame; None embeds none.
        inputs: the inputs to make the result from.
    """

    metadata: dict[str, Any] | None
    for_latents: dict[str, Any]
    xmp: bytes
    seal: Callable[[Path], None] | None
    watermark: Watermarker | None
    payload: np.ndarray
    inputs: list[Input]

    def with_weights(self, weights: Mapping[str, Any]) -> "ResultMarks":
        """Add hashes of the weights that the result is made with, to the file only beside a request."""
        metadata = (
            {**self.metadata, "weights": weights} if self.metadata and "request" in self.metadata else self.metadata
        )
        return replace(self, metadata=metadata, for_latents={**self.for_latents, "weights": weights})

    def embed(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Embed the watermark, if there is one, in frames uint8 ``[n, H, W, 3]`` as they come."""
        if self.watermark is None:
            yield from frames
        else:
            yield from embed_stream(frames, self.watermark, self.payload)


def mark_result(
    request: ResolvedRequest, sources: Sequence[Input], options: MarkOptions, report: Report
) -> ResultMarks:
    """Prepare the marks of a request's result; report the marks of inputs that it will not carry on.

    Raises:
        MediaError: an input cannot be read.
        ValueError, FileNotFoundError, RuntimeError: a watermark or a signature that is asked for is not possible.
    """
    found = {entry.sha256: _marks_of(entry) for entry in sources}
    _report_lost(request, sources, found, options, report)
    input_marks = {sha: mark for sha, marks in found.items() if (mark := marks.as_input(sha)) is not None}
    copies = {sha: _mark_of_copy(mark) for sha, mark in input_marks.items() if mark.source_type}
    used: Sequence[Input] = sources
    if request.metadata == "full":
        carried = inputs.carry(sources, request, copies)
        request_inside, contents, used = carried.request, carried.contents, carried.inputs
    else:
        request_inside, contents = inputs.without_folders(request), {}
    stored: dict[str, Any] = {
        "pusa": __version__,
        "digital_source_type": _source_type(request, sources, found),
        "request": request_inside.model_dump(mode="json"),
        "inputs": contents,
    }
    if input_marks:
        stored["input_marks"] = [asdict(mark) for mark in input_marks.values()]
    ingredients = [] if request.metadata == "off" else _ingredients(request, request_inside, sources, found)
    marks = _marks_from(stored, request.metadata, options, ingredients, used)
    least = getattr(marks.watermark, "min_pixels", 0)
    if marks.watermark is not None and min(request.width, request.height) < least:
        name, size = marks.watermark.name, f"{request.width}x{request.height}"
        message = f"the watermark {name} is made for {least} pixels and more: at {size} it may not be found again"
        report(Note(message, code="watermark_small", values={"name": name, "least": least, "size": size}))
    return marks


def mark_decoded(stored: Mapping[str, Any], metadata: Metadata, options: MarkOptions) -> ResultMarks:
    """Prepare the marks of a result whose latents were saved, from `ResultMarks.for_latents`; raise as above.

    Args:
        metadata: how much the file tells.
    """
    options = replace(options, watermark=watermark_for_replay(stored, options.watermark))
    rest = {name: value for name, value in stored.items() if name != "watermark"}  # that one was not embedded
    return _marks_from({**rest, "request": {**stored["request"], "metadata": metadata}}, metadata, options, [], [])


def _marks_from(
    stored: dict[str, Any],
    metadata: Metadata,
    options: MarkOptions,
    ingredients: Sequence[Ingredient],
    sources: Sequence[Input],
) -> ResultMarks:
    watermark, payload = None, np.zeros(0, np.uint8)
    if options.watermark is not None and options.watermark != NO_WATERMARK:
        watermark = load_watermarker(options.watermark)
        payload = payload_of(json.dumps(stored["request"], sort_keys=True), watermark.bits)
        stored = {**stored, "watermark": {"name": watermark.name, "payload": payload_text(payload)}}
    mark = mark_from_stored(stored)
    full = {**stored, "inputs": stored.get("inputs", {})}
    minimal = {name: value for name, value in stored.items() if name not in ("request", "inputs")}
    minimal["model"] = stored["request"]["model"]
    in_file = {"full": full, "minimal": minimal, "off": None}[metadata]
    prompt = stored["request"]["prompt"] if metadata == "full" else ""
    signer = options.signer()
    seal = None
    if signer is not None:

        def seal(path: Path) -> None:
            signer.sign(path, source_type=mark.source_type, system=mark.system, ingredients=ingredients)

    return ResultMarks(
        metadata=in_file,
        for_latents=full if metadata == "full" else {**full, "inputs": {}},
        xmp=b"" if metadata == "off" else write_packet(replace(mark, prompt=prompt)),
        seal=seal,
        watermark=watermark,
        payload=payload,
        inputs=list(sources),
    )


def _marks_of(entry: Input) -> FileMarks:
    """Read the marks of an input; none of a damaged one, whose reading reports what is wrong with it."""
    try:
        return read_marks(entry.source)
    except MediaError:
        return FileMarks(None, has_manifest=False, is_packet_missing=False, stored={})


def _mark_of_copy(mark: InputMark) -> Mark:
    return Mark(mark.source_type, mark.system, mark.version, original_sha256=mark.sha256)


def _source_type(request: ResolvedRequest, sources: Sequence[Input], found: Mapping[str, FileMarks]) -> str:
    """Return the digital source type: a composite if a frame of an input that is not all AI's is shown as it is."""
    for entry in sources:
        is_shown = request.task in _RELATIONSHIPS or 0 in (entry.condition.noise or ())
        mark = found[entry.sha256].mark
        if is_shown and (mark is None or mark.source_type != GENERATED):
            return COMPOSITE
    return GENERATED


def _report_lost(
    request: ResolvedRequest,
    sources: Sequence[Input],
    found: Mapping[str, FileMarks],
    options: MarkOptions,
    report: Report,
) -> None:
    for entry in sources:
        marks, name = found[entry.sha256], one_line(Path(entry.condition.file).name, longest=60)
        if request.metadata == "off" and (marks.mark or marks.has_manifest):
            message = f"{name} carries marks of how it was made: with metadata=off the video does not name them"
            report(Note(message, code="marks_not_named", values={"name": name}))
        elif marks.has_manifest and options.sign_cert is None:
            message = (
                f"{name} carries content credentials (C2PA): the video names it, and keeps them only if it is signed"
            )
            report(Note(message, code="credentials_not_kept", values={"name": name}))


def _ingredients(
    request: ResolvedRequest,
    request_inside: ResolvedRequest,
    sources: Sequence[Input],
    found: Mapping[str, FileMarks],
) -> list[Ingredient]:
    is_full = request.metadata == "full"
    ingredients = []
    for number, (entry, spec) in enumerate(zip(sources, request_inside.conditions, strict=True), start=1):
        try:
            content_type = content_type_of(entry.source)
        except ValueError:  # such as Matroska: named by its title and hash alone
            content_type = "application/octet-stream"
        signed = entry.content if found[entry.sha256].has_manifest and isinstance(entry.content, Path) else None
        name, sha256 = (spec.file, spec.sha256 or "") if is_full else (f"{spec.kind} {number}", "")
        relationship = _RELATIONSHIPS.get(request.task, "inputTo")
        ingredients.append(Ingredient(name, relationship, content_type, sha256, signed=signed))
    return ingredients
