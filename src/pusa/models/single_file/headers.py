"""Read the headers of safetensors and GGUF files: names, shapes, types and places of tensors. Imports no torch."""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pusa.models import files
from pusa.models.files import DamagedFileError

Format = Literal["safetensors", "gguf"]

_GGUF_MAGIC = b"GGUF"
_ORIG_SHAPE = "comfy.gguf.orig_shape."
_ARCHITECTURE = "general.architecture"
_TOKENIZER = "tokenizer.ggml.model"


@dataclass(frozen=True)
class TensorHeader:
    """Describe a tensor in a file.

    Attributes:
        shape: of the tensor as torch has it; of the stored bytes where a format packs several values into one.
        type: "F32", "BF16", "F8_E4M3", "U8", ... as safetensors names them, or GGUF's "Q8_0", "Q4_K", ...
        offset: of its first byte in the file.
        size_bytes: that it takes there.
    """

    shape: tuple[int, ...]
    type: str
    offset: int
    size_bytes: int

    @property
    def values(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class FileHeader:
    """Hold what a file says before its tensors.

    Attributes:
        path: the file.
        format: "safetensors" or "gguf".
        size_bytes: its size.
        tensors: name as stored -> description.
        metadata: of safetensors, strings; of GGUF "general.architecture" and "tokenizer.ggml.model", if they are there.
    """

    path: Path
    format: Format
    size_bytes: int
    tensors: Mapping[str, TensorHeader]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def architecture(self) -> str | None:
        """Return GGUF's ``general.architecture``: "wan", "t5encoder", "pig" or nothing."""
        return self.metadata.get(_ARCHITECTURE)

    def read(self, name: str) -> bytes:
        """Read the bytes of a small tensor."""
        tensor = self.tensors[name]
        with self.path.open("rb") as file:
            file.seek(tensor.offset)
            return file.read(tensor.size_bytes)


def read_header(path: Path) -> FileHeader:
    """Read the header of a safetensors or GGUF file, which its first bytes tell apart.

    Raises:
        FileNotFoundError: no such file.
        DamagedFileError: neither format, a folder, or the file ends before its last tensor.
        ModuleNotFoundError: a GGUF file, and no package `gguf`.
    """
    if path.is_dir():
        raise DamagedFileError(f"{path} is a folder: give a file in it")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        is_gguf = file.read(4) == _GGUF_MAGIC
    return _gguf_header(path) if is_gguf else _safetensors_header(path)


def _safetensors_header(path: Path) -> FileHeader:
    if path.suffix == ".gguf":
        raise DamagedFileError(f"{path.name} is no GGUF file: it does not begin with GGUF")
    entries, metadata, data_start = files.safetensors_contents(path)
    tensors = {}
    for name, entry in entries.items():
        start, end = entry["data_offsets"]
        tensors[name] = TensorHeader(tuple(entry["shape"]), entry["dtype"], data_start + start, end - start)
    return FileHeader(path, "safetensors", path.stat().st_size, tensors, metadata)


def open_gguf(path: Path) -> Any:
    """Map a GGUF file with `gguf.GGUFReader`; raise as `read_header`."""
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'{path.name} is a GGUF file: pip install "pusa[quant]" to read it') from error
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, struct.error) as error:
        raise DamagedFileError(
            f"{path.name} is no whole GGUF file, or of a newer version than gguf reads (cut short? it has "
            f"{path.stat().st_size} bytes): {error}"
        ) from error


def _gguf_header(path: Path) -> FileHeader:
    reader = open_gguf(path)
    size_bytes = path.stat().st_size
    tensors = {}
    for tensor in reader.tensors:
        end = int(tensor.data_offset) + int(tensor.n_bytes)
        if end > size_bytes:
            raise DamagedFileError(
                f"{path.name} is cut short: {size_bytes} of at least {end} bytes; download or copy it again"
            )
        shape = tuple(int(size) for size in reversed(tensor.shape))  # GGUF counts dimensions from the fastest
        original = reader.fields.get(_ORIG_SHAPE + tensor.name)
        if original is not None:
            shape = tuple(int(size) for size in original.contents())
            if math.prod(shape) != int(tensor.n_elements):
                raise DamagedFileError(
                    f"{path.name}: {tensor.name} has {int(tensor.n_elements)} values, and not as many as its "
                    f"orig_shape {list(shape)}"
                )
        tensors[tensor.name] = TensorHeader(
            shape, tensor.tensor_type.name, int(tensor.data_offset), int(tensor.n_bytes)
        )
    metadata = {name: reader.fields[name].contents() for name in (_ARCHITECTURE, _TOKENIZER) if name in reader.fields}
    return FileHeader(path, "gguf", size_bytes, tensors, metadata)
