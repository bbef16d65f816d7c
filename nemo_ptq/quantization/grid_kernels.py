# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The grids of :mod:`nemo_ptq.quantization.grids` in Triton, and activations rounded to them in one pass.

Imported where tensors are on a GPU: see :func:`nemo_ptq.quantization.kernels.has_kernels`.
"""

import torch
import triton
import triton.language as tl

INTEGER, E4M3, E2M1 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# Elements that one program rounds, and of a block of NVFP4.
_AT_ONCE, _BLOCK = 2048, 16


@triton.jit
def _to_even(values):  # type: ignore[no-untyped-def]
    # float32 has no bits left for a fraction beside 1.5 * 2^23, and rounds it off, ties to even.
    return (values + 12582912.0) - 12582912.0


@triton.jit
def nearest_e4m3(values):  # type: ignore[no-untyped-def]
    """Rounds float32 to E4M3."""
    values = tl.minimum(tl.maximum(values, -448.0), 448.0)
    exponent = (values.to(tl.int32, bitcast=True) >> 23) & 0xFF
    # Three bits of mantissa, and below 2^-6 steps of 2^-9.
    step = ((tl.maximum(exponent, 121) - 3) << 23).to(tl.float32, bitcast=True)
    return _to_even(values / step) * step


@triton.jit
def nearest_e2m1(values):  # type: ignore[no-untyped-def]
    """Rounds float32 to E2M1."""
    magnitude = tl.abs(values)
    step = 0.5 + 0.5 * (magnitude >= 2.0).to(tl.float32) + (magnitude >= 4.0).to(tl.float32)
    return tl.minimum(tl.maximum(_to_even(tl.minimum(tl.maximum(values, -6.0), 6.0) / step) * step, -6.0), 6.0)


@triton.jit
def nearest(values, KIND: tl.constexpr, LOWEST: tl.constexpr, HIGHEST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rounds float32 to a grid; the ends are those of integers."""
    if KIND == E4M3:
        return nearest_e4m3(values)
    if KIND == E2M1:
        return nearest_e2m1(values)
    return _to_even(tl.minimum(tl.maximum(values, LOWEST), HIGHEST))


@triton.jit
def _round_activations(  # type: ignore[no-untyped-def]
    given, found, scale, size, KIND: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr
):
    numbers = tl.arange(0, BLOCKS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    places = tl.program_id(0).to(tl.int64) * (BLOCKS * BLOCK) + numbers
    values = tl.load(given + places, mask=places < size, other=0.0).to(tl.float32)
    step = tl.load(scale) + tl.zeros_like(values)
    if KIND == E2M1:
        amax = tl.max(tl.abs(values), 1)
        whole = 6.0 * tl.load(scale) + tl.zeros_like(amax)
        step = (nearest_e4m3(tl.div_rn(amax, whole)) * tl.load(scale))[:, None] + tl.zeros_like(values)
    quotient = tl.where(step > 0.0, tl.div_rn(values, tl.where(step > 0.0, step, 1.0)), 0.0)
    rounded = nearest(quotient, KIND, -128.0, 127.0) * step
    # A zero keeps the sign of the value that was rounded to it, and NaN stays NaN.
    sign = tl.where(step > 0.0, values.to(tl.int32, bitcast=True) & -2147483648, 0)
    rounded = ((rounded.to(tl.int32, bitcast=True) & 2147483647) | sign).to(tl.float32, bitcast=True)
    tl.store(found + places, tl.where(values == values, rounded, values).to(found.dtype.element_ty), mask=places < size)


_ACTIVATIONS = {"FP8": E4M3.value, "W8A8_SQ_PER_CHANNEL": INTEGER.value, "W4A8_AWQ": E4M3.value, "NVFP4": E2M1.value}


def rounded_activation(values: torch.Tensor, scale: torch.Tensor, quant_algo: str) -> torch.Tensor:
    """As :func:`nemo_ptq.quantization.activations.rounded_activation`, with the scale of its amax; bit for bit.

    Args:
        values: (..., in), on a GPU.
        scale: float32, one element.
        quant_algo: How the layer is quantized.
    """
    values = values.contiguous()
    found = torch.empty_like(values)
    with torch.cuda.device_of(values):
        _round_activations[(triton.cdiv(values.numel(), _AT_ONCE),)](
            values, found, scale, values.numel(), KIND=_ACTIVATIONS[quant_algo], BLOCKS=_AT_ONCE // _BLOCK, BLOCK=_BLOCK
        )
    return found
