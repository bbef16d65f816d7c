# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What a server computes with a calibrated layer: weights from their codes, activations rounded as its kernels do.

The codes are read back by the functions that verification reads files with, so a measured error is one of the files.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from nemo_ptq.export.module_tensors import Linear
from nemo_ptq.export.packing import all_rows, pack_where_it_is
from nemo_ptq.quantization.pieces import rows_at_once
from nemo_ptq.quantization.rounding import scale_of
from nemo_ptq.verify import dequantize as dq

_DEQUANTIZE: dict[str, Callable[..., torch.Tensor]] = {
    "FP8": dq.dequantize_fp8,
    "W8A8_SQ_PER_CHANNEL": dq.dequantize_int8,
    "W4A16_AWQ": dq.dequantize_int4,
    "W4A8_AWQ": dq.dequantize_w4a8,
    "NVFP4": dq.dequantize_nvfp4,
}
_ROUND_INPUT: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "FP8": dq.fake_quantize_fp8,
    "W8A8_SQ_PER_CHANNEL": dq.fake_quantize_int8,
    "W4A8_AWQ": dq.fake_quantize_fp8,
    "NVFP4": dq.fake_quantize_nvfp4,
}
_SCALES = ("weights_scaling_factor", "weights_scaling_factor_2")
_FP8_MAX = 448.0


def rounded_weight(linear: Linear) -> torch.Tensor:
    """Returns the weight that a server multiplies with: float32 (out, in), on the weight's device."""
    amax = linear.weight_amax
    assert amax is not None
    rounded = torch.empty(linear.weight.shape, device=linear.weight.device)
    rows = rows_at_once(linear.weight)
    weights = linear.weight.split(rows)
    amaxes = amax.split(rows) if amax.numel() > 1 else [amax] * len(weights)
    for target, weight, of_rows in zip(rounded.split(rows), weights, amaxes, strict=True):
        target.copy_(_rounded(replace(linear, weight=weight, bias=None, weight_amax=of_rows)))
    return rounded


def _rounded(linear: Linear) -> torch.Tensor:
    packed = {field: tensor for (_, field), tensor in pack_where_it_is(linear, all_rows, torch.bfloat16).items()}
    scales = [packed[name] for name in _SCALES if name in packed]
    return _DEQUANTIZE[str(linear.scheme.quant_algo)](packed["weight"], *scales)


def scaled_input(inputs: torch.Tensor, linear: Linear) -> torch.Tensor:
    """Multiplies a layer's input (..., in) with the pre-quantization scale, where there is one."""
    return inputs if linear.pre_quant_scale is None else inputs * linear.pre_quant_scale.to(inputs.dtype)


def rounded_input(scaled: torch.Tensor, linear: Linear) -> torch.Tensor:
    """Rounds a :func:`scaled_input` as the scheme does, and returns it in its own data type."""
    if linear.input_amax is None:
        return scaled
    scale = scale_of(linear.input_amax, linear.scheme.largest_input).reshape(())
    return _ROUND_INPUT[str(linear.scheme.quant_algo)](scaled.float(), scale).to(scaled.dtype)


def rounded_cache(values: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """Rounds keys or values to FP8 as a quantized KV cache does, and returns them in their own data type.

    Args:
        values: Any shape.
        amax: Their calibrated largest magnitude, one element.
    """
    scale = scale_of(amax.to(values.device), _FP8_MAX).reshape(())
    return dq.fake_quantize_fp8(values.float(), scale).to(values.dtype)
