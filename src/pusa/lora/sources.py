"""Read what a person writes for a LoRA: its files, their strengths, and the experts of Wan2.2 that they are for.

A source is ``FILE``, ``FILE@STRENGTH``, ``high=FILE``, ``low=FILE`` or ``high=FILE,low=FILE``, each with a strength of
its own if wanted; FILE is a file, a folder or a Hub id. A file whose name really holds @ or = is found first. Without
``high=`` and ``low=`` the words of a name tell the expert. This module needs no torch.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXPERTS = ("transformer", "transformer_2")
NOISE_OF = {"transformer": "high", "transformer_2": "low"}
_EXPERT_OF = {noise: expert for expert, noise in NOISE_OF.items()}

_KEY = re.compile(r"\s*(high|low)(?:[_-]?noise)?\s*=\s*", re.IGNORECASE)
_NEXT_KEY = re.compile(r",(?=\s*(?:high|low)(?:[_-]?noise)?\s*=)", re.IGNORECASE)
_STRENGTH = re.compile(r"[+-]?(?:\d{1,6}(?:\.\d*)?|\.\d+)(?:e[+-]?\d{1,2})?", re.IGNORECASE)

# Words after "high" and "low" that make them describe something other than noise.
_OTHER_MEANINGS = re.compile(
    "angle|budget|camera|contrast|cut|def|definition|density|depth|details?|end|energy|exposure|fantasy|fashion|fi|"
    "fidelity|fps|frames?|frequency|gravity|heels?|horizon|key|kick|level|life|light|lighting|lights|memory|motion|"
    "mountain|pixel|poly|polygon|quality|ram|range|ratio|res|resolution|rise|saturation|school|shot|"
    "shutter|society|speed|street|tech|tide|tower|vram|waist|way"
)
_TECHNICAL = re.compile(
    r"v?\d+|e(?:poch)?\d*|s(?:tep|teps)?\d*|r(?:ank)?\d*|dim\d*|alpha\d*|[bf]p?f?(?:8|16|32)|bf|fp|f|e\dm\d|e4m3fn|e5m2|"
    r"scaled|resized|dynamic|avg|lora|model|adapter|final|comfyui|diffusers|kj|pytorch|weights|safetensors|v"
)


def transformers_of(pipe: Any) -> list[Any]:
    """List the transformers that a pipeline has, the high-noise one first; or one that is given without a pipeline."""
    if hasattr(pipe, "blocks"):
        return [pipe]
    return [model for name in EXPERTS if (model := getattr(pipe, name, None)) is not None]


@dataclass(frozen=True)
class LoraReference:
    """One LoRA as written: sources and strengths by expert, under "" where no expert is named."""

    files: Mapping[str, str]
    strengths: Mapping[str, float]

    def __str__(self) -> str:
        return ",".join(
            (f"{NOISE_OF[expert]}=" if expert else "")
            + file
            + (f"@{self.strengths[expert]:g}" if expert in self.strengths else "")
            for expert, file in self.files.items()
        )

    def with_files(self, rename: Callable[[str], str]) -> "LoraReference":
        """Return the source with other files for its own."""
        return LoraReference({expert: rename(file) for expert, file in self.files.items()}, self.strengths)


def parse_lora(text: str, exists: Callable[[str], bool] | None = None) -> LoraReference:
    """Parse a source.

    Args:
        exists: tells if a text is the name of a file as it is. None: looks on this machine.

    Raises:
        ValueError: one expert is named twice, a file is missing after ``=``, or a strength is no number.
    """
    exists = exists or _is_on_this_machine
    file, strength = _split_strength(text, exists)
    if exists(file) or _KEY.match(text) is None:
        return LoraReference({"": file}, {} if strength is None else {"": strength})
    files: dict[str, str] = {}
    strengths: dict[str, float] = {}
    for part in _NEXT_KEY.split(text):
        match = _KEY.match(part)
        assert match is not None
        expert = _EXPERT_OF[match[1].lower()]
        if expert in files:
            raise ValueError(f"LoRA {text!r} names {match[1].lower()}= twice: give one file to each expert")
        files[expert], strength = _split_strength(part[match.end() :].strip(), exists)
        if not files[expert]:
            raise ValueError(f"LoRA {text!r} has no file after {match[1].lower()}=: write high=FILE,low=FILE")
        if strength is not None:
            strengths[expert] = strength
    return LoraReference(files, strengths)


def replace_loras(stored: Sequence[str], others: Sequence[str]) -> list[str]:
    """Say where the files of stored sources are now.

    Where each of `others` is the bare path of a file with a stored name, that file takes the stored one's place, with
    its strength and its expert; otherwise `others` replace the stored sources.
    """
    paths = {Path(other).name: other for other in others}
    references = [parse_lora(source) for source in stored]
    names = {Path(file).name for reference in references for file in reference.files.values()}
    if not others or not paths.keys() <= names:
        return list(others)
    return [str(reference.with_files(lambda file: paths.get(Path(file).name, file))) for reference in references]


def public_name(text: str) -> str:
    """Return a source with its files' names in place of their paths."""
    return str(parse_lora(text).with_files(lambda file: Path(file).name))


def _is_on_this_machine(text: str) -> bool:
    return bool(text) and "\0" not in text and len(text) < 4096 and Path(text).expanduser().exists()


def _split_strength(text: str, exists: Callable[[str], bool]) -> tuple[str, float | None]:
    file, at, strength = text.rpartition("@")
    if exists(text) or not at or not file:
        return text, None
    if _STRENGTH.fullmatch(strength.strip()):
        return file, float(strength)
    if exists(file):
        raise ValueError(f"LoRA {text!r}: strength {strength!r} is no number: write FILE@1.2")
    return text, None


# ---- names -----------------------------------------------------------------------------------------------------------


def expert_of(source: str) -> str | None:
    """Read the expert of Wan2.2 from the name of a file, a folder or a Hub repository; None if it tells none.

    The words high and low count between separators and in camel case, with or without "noise", as do HN and LN, and H
    and L at the end (before versions, ranks and dtypes). They count for nothing inside words (glow, slowmo, highway),
    where they describe something else (low poly, high res), and where both occur. If the name tells nothing, "high
    noise" or "low noise" in the folder's does.
    """
    path = Path(source)
    name = path.name if Path(path.name).suffix.lower() not in _SUFFIXES else path.stem
    strong, weak = _marks(name)
    for found in (strong, weak, _marks(path.parent.name)[0]):
        if found:
            return _EXPERT_OF[found.pop()] if len(found) == 1 else None
    return None


def stem_of(source: str) -> str:
    """Return a name without what tells its expert: equal for the two files of a pair."""
    path = Path(source)
    text = path.name if expert_of(path.name) else f"{path.parent.name} {path.name}"
    return " ".join(word for word in _words(text) if word not in _MARKS and word != "noise")


_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".gguf")
_MARKS = {"h": "high", "l": "low", "hn": "high", "ln": "low", "highnoise": "high", "lownoise": "low"} | {
    noise: noise for noise in _EXPERT_OF
}


def _words(name: str) -> list[str]:
    """Split a name at separators and at changes of case and to digits, in lower case."""
    words = []
    for chunk in re.findall(r"[^\W_]+", name):
        parts = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+|[^\W\dA-Za-z]+", chunk)
        if len(parts) > 1 and len(parts[0]) == 1 and parts[0].isupper() and parts[1].isalpha():
            parts[:2] = [parts[0] + parts[1]]  # GLow is glow
        words += [part.lower() for part in parts]
    return words


def _marks(name: str) -> tuple[set[str], set[str]]:
    """Find "high" and "low": those that surely mean noise, and those that probably do."""
    words = _words(name)
    strong, weak = set(), set()
    for word, following in zip(words, [*words[1:], ""][: len(words)], strict=True):
        if word in ("hn", "ln", "highnoise", "lownoise") or (word in _EXPERT_OF and following == "noise"):
            strong.add(_MARKS[word])
        elif word in _EXPERT_OF and not _OTHER_MEANINGS.fullmatch(following):
            weak.add(word)
    chunks = [chunk.lower() for chunk in re.findall(r"[^\W_]+", name)]
    while len(chunks) > 1 and _TECHNICAL.fullmatch(chunks[-1]):
        chunks.pop()
    if len(chunks) > 1 and chunks[-1] in ("h", "l"):
        weak.add(_MARKS[chunks[-1]])
    return strong, weak
