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
from nemo_ptq.quantization.activations import rounded_activation
from nemo_ptq.quantization.pieces import rows_at_once
from nemo_ptq.verify import dequantize as dq

_DEQUANTIZE: dict[str, Callable[..., torch.Tensor]] = {
    "FP8": dq.dequantize_fp8,
    "W8A8_SQ_PER_CHANNEL": dq.dequantize_int8,
    "W4A16_AWQ": dq.dequantize_int4,
    "W4A8_AWQ": dq.dequantize_w4a8,
    "NVFP4": dq.dequantize_nvfp4,
    "FP8_PER_CHANNEL_PER_TOKEN": dq.dequantize_rows,
    "INT8_PER_CHANNEL_PER_TOKEN": dq.dequantize_rows,
    "W4A16_NVFP4": dq.dequantize_nvfp4,
}
_SCALES = ("weights_scaling_factor", "weights_scaling_factor_2")


def rounded_weight(linear: Linear) -> torch.Tensor:
    """Returns the weight that a server multiplies with: float32 (out, in), on the weight's device."""
    rounded = torch.empty(linear.weight.shape, device=linear.weight.device)
    rows = rows_at_once(linear.weight)
    for start in range(0, len(rounded), rows):
        which = slice(start, start + rows)
        rounded[which] = _rounded(_some_rows(linear, which))
    return rounded


def _some_rows(linear: Linear, which: slice) -> Linear:
    amax, rounded = linear.weight_amax, linear.rounded
    return replace(
        linear,
        weight=linear.weight[which],
        bias=None,
        weight_amax=amax if amax is None or amax.numel() == 1 else amax[which],
        rounded=None if rounded is None else rounded.rows(which),
    )


def _rounded(linear: Linear) -> torch.Tensor:
    packed = {field: tensor for (_, field), tensor in pack_where_it_is(linear, all_rows, torch.bfloat16).items()}
    scales = [packed[name] for name in _SCALES if name in packed]
    return _DEQUANTIZE[str(linear.scheme.quant_algo)](packed["weight"], *scales)


def scaled_input(inputs: torch.Tensor, linear: Linear) -> torch.Tensor:
    """Multiplies a layer's input (..., in) with the pre-quantization scale, where there is one."""
    return inputs if linear.pre_quant_scale is None else inputs * linear.pre_quant_scale.to(inputs.dtype)


def rounded_input(scaled: torch.Tensor, linear: Linear) -> torch.Tensor:
    """Rounds a :func:`scaled_input` as the scheme does, and returns it in its own data type."""
    return rounded_activation(scaled, linear.input_amax, linear.scheme) if linear.rounds_inputs else scaled
