# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Linear layers as files have them: packed weights with their scales, and inputs rounded as a server rounds them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn

from nemo_ptq.verify import dequantize as dq

Tensors = Callable[[torch.Tensor], torch.Tensor]
# Reads a field of a layer onto the device that computes; None where the files have no such field.
ReadField = Callable[[str], torch.Tensor | None]


@dataclass(frozen=True)
class Linear:
    """y = quantize_input(x * prequant_scale) @ weight.T + bias.

    Attributes:
        weight: float32 (out, in).
        bias: float32 (out,) or None.
        prequant_scale: float32 (in,) or None.
        quantize_input: Rounds the input to its quantized grid, or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    prequant_scale: torch.Tensor | None = None
    quantize_input: Tensors | None = None

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Applies the layer to float32 (..., in)."""
        if self.prequant_scale is not None:
            inputs = inputs * self.prequant_scale
        if self.quantize_input is not None:
            inputs = self.quantize_input(inputs)
        return nn.functional.linear(inputs, self.weight, self.bias)


@dataclass(frozen=True)
class StoredLinear:
    """A linear layer whose weight is as small as in its file.

    Attributes:
        weight: In the file's data type and shape.
        dequantize: Makes float32 (out, in) of it; None where it is unquantized.
        bias: float32 (out,) or None.
        prequant_scale: float32 (in,) or None.
        quantize_input: Rounds the input to its quantized grid, or None.
    """

    weight: torch.Tensor
    dequantize: Tensors | None = None
    bias: torch.Tensor | None = None
    prequant_scale: torch.Tensor | None = None
    quantize_input: Tensors | None = None

    def dequantized(self) -> Linear:
        """The layer with its weight in float32."""
        weight = self.weight.float() if self.dequantize is None else self.dequantize(self.weight)
        return Linear(weight, self.bias, self.prequant_scale, self.quantize_input)

    def with_rows(self, reorder: Tensors) -> "StoredLinear":
        """The layer with its output features in another order.

        Args:
            reorder: Sorts the rows of a float32 matrix or vector.
        """
        dequantize = self.dequantize or torch.Tensor.float
        bias = None if self.bias is None else reorder(self.bias)
        return replace(self, dequantize=lambda weight: reorder(dequantize(weight)), bias=bias)


# Layers that get the same input, and whose outputs stand one after the other.
Stack = tuple[StoredLinear, ...]


def dequantized(stack: Stack) -> Tensors:
    """The layers as one, with their weights in float32."""
    linears = [stored.dequantized() for stored in stack]
    if len(linears) == 1:
        return linears[0]
    return lambda inputs: torch.cat([linear(inputs) for linear in linears], dim=-1)


@dataclass(frozen=True)
class _Scheme:
    """How a linear layer is quantized.

    Attributes:
        dequantize: Makes float32 (out, in) of the stored weight and the scales.
        scales: The fields with these scales, by what the function calls them.
        quantize_input: Rounds an input; None where inputs stay as they are.
        input_scale: The field with the scale of that; None where each token has its own.
        weight: Name of the field with the weight.
    """

    dequantize: Callable[..., torch.Tensor]
    scales: Mapping[str, str] = field(default_factory=lambda: {"scale": "weight_scale"})
    quantize_input: Callable[..., torch.Tensor] | None = None
    input_scale: str | None = "input_scale"
    weight: str = "weight"


_TWO_LEVELS = {"scale": "weight_scale", "scale_2": "weight_scale_2"}
_DIVIDED = {"scale": "weight_scale", "global_scale": "weight_global_scale"}
_FP8 = _Scheme(dq.dequantize_fp8, quantize_input=dq.fake_quantize_fp8)
_INT8 = _Scheme(dq.dequantize_int8, quantize_input=dq.fake_quantize_int8)
_FP8_TOKENS = _Scheme(dq.dequantize_rows, quantize_input=dq.fake_quantize_fp8_tokens, input_scale=None)
_INT8_TOKENS = _Scheme(dq.dequantize_rows, quantize_input=dq.fake_quantize_int8_tokens, input_scale=None)
_PACKED = _Scheme(dq.dequantize_packed, weight="weight_packed")
_NVFP4_PACKED = _Scheme(dq.dequantize_nvfp4_divided, _DIVIDED, weight="weight_packed")
# By the names that TensorRT-LLM and ModelOpt have for them, and those of the compressed-tensors library's formats with
# what they do to activations.
_SCHEMES: Mapping[str, _Scheme] = {
    "FP8": _FP8,
    "W8A8_SQ_PER_CHANNEL": _INT8,
    "W4A16_AWQ": _Scheme(dq.dequantize_int4),
    "W4A8_AWQ": _Scheme(dq.dequantize_w4a8, _TWO_LEVELS, dq.fake_quantize_fp8),
    "NVFP4": _Scheme(dq.dequantize_nvfp4, _TWO_LEVELS, dq.fake_quantize_nvfp4),
    "FP8_PER_CHANNEL_PER_TOKEN": _FP8_TOKENS,
    "W4A16_NVFP4": _Scheme(dq.dequantize_nvfp4, _TWO_LEVELS),
    "float-quantized": _FP8,
    "float-quantized, dynamic": _FP8_TOKENS,
    "int-quantized": _INT8,
    "int-quantized, dynamic": _INT8_TOKENS,
    "pack-quantized": _PACKED,
    "pack-quantized, dynamic": replace(_PACKED, quantize_input=dq.fake_quantize_fp8_tokens, input_scale=None),
    "nvfp4-pack-quantized": _NVFP4_PACKED,
    "nvfp4-pack-quantized, local": replace(
        _NVFP4_PACKED, quantize_input=dq.fake_quantize_nvfp4_divided, input_scale="input_global_scale"
    ),
}


def stored_linear(algorithm: str | None, read: ReadField) -> StoredLinear:
    """Puts a layer together from its fields.

    Args:
        algorithm: Its quantization; None if it is not quantized.
        read: Reads "weight" (or what the algorithm calls it), "bias", "pre_quant_scale", and the scales of weights and
            inputs, as far as there are any.
    """

    def as_float(field: str) -> torch.Tensor | None:
        found = read(field)
        return None if found is None else found.float()

    if algorithm is None:
        return StoredLinear(_there(read("weight")), bias=as_float("bias"))
    scheme = _SCHEMES[algorithm]
    scales = {name: _there(read(field)) for name, field in scheme.scales.items()}
    quantize = scheme.quantize_input
    if quantize is not None and scheme.input_scale is not None:
        quantize = partial(quantize, scale=_there(read(scheme.input_scale)))
    return StoredLinear(
        _there(read(scheme.weight)),
        partial(scheme.dequantize, **scales),
        as_float("bias"),
        as_float("pre_quant_scale"),
        quantize,
    )


def _there(field: torch.Tensor | None) -> torch.Tensor:
    assert field is not None, "a reader raises an error of its own for what must be there"
    return field
