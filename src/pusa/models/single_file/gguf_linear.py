"""Compute linear layers from the blocks of a GGUF file. Needs the package `gguf`."""

import torch
from diffusers.quantizers.gguf.utils import GGML_QUANT_SIZES, GGUFLinear, GGUFParameter, dequantize_functions
from gguf import GGMLQuantizationType
from torch import Tensor, nn


class ExactGGUFLinear(GGUFLinear):
    """`GGUFLinear` whose weights are computed in fp32, as `gguf` does, and rounded once to the dtype of the inputs."""

    @classmethod
    def of(cls, linear: nn.Linear, blocks: Tensor, kind: GGMLQuantizationType, dtype: torch.dtype) -> "ExactGGUFLinear":
        """Replace a linear layer, whose weights may be on the meta device.

        Args:
            blocks: uint8 ``[rows, bytes]``.
            kind: of the blocks.
            dtype: of the computation.
        """
        with torch.device("meta"):
            made = cls(linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=dtype)
        # As int8, since transformers casts what enters a UMT5's last layers to the dtype of any other weight.
        made.weight = GGUFParameter(blocks.view(torch.int8), quant_type=kind)
        made.bias = linear.bias
        return made

    def dequantized(self) -> Tensor:
        """Compute the weight in fp32, ``[out, in]``."""
        kind = self.weight.quant_type
        block_size, type_size = GGML_QUANT_SIZES[kind]
        blocks = self.weight.as_tensor().view(torch.uint8).reshape(-1, type_size)
        values = dequantize_functions[kind](blocks, block_size, type_size, dtype=torch.float32)
        return values.reshape(self.out_features, self.in_features)

    def forward(self, inputs: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        return nn.functional.linear(inputs, self.dequantized().to(inputs.dtype), bias)
