"""Find how each tensor of a safetensors file is stored, and refuse formats whose values would be wrong. No torch.

The rule of every format that is taken: weight = float32(stored) * float32(scale), with a scale for the tensor or one
for each output row. Scales of inputs (``scale_input``, ``input_scale``) are for computing in fp8 and never enter the
weight. Layers are told one by one, as files mix scaled and plain ones.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pusa.models.files import WrongArchitectureError
from pusa.models.single_file.headers import FileHeader, TensorHeader

COMPILED = "_orig_mod."  # in names of compiled models
MARKER = "scaled_fp8"  # of files of 2025: all their fp8 layers are scaled
FP8_TYPES = ("F8_E4M3", "F8_E5M2")
FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
GGUF_TYPES = (
    *("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "Q5_0", "Q5_1", "Q4_0", "Q4_1"),
    *("IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S", "IQ1_M"),
)
GGUF_BLOCKS = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "Q5_0", "Q5_1", "Q4_0", "Q4_1", "IQ4_NL", "IQ4_XS")
"""Those of matrices that can be kept as they are stored."""

KeptStorage = Literal["", "fp8", "int8", "gguf"]

_KEPT: dict[str, KeptStorage] = {**dict.fromkeys(FP8_TYPES, "fp8"), "I8": "int8", **dict.fromkeys(GGUF_BLOCKS, "gguf")}
_IN_FP32 = ("time_embed", "modulation", "scale_shift_table")  # in a transformer, by diffusers
_LOOKED_UP = ("shared", "embed_tokens", "token_emb")  # a text encoder's words are no linear layer
FORMATS = {"float8_e4m3fn": FP8_TYPES, "float8_e5m2": FP8_TYPES, "int8_tensorwise": ("I8",)}

_SCALES = (".scale_weight", ".weight_scale")
_IGNORED = (".scale_input", ".input_scale", ".comfy_attention.config")
_DECLARATION = ".comfy_quant"
_METADATA = "_quantization_metadata"
_OTHER_FORMATS = {
    ".weight_scale_2": "nvfp4",
    ".pre_quant_scale": "nvfp4",
    ".weight_s_rel": "asym_w4a8_int8",
    ".weight_zeros": "awq_w4a16",
    ".weight_scale_inv": "fp8 with scales of blocks",
    ".weight.absmax": "bitsandbytes",
    ".weight.quant_map": "bitsandbytes",
    ".SCB": "bitsandbytes int8",
}
_TAKE = "take the model's bf16, fp16, scaled fp8 or GGUF file"
_TITLES = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16"}


@dataclass(frozen=True)
class StoredTensor:
    """Say where a tensor's values are.

    Attributes:
        key: its name in the file.
        header: its shape, type and place.
        scale: name of its scale in the file; None: its values are what is stored.
        is_among_scaled: it is an fp8 matrix without a scale in a component that has scaled ones.
        rows: ranges of the stored rows that it is made of, in this order; (): all of them.
    """

    key: str
    header: TensorHeader
    scale: str | None = None
    is_among_scaled: bool = False
    rows: tuple[tuple[int, int], ...] = ()

    def take(self, order: Sequence[int], count: int) -> "StoredTensor":
        """Take pieces of its rows, of `count` equal ones, in this order.

        Raises:
            ValueError: the rows are no multiple of `count`.
        """
        size, rest = divmod(self.header.shape[0], count)
        if rest:
            raise ValueError(f"{self.key} has {self.header.shape[0]} rows, which are no {count} equal pieces")
        shape = (size * len(order), *self.header.shape[1:])
        header = replace(self.header, shape=shape, size_bytes=self.header.size_bytes // count * len(order))
        return replace(self, header=header, rows=tuple((number * size, (number + 1) * size) for number in order))


@dataclass(frozen=True)
class StoredPart:
    """Hold the tensors of one component: name without prefix -> where its values are; and the name of the layout.

    A layout is "bf16", "fp16", "fp32", "fp8_plain", "fp8_scaled_old", "fp8_scaled_new", "fp8_scaled_per_row",
    "fp8_mixed" (scaled and plain fp8 layers), "int8_tensorwise" or "gguf".
    """

    tensors: Mapping[str, StoredTensor]
    layout: str


def stored_part(header: FileHeader, keys: Mapping[str, str], prefixes: tuple[str, ...], where: str) -> StoredPart:
    """Pair the tensors of a component with their scales.

    Args:
        header: of the file.
        keys: name without prefix -> name in the file, of the component's tensors.
        prefixes: that names of layers in the file's metadata may have.
        where: the component and the file, for errors.

    Raises:
        WrongArchitectureError: a format that needs more than a scale, a scale that is missing or left over.
    """
    if header.format == "gguf":
        return _stored_gguf(header, keys, where)
    tensors = {name: header.tensors[key] for name, key in keys.items()}
    declared = _declarations(header, keys, prefixes, where)
    for layer, declaration in declared.items():
        _check_declaration(layer, declaration, where)
    _refuse_other_formats(tensors, where)
    scales = _scales(tensors, where)
    is_marked, has_scales = MARKER in tensors, bool(scales)
    stored = {}
    for name, tensor in tensors.items():
        if name == MARKER or name.endswith((*_SCALES, *_IGNORED, _DECLARATION)):
            continue
        layer = name.removesuffix(".weight")
        scale = scales.pop(layer, None) if name.endswith(".weight") else None
        _check_tensor(name, tensor, tensors[scale] if scale else None, where)
        is_declared = layer in declared and name.endswith(".weight")
        if is_declared and tensor.type not in FORMATS[declared[layer]["format"]]:
            raise _refusal(where, f"{name} is declared {declared[layer]['format']} and stored as {tensor.type}")
        is_fp8_matrix = len(tensor.shape) > 1 and name.endswith(".weight") and tensor.type in FP8_TYPES
        is_scaled = is_declared or (is_marked and is_fp8_matrix) or tensor.type == "I8"
        if scale is None and is_scaled:
            raise _refusal(
                where, f"{name} is {tensor.type} and its scale is missing: its values would be far too large"
            )
        is_alone = is_fp8_matrix and has_scales and scale is None
        stored[name] = StoredTensor(keys[name], tensor, keys[scale] if scale else None, is_alone)
    if scales:
        raise _refusal(where, f"{len(scales)} scales have no weight (first: {next(iter(scales.values()))})")
    absent = [layer for layer in declared if f"{layer}.weight" not in stored]
    if absent:
        raise _refusal(where, f"{len(absent)} layers are declared quantised and not there (first: {absent[0]})")
    return StoredPart(stored, _layout(stored, tensors, is_marked))


def _stored_gguf(header: FileHeader, keys: Mapping[str, str], where: str) -> StoredPart:
    stored = {name: StoredTensor(key, header.tensors[key]) for name, key in keys.items()}
    for name, tensor in stored.items():
        if tensor.header.type not in GGUF_TYPES:
            raise _refusal(where, f"{name} is of GGUF's type {tensor.header.type}")
    return StoredPart(stored, "gguf")


def _declarations(
    header: FileHeader, keys: Mapping[str, str], prefixes: tuple[str, ...], where: str
) -> dict[str, dict[str, Any]]:
    """Read what the file says of its quantised layers, in its metadata and beside them: layer -> declaration."""
    declared: dict[str, dict[str, Any]] = {}
    for layer, declaration in metadata_layers(header, where).items():
        for name in dict.fromkeys((*(layer.removeprefix(prefix) for prefix in prefixes if prefix), layer)):
            if f"{name}.weight" in keys:
                declared[name] = declaration
                break
    for name, key in keys.items():
        if name.endswith(_DECLARATION):
            layer = name.removesuffix(_DECLARATION)
            declaration = _parse_json(header.read(key), f"{key} of {where}")
            declared[layer] = declared.get(layer, {}) | declaration
    return declared


def metadata_layers(header: FileHeader, where: str) -> dict[str, dict[str, Any]]:
    """Read the quantised layers that a header names, as they are written there, with compiled models' names mended."""
    text = header.metadata.get(_METADATA) if header.format == "safetensors" else None
    if text is None:
        return {}
    layers = _parse_json(text, f"{_METADATA} of {where}").get("layers", {})
    if not isinstance(layers, dict) or not all(isinstance(entry, dict) for entry in layers.values()):
        raise _refusal(where, f"its {_METADATA} has no layers")
    return {layer.replace(COMPILED, ""): entry for layer, entry in layers.items()}


def _parse_json(text: str | bytes, what: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise WrongArchitectureError(f"{what} is no JSON: the file is of an unknown format, or damaged") from error
    if not isinstance(parsed, dict):
        raise WrongArchitectureError(f"{what} is no JSON object: the file is of an unknown format, or damaged")
    return parsed


def _check_declaration(layer: str, declaration: Mapping[str, Any], where: str) -> None:
    kind = declaration.get("format")
    if declaration.get("convrot"):
        raise _refusal(where, f"{layer} is convrot int8 ({kind} with rotated weights)")
    if kind not in FORMATS:
        raise _refusal(where, f"{layer} is quantised as {kind}")


def _refuse_other_formats(tensors: Mapping[str, TensorHeader], where: str) -> None:
    for name, tensor in tensors.items():
        for suffix, kind in _OTHER_FORMATS.items():
            if name.endswith(suffix):
                raise _refusal(where, f"{name.removesuffix(suffix)} is quantised as {kind} (it has {suffix[1:]})")
        if name.endswith(_SCALES) and tensor.type not in FLOAT_TYPES:
            weight = tensors.get(f"{name.rpartition('.')[0]}.weight")
            packed = weight is not None and weight.type in ("U8", "I8")
            kind = "nvfp4" if packed else "mxfp8"
            raise _refusal(where, f"{name} is {tensor.type}, as in {kind}, and no float")


def _scales(tensors: Mapping[str, TensorHeader], where: str) -> dict[str, str]:
    """Find the scale of each layer: layer -> its name."""
    scales: dict[str, str] = {}
    for name in tensors:
        if name.endswith(_SCALES):
            layer = name.rpartition(".")[0]
            if layer in scales:
                raise _refusal(where, f"{layer} has two scales")
            scales[layer] = name
    return scales


def _check_tensor(name: str, tensor: TensorHeader, scale: TensorHeader | None, where: str) -> None:
    if tensor.type not in (*FLOAT_TYPES, *FP8_TYPES, "I8"):
        raise _refusal(where, f"{name} is stored as {tensor.type}")
    rows = tensor.shape[0] if tensor.shape else 1
    if scale is not None and scale.values != 1 and scale.shape not in ((rows,), (rows, *[1] * (len(tensor.shape) - 1))):
        raise _refusal(
            where,
            f"{name} {list(tensor.shape)} has scales {list(scale.shape)}: one for the tensor or one for each row "
            f"[{rows}] would do, and not scales of blocks or columns",
        )


def _layout(stored: Mapping[str, StoredTensor], tensors: Mapping[str, TensorHeader], is_marked: bool) -> str:
    if any(tensor.header.type == "I8" for tensor in stored.values()):
        return "int8_tensorwise"
    eight = [tensor for tensor in stored.values() if tensor.header.type in FP8_TYPES]
    if not eight:
        sizes: Counter[str] = Counter()
        for tensor in stored.values():
            sizes[tensor.header.type] += tensor.header.size_bytes
        return _TITLES.get(max(sizes, key=lambda kind: sizes[kind]), "") if sizes else ""
    scales = list(_layer_scales(tensors))
    if not scales:
        return "fp8_plain"
    if any(scale.values > 1 for _, scale in scales):
        return "fp8_scaled_per_row"
    if not is_marked and any(tensor.scale is None for tensor in eight):
        return "fp8_mixed"
    return "fp8_scaled_old" if scales[0][0].endswith(".scale_weight") else "fp8_scaled_new"


def _layer_scales(tensors: Mapping[str, TensorHeader]) -> Iterator[tuple[str, TensorHeader]]:
    return ((name, tensor) for name, tensor in tensors.items() if name.endswith(_SCALES))


def kept_size(stored: Mapping[str, StoredTensor]) -> tuple[KeptStorage, int]:
    """Compute how a component is in memory whose matrices are kept as they are stored.

    Returns:
        "fp8", "int8" or "gguf", or "" where no matrix is quantised; and the bytes of a model in 16 bits otherwise.
    """
    sizes: Counter[KeptStorage] = Counter()
    for name, tensor in stored.items():
        header = tensor.header
        kind = _KEPT.get(header.type, "") if len(header.shape) == 2 and name.endswith(".weight") else ""
        in_fp32 = any(word in name for word in _IN_FP32)
        if kind and not in_fp32 and not any(word in name for word in _LOOKED_UP):
            sizes[kind] += header.size_bytes
        else:
            sizes[""] += (4 if in_fp32 else 2) * header.values
    kinds = [kind for kind, _ in sizes.most_common() if kind]
    return kinds[0] if kinds else "", sizes.total()


def _refusal(where: str, why: str) -> WrongArchitectureError:
    return WrongArchitectureError(f"{where} cannot be read exactly: {why}; {_TAKE}")
