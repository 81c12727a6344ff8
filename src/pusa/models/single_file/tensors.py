"""Read the tensors of a single file one by one, at their exact values.

weight = float32(stored) * float32(scale), rounded once to the wanted dtype. A GGUF's blocks are computed in fp32 by
`gguf`; diffusers' own way computes in fp16, 3e-4 to 1e-3 away from that.
"""

from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pusa.models.files import DamagedFileError, WrongArchitectureError
from pusa.models.single_file.headers import FileHeader, open_gguf
from pusa.models.single_file.quantisation import StoredTensor
from pusa.models.streaming import WeightSource, rows_of

# Plain weights are small, and scaled fp8 fills its range up to 448: a matrix above this has lost its scale.
_LARGEST_UNSCALED = 100.0


class TensorReader:
    """Read tensors of one file, as a context manager."""

    def __init__(self, header: FileHeader) -> None:
        self._header = header
        self._file: Any = None
        self._gguf: dict[str, Any] = {}

    def __enter__(self) -> "TensorReader":
        if self._header.format == "gguf":
            self._gguf = {tensor.name: tensor for tensor in open_gguf(self._header.path).tensors}
        else:
            try:
                self._file = safe_open(self._header.path, "pt")
            except SafetensorError as error:
                raise DamagedFileError(f"{self._header.path.name} is no whole safetensors file: {error}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file, self._gguf = None, {}

    def read(self, tensor: StoredTensor, dtype: torch.dtype) -> Tensor:
        """Compute a tensor's exact values in fp32, rounded once to `dtype`, in memory of its own."""
        if self._header.format == "gguf":
            return self._read_gguf(tensor).to(dtype)
        stored, scale = self.stored(tensor), self.scale(tensor)
        if scale is None:
            return stored.to(dtype, copy=True)
        return stored.to(torch.float32, copy=True).mul_(scale).to(dtype)

    def stored(self, tensor: StoredTensor) -> Tensor:
        """Map a tensor of a safetensors file as it is stored.

        Raises:
            WrongArchitectureError: fp8 without a scale, among scaled layers, whose values show that one is missing.
        """
        stored = self._file.get_tensor(tensor.key)
        if tensor.is_among_scaled:
            largest = stored.float().abs_().max().item() if stored.numel() else 0.0
            if largest > _LARGEST_UNSCALED:
                raise WrongArchitectureError(
                    f"{self._header.path.name}: {tensor.key} is {tensor.header.type} with values up to {largest:g} and "
                    f"without a scale (plain weights stay far below {_LARGEST_UNSCALED:g}): get the file again, or "
                    "the bf16 or fp16 one"
                )
        return rows_of(stored, tensor.rows)

    def scale(self, tensor: StoredTensor) -> Tensor | None:
        """Read a tensor's scale in fp32: ``[1, ...]``, or ``[rows, 1, ...]``, with as many dimensions as the tensor."""
        if tensor.scale is None:
            return None
        scale = self._file.get_tensor(tensor.scale).to(torch.float32, copy=True)
        scale = scale.reshape(-1, *[1] * (len(tensor.header.shape) - 1))  # of rows, also if there are as many columns
        return rows_of(scale, tensor.rows) if len(scale) > 1 else scale

    def source_of(self, tensor: StoredTensor) -> WeightSource | None:
        """Describe where a tensor's exact values can be read again; None in a GGUF file."""
        if self._header.format == "gguf":
            return None
        return WeightSource.of(self._header.path, tensor.key, tensor.scale or "", tensor.rows)

    def blocks(self, tensor: StoredTensor) -> Tensor:
        """Copy the packed blocks of a GGUF tensor, uint8 ``[rows, bytes]``."""
        return rows_of(torch.from_numpy(self._gguf[tensor.key].data.copy()), tensor.rows)

    def _read_gguf(self, tensor: StoredTensor) -> Tensor:
        import gguf

        mapped = self._gguf[tensor.key]
        values = gguf.dequantize(mapped.data, mapped.tensor_type)
        whole = torch.from_numpy(values.copy() if not values.flags.owndata else values)
        return rows_of(whole, tensor.rows).reshape(tensor.header.shape)
