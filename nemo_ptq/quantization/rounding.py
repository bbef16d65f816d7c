# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Weights and their scales -> the codes that are stored. Bit for bit what ModelOpt's exporter makes of them."""

import torch

# Between the magnitudes of FP4 (E2M1): 0, 0.5, 1, 1.5, 2, 3, 4, 6.
_FP4_BOUNDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_FP4_MAX, _FP8_MAX = 6.0, 448.0
# Smallest subnormal of FP8 (E4M3).
_FP8_TINY = 2.0**-9
# Blocks without a larger magnitude are rounded to zero.
_INT4_TINY = 1.0 / (1 << 24)


def scale_of(amax: torch.Tensor, largest_code: float) -> torch.Tensor:
    """Returns the scale with which an amax fills a format's codes, float32.

    All zeros have amax 0; the scale is then 1, since readers divide by it.

    Args:
        amax: Largest magnitudes, of any shape.
        largest_code: The value that the format's largest code stands for.
    """
    amax = amax.float()
    # A tensor, because CUDA multiplies by the reciprocal of a number, so that the last bit would depend on the device.
    # It is filled on the device: copying a number there would wait for the GPU.
    divisor = torch.full((), largest_code, device=amax.device)
    return torch.where((amax == 0) | amax.isnan(), 1.0, amax / divisor)


def block_scales(weight: torch.Tensor, scale_2: torch.Tensor, block_size: int) -> torch.Tensor:
    """Returns NVFP4's scales of the blocks of a weight.

    Args:
        weight: (out, in).
        scale_2: float32, one element: the scale of these scales.
        block_size: In-features that share a scale.

    Returns:
        float8_e4m3fn (out, in / block size).
    """
    amax = weight.unflatten(1, (-1, block_size)).abs().amax(-1).float()
    scales = amax / (_FP4_MAX * scale_2)
    return torch.where(scales == 0, 1.0, scales).clamp(_FP8_TINY, _FP8_MAX).to(torch.float8_e4m3fn)


def to_fp8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Rounds to float8_e4m3fn.

    Args:
        weight: Any shape.
        scale: One element, or (out, 1) for a weight (out, in). Without dimensions, the quotient has the weight's data
            type before it is rounded.
    """
    return (weight / scale).to(torch.float8_e4m3fn)


def to_int8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Rounds (out, in) to int8 with float32 scales of the rows, (out)."""
    return (weight / scale[:, None]).round().clamp(-128, 127).to(torch.int8)


def int4_codes(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Rounds (out, in) to INT4, int8 from -8 to 7, with float32 scales (out, blocks)."""
    blocks = weight.unflatten(1, (scale.shape[1], -1)) / scale[:, :, None]
    return blocks.round().clamp(-8, 7).to(torch.int8).flatten(1)


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """Packs INT4 codes, two rows in a byte.

    Args:
        codes: int8 (out, in), from -8 to 7, out even.

    Returns:
        int8 (out / 2, in): two's complement, an even row in the low half of a byte and the next row in the high half.
    """
    return (codes[::2] & 0xF) | (codes[1::2] << 4)


def to_int4(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Rounds (out, in), out even, to packed INT4: see :func:`int4_codes` and :func:`pack_int4`."""
    return pack_int4(int4_codes(weight, scale))


def fp4_codes(weight: torch.Tensor, scale: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
    """Rounds to FP4 (E2M1); ties go to the even code.

    Args:
        weight: (out, in).
        scale: float8_e4m3fn (out, blocks), from :func:`block_scales`.
        scale_2: float32, one element.

    Returns:
        uint8 (out, in), from 0 to 15: sign and magnitude.
    """
    scaled = (weight.unflatten(1, (scale.shape[1], -1)) / (scale.float() * scale_2)[:, :, None]).flatten(1)
    bounds = torch.tensor(_FP4_BOUNDS, device=weight.device)
    magnitude = scaled.abs()
    codes = torch.bucketize(magnitude, bounds, out_int32=True).to(torch.uint8)
    for tie in _FP4_BOUNDS[1::2]:
        codes += magnitude == tie
    return codes | (scaled < 0).to(torch.uint8) << 3


def pack_fp4(codes: torch.Tensor) -> torch.Tensor:
    """Packs FP4 codes, two inputs in a byte.

    Args:
        codes: uint8 (out, in), from 0 to 15, in even.

    Returns:
        uint8 (out, in / 2): an even input in the low half of a byte and the next in the high half.
    """
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def to_nvfp4(weight: torch.Tensor, scale: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
    """Rounds (out, in), in even, to packed FP4: see :func:`fp4_codes` and :func:`pack_fp4`."""
    return pack_fp4(fp4_codes(weight, scale, scale_2))


def fake_quantize_int4(weight: torch.Tensor, block_size: int) -> torch.Tensor:
    """Rounds a weight to INT4 with a scale from the largest magnitude of each block, and back.

    The arithmetic is that of ModelOpt's quantizers, whose scale is the reciprocal of what :func:`scale_of` returns.

    Args:
        weight: (out, in), in a multiple of ``block_size``.
        block_size: In-features that share a scale.

    Returns:
        As ``weight``.
    """
    blocks = weight.unflatten(1, (-1, block_size))
    amax = blocks.abs().amax(-1, keepdim=True).float()
    scale = torch.where(amax > _INT4_TINY, torch.tensor(7.0, device=weight.device) / amax, 0.0)
    codes = (blocks.float() * scale).round_().clamp_(-8, 7)
    return (codes / torch.where(scale == 0, 1.0, scale)).to(weight.dtype).flatten(1)
