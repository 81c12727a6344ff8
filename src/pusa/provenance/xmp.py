"""Write and read the XMP packet that says how a picture or video was made, in IPTC's words.

IPTC asks for the digital source type in images and videos alike; its Video Metadata Hub 1.7 and Photo Metadata 2025.1
name the AI system and the prompt. The marks of inputs are ingredients, as XMP's media management has them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree
from xml.sax.saxutils import escape

SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
GENERATED, COMPOSITE = "trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"
_NAMESPACES = {
    "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "xmp": "http://ns.adobe.com/xap/1.0/",
    "xmpMM": "http://ns.adobe.com/xap/1.0/mm/",
    "stRef": "http://ns.adobe.com/xap/1.0/sType/ResourceRef#",
    "Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
}
_HASH_NAME = "urn:sha256:"
_MAX_BYTES = 2**20  # of a packet that is parsed
_MAX_TEXT = 200  # characters of a foreign value


@dataclass(frozen=True)
class InputMark:
    """Hold the mark of an input: its digital source type, AI system and version, and the SHA-256 of its file."""

    source_type: str
    system: str = ""
    version: str = ""
    sha256: str = ""


@dataclass(frozen=True)
class Mark:
    """Say that a file was made with AI.

    Attributes:
        source_type: digital source type by its short name, `GENERATED` or `COMPOSITE` in results.
        system: the AI system with its model.
        version: of the AI system.
        tool: the program that wrote the file, with its version.
        prompt: the prompt; empty keeps it out.
        inputs: marks of inputs that had one.
        original_sha256: in a copy of a marked file, the SHA-256 of that file.
    """

    source_type: str
    system: str = ""
    version: str = ""
    tool: str = ""
    prompt: str = ""
    inputs: tuple[InputMark, ...] = ()
    original_sha256: str = ""


def write_packet(mark: Mark) -> bytes:
    """Write a mark as an XMP packet in UTF-8."""
    fields = {
        "xmp:CreatorTool": mark.tool,
        **_iptc_fields(mark),
        "Iptc4xmpExt:AIPromptInformation": mark.prompt,
        "xmpMM:OriginalDocumentID": _hash_name(mark.original_sha256),
    }
    body = "".join(_element(name, value) for name, value in fields.items() if value)
    if mark.inputs:
        items = "".join(f'<rdf:li rdf:parseType="Resource">{_ingredient(i)}</rdf:li>' for i in mark.inputs)
        body += f"<xmpMM:Ingredients><rdf:Bag>{items}</rdf:Bag></xmpMM:Ingredients>"
    names = " ".join(f'xmlns:{prefix}="{address}"' for prefix, address in _NAMESPACES.items())
    packet = (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF {names}><rdf:Description rdf:about="">{body}'
        '</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
    )
    return packet.encode()


def read_packet(packet: bytes) -> Mark | None:
    """Read the mark of a packet of any program; None if it names no digital source type or cannot be read.

    Only what says how the file was made is taken: no names of people, places or files.
    """
    root = _parse(packet)
    if root is None:
        return None
    top = {name: next(_values(root, name), "") for name in ("DigitalSourceType", "AISystemUsed", "AISystemVersionUsed")}
    if not top["DigitalSourceType"].startswith(SOURCE_TYPES):
        return None
    return Mark(
        top["DigitalSourceType"].removeprefix(SOURCE_TYPES),
        top["AISystemUsed"],
        top["AISystemVersionUsed"],
        tool=next(_values(root, "CreatorTool", "xmp"), ""),
        inputs=tuple(_read_ingredients(root)),
        original_sha256=_read_hash(next(_values(root, "OriginalDocumentID", "xmpMM"), "")),
    )


def _iptc_fields(mark: Mark | InputMark) -> dict[str, str]:
    return {
        "Iptc4xmpExt:DigitalSourceType": f"{SOURCE_TYPES}{mark.source_type}" if mark.source_type else "",
        "Iptc4xmpExt:AISystemUsed": mark.system,
        "Iptc4xmpExt:AISystemVersionUsed": mark.version,
    }


def _ingredient(mark: InputMark) -> str:
    fields = {"stRef:documentID": _hash_name(mark.sha256), **_iptc_fields(mark)}
    return "".join(_element(name, value) for name, value in fields.items() if value)


def _hash_name(sha256: str) -> str:
    return f"{_HASH_NAME}{sha256}" if sha256 else ""


def _read_hash(name: str) -> str:
    return name.removeprefix(_HASH_NAME) if name.startswith(_HASH_NAME) else ""


def _element(name: str, value: str) -> str:
    text = "".join(c for c in value if c in "\t\n" or c.isprintable())  # XML holds no control characters
    return f"<{name}>{escape(text)}</{name}>"


def _parse(packet: bytes) -> ElementTree.Element | None:
    if len(packet) > _MAX_BYTES or b"<!" in packet:  # a declaration of entities can expand without end
        return None
    start, end = packet.find(b"<x:xmpmeta"), packet.rfind(b"</x:xmpmeta>")
    text = packet[start : end + len(b"</x:xmpmeta>")] if 0 <= start < end else packet.strip(b"\0 \n")
    try:
        return ElementTree.fromstring(text.decode())  # in another encoding a declaration would not be seen above
    except (ElementTree.ParseError, ValueError):
        return None


def _values(parent: ElementTree.Element, name: str, prefix: str = "Iptc4xmpExt") -> Iterator[str]:
    """Yield the values of a property of the file itself, written as an element or as an attribute."""
    tag = f"{{{_NAMESPACES[prefix]}}}{name}"
    for description in parent.iter(f"{{{_NAMESPACES['rdf']}}}Description"):
        found = description.find(tag)
        values = (description.get(tag), None if found is None else "".join(found.itertext()))
        yield from (clean_text(value) for value in values if value)


def _read_ingredients(root: ElementTree.Element) -> Iterator[InputMark]:
    for bag in root.iter(f"{{{_NAMESPACES['xmpMM']}}}Ingredients"):
        for item in bag.iter(f"{{{_NAMESPACES['rdf']}}}li"):
            values = {child.tag.rpartition("}")[2]: clean_text(child.text or "") for child in item}
            source_type = values.get("DigitalSourceType", "")
            sha256 = _read_hash(values.get("documentID", ""))
            if source_type.startswith(SOURCE_TYPES) or sha256:
                yield InputMark(
                    source_type.removeprefix(SOURCE_TYPES),
                    values.get("AISystemUsed", ""),
                    values.get("AISystemVersionUsed", ""),
                    sha256,
                )


def clean_text(value: Any) -> str:
    """Reduce a foreign value to one line of at most 200 characters; empty for what is no text."""
    return "".join(c if c.isprintable() else " " for c in value.strip())[:_MAX_TEXT] if isinstance(value, str) else ""
