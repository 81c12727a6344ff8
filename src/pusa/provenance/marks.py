"""Read the marks that a file carries already, so that a result made from it can keep and reference them."""

import mmap
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

from pusa import media
from pusa.provenance.xmp import GENERATED, InputMark, Mark, clean_text, read_packet

# The description box of a C2PA manifest store, as JUMBF (ISO/IEC 19566-5) has it in every container.
_MANIFEST_STORE = b"jumd" + b"c2pa\x00\x11\x00\x10\x80\x00\x00\xaa\x00\x38\x9b\x71"


@dataclass(frozen=True)
class FileMarks:
    """Hold the marks of a file.

    Attributes:
        mark: of its XMP packet; where another program has dropped that, of the comment of pusa; None without either.
        has_manifest: True if it carries a C2PA manifest, valid or not.
        is_packet_missing: True if pusa wrote the file and another program has dropped the packet since.
        stored: the JSON object that pusa stored, or an empty one.
    """

    mark: Mark | None
    has_manifest: bool
    is_packet_missing: bool
    stored: dict[str, Any]

    def as_input(self, sha256: str) -> InputMark | None:
        """Return the mark for a result made from this file; None for a file without marks.

        Args:
            sha256: hash of the file, which a copy with the mark of another file does not use.
        """
        if self.mark is None:
            return InputMark("", sha256=sha256) if self.has_manifest else None
        mark = self.mark
        return InputMark(mark.source_type, mark.system, mark.version, mark.original_sha256 or sha256)


def read_marks(source: Path | BinaryIO) -> FileMarks:
    """Read the marks of a picture or a video, a path (of a folder of pictures: the first) or a file at its start.

    Raises:
        MediaError: it is neither picture nor video.
        FileNotFoundError: there is no such file.
    """
    stored = media.read_metadata(source) or {}
    _rewind(source)
    mark = read_packet(media.read_xmp(source))
    _rewind(source)
    is_ours = "pusa" in stored
    is_packet_missing = is_ours and mark is None and "digital_source_type" in stored
    if mark is None and is_ours:
        mark = mark_from_stored(stored)
    return FileMarks(mark, _has_manifest(source), is_packet_missing, stored)


def mark_from_stored(stored: dict[str, Any]) -> Mark:
    """Make the mark of a file of pusa from the JSON object that is stored in it; invalid values are left out."""
    request = stored.get("request")
    model = stored.get("model") or (request.get("model") if isinstance(request, dict) else None)
    version = clean_text(stored.get("pusa")) or "unknown"
    return Mark(
        clean_text(stored.get("digital_source_type")) or GENERATED,
        system_name(clean_text(model) or "unknown"),
        version,
        tool=f"pusa {version}",
        inputs=tuple(_input_marks(stored.get("input_marks"))),
    )


def _input_marks(values: Any) -> Iterator[InputMark]:
    names = [field.name for field in fields(InputMark)]
    for value in values if isinstance(values, list) else ():
        if isinstance(value, dict):
            yield InputMark(**{name: clean_text(value.get(name)) for name in names})


def system_name(model: str) -> str:
    """Name the AI system of a model."""
    return f"pusa ({model})"


def _has_manifest(source: Path | BinaryIO) -> bool:
    if not isinstance(source, Path):
        is_inside = _MANIFEST_STORE in source.read()
        source.seek(0)
        return is_inside
    path = media.first_picture(source) if source.is_dir() else source
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(_MANIFEST_STORE) >= 0


def _rewind(source: Path | BinaryIO) -> None:
    if not isinstance(source, Path):
        source.seek(0)
