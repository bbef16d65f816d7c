# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Activations as a server's kernels see them: rounded to codes and back."""

from collections.abc import Callable

import torch

from nemo_ptq.config import FP8_CACHE, NVFP4_CACHE
from nemo_ptq.quantization.kernels import has_kernels
from nemo_ptq.quantization.rounding import scale_of
from nemo_ptq.quantization.schemes import Scheme
from nemo_ptq.verify import dequantize as dq

_ROUND: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "FP8": dq.fake_quantize_fp8,
    "W8A8_SQ_PER_CHANNEL": dq.fake_quantize_int8,
    "W4A8_AWQ": dq.fake_quantize_fp8,
    "NVFP4": dq.fake_quantize_nvfp4,
}
_ROUND_TOKENS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "FP8_PER_CHANNEL_PER_TOKEN": dq.fake_quantize_fp8_tokens,
    "INT8_PER_CHANNEL_PER_TOKEN": dq.fake_quantize_int8_tokens,
}
_ROUND_CACHE = {FP8_CACHE: dq.fake_quantize_fp8, NVFP4_CACHE: dq.fake_quantize_nvfp4}
# Also for NVFP4: a server without a scale for the queries rounds them to FP8 with that of the keys.
_FP8_MAX = 448.0


def rounded_activation(values: torch.Tensor, amax: torch.Tensor | None, scheme: Scheme) -> torch.Tensor:
    """Rounds a linear layer's input, after its pre-quantization scale, and returns it in its own data type.

    Args:
        values: (..., in).
        amax: Its calibrated largest magnitude, one element; None where the scheme has dynamic inputs.
        scheme: How the layer is quantized, its inputs among it.
    """
    if amax is None:
        return _ROUND_TOKENS[str(scheme.quant_algo)](values.float()).to(values.dtype)
    return rounded_by_scale(values, activation_scale(amax, scheme), scheme)


def activation_scale(amax: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Returns the scale of a layer's input, float32 (), for its calibrated largest magnitude."""
    return scale_of(amax, scheme.largest_input).reshape(())


def rounded_by_scale(values: torch.Tensor, scale: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """As :func:`rounded_activation`, of a scheme with static inputs, whose scale is known."""
    if has_kernels(values):
        from nemo_ptq.quantization import grid_kernels

        return grid_kernels.rounded_activation(values, scale, str(scheme.quant_algo))
    return _ROUND[str(scheme.quant_algo)](values.float(), scale).to(values.dtype)


def cache_scale(amax: torch.Tensor) -> torch.Tensor:
    """Returns the scale of keys or values in a quantized cache, float32 (), for their calibrated largest magnitude."""
    return scale_of(amax, _FP8_MAX).reshape(())


def rounded_cache(values: torch.Tensor, scale: torch.Tensor, qformat: str) -> torch.Tensor:
    """Rounds keys or values as a quantized KV cache does, and returns them in their own data type.

    Args:
        values: (..., head size), in NVFP4 a multiple of 16.
        scale: From :func:`cache_scale`.
        qformat: One of :data:`~nemo_ptq.config.KV_CACHE_FORMATS`.
    """
    if qformat == FP8_CACHE and has_kernels(values):
        from nemo_ptq.quantization import grid_kernels

        return grid_kernels.rounded_activation(values, scale, "FP8")
    return _ROUND_CACHE[qformat](values.float(), scale).to(values.dtype)
