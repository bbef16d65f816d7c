# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""From the codes in the files back to numbers, and what a server does to activations: pure functions over tensors.

``o`` and ``i`` are the output and input features of a linear layer and ``g`` its group size. Activations are rounded to
their quantized grid and returned as float32 ("fake quantization"), which is what the integer or FP8 kernels compute up
to the order of summation.
"""

import torch

E4M3_MAX = 448.0
E2M1_MAX = 6.0
INT8_MAX = 127.0
# The least scale that vLLM's kernels give a token in FP8.
_LEAST_FP8_TOKEN = 1.0 / (E4M3_MAX * 512.0)

# Values of the eight E2M1 magnitudes; bit 3 of a code is the sign.
_E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """Unpacks int8 or uint8 (o/2, i) into two's complement int8 (o, i); the low nibble is the even output row."""
    # Shifting an int8 to the right keeps its sign: a nibble shifted up and down again is sign-extended.
    packed = packed.view(torch.int8)
    return torch.stack(((packed << 4) >> 4, packed >> 4), dim=1).flatten(0, 1)


def unpack_uint4(packed: torch.Tensor) -> torch.Tensor:
    """Unpacks uint8 (o, i/2) into uint8 (o, i) codes from 0 to 15; the low nibble is the even input column."""
    return torch.stack((packed & 0xF, packed >> 4), dim=2).flatten(1, 2)


def unpack_e2m1(packed: torch.Tensor) -> torch.Tensor:
    """Unpacks uint8 (o, i/2) into float32 (o, i) E2M1 values."""
    values = torch.tensor(_E2M1_MAGNITUDES, device=packed.device)
    return torch.cat((values, -values))[unpack_uint4(packed).long()]


def round_e4m3(values: torch.Tensor) -> torch.Tensor:
    """Rounds float32 to the nearest finite E4M3 value, saturating at +-448."""
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()


def round_e2m1(values: torch.Tensor) -> torch.Tensor:
    """Rounds float32 to the nearest E2M1 value, ties to the even mantissa, saturating at +-6."""
    magnitude = values.abs()
    # E2M1 has two codes in each power of two from 1 on: steps of 0.5, 1 and 2.
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return ((values / step).round() * step).clamp(-E2M1_MAX, E2M1_MAX)


def dequantize_fp8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """FP8: float8_e4m3fn (o, i) times float32 (1,)."""
    return weight.float() * scale


def dequantize_int8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """W8A8_SQ_PER_CHANNEL: int8 (o, i) times float32 (o,) or (o, 1), one scale for each output row."""
    return weight.float() * scale.reshape(-1, 1)


def dequantize_rows(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """FP8 or INT8 (o, i) times float32 (o,) or (o, 1), one scale for each output row."""
    return weight.float() * scale.reshape(-1, 1)


def dequantize_int4(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """W4A16_AWQ: int8 (o/2, i) of packed int4 times float32 (o, i/g), one scale for each group of inputs."""
    return _times_groups(unpack_int4(packed), scale)


def dequantize_packed(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """pack-quantized: int32 (o, i/8) times (o, i/g), one scale for each group of inputs.

    A number holds eight consecutive inputs with 8 added to each, the first of them in the lowest bits.
    """
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    return _times_groups((((packed[..., None] >> shifts) & 0xF) - 8).flatten(1), scale)


def _times_groups(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return codes.float() * scale.float().repeat_interleave(codes.shape[1] // scale.shape[1], dim=1)


def dequantize_w4a8(packed: torch.Tensor, scale: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
    """W4A8_AWQ: int4 weights as the server computes with them, in FP8 at the per-tensor scale float32 (1,)."""
    return round_e4m3(dequantize_int4(packed, scale) / scale_2) * scale_2


def dequantize_nvfp4(packed: torch.Tensor, scale: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
    """NVFP4: uint8 (o, i/2) of packed E2M1 times E4M3 (o, i/16) block scales times the float32 () global scale."""
    values = unpack_e2m1(packed)
    block_scale = scale.float() * scale_2
    return values * block_scale.repeat_interleave(values.shape[1] // scale.shape[1], dim=1)


def dequantize_nvfp4_divided(packed: torch.Tensor, scale: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """nvfp4-pack-quantized: as NVFP4, with a float32 (1,) global scale that block scales are divided by."""
    return dequantize_nvfp4(packed, scale, 1.0 / global_scale)


def fake_quantize_fp8(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """FP8 with one static scale, float32 (1,)."""
    return round_e4m3(values / scale) * scale


def fake_quantize_int8(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """INT8 with one static scale, float32 (1,)."""
    return (values / scale).round().clamp(-128, 127) * scale


def fake_quantize_fp8_tokens(values: torch.Tensor) -> torch.Tensor:
    """FP8 with the scale of each token, (..., i), from its own largest magnitude."""
    scale = (values.abs().amax(-1, keepdim=True) / E4M3_MAX).clamp(min=_LEAST_FP8_TOKEN)
    return round_e4m3(values / scale) * scale


def fake_quantize_int8_tokens(values: torch.Tensor) -> torch.Tensor:
    """INT8 with the scale of each token, (..., i), from its own largest magnitude."""
    scale = values.abs().amax(-1, keepdim=True) / INT8_MAX
    scale = torch.where(scale == 0, 1.0, scale)
    return (values / scale).round().clamp(-128, 127) * scale


def fake_quantize_nvfp4_divided(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """As :func:`fake_quantize_nvfp4`, with a float32 (1,) global scale that is the reciprocal of its."""
    return fake_quantize_nvfp4(values, 1.0 / scale)


def fake_quantize_nvfp4(values: torch.Tensor, scale: torch.Tensor, block_size: int = 16) -> torch.Tensor:
    """NVFP4 with a static global scale, float32 (), and E4M3 block scales taken from each 16 values themselves.

    Args:
        values: float32 (..., i), i a multiple of ``block_size``.
        scale: Largest magnitude of the calibration over 448 * 6.
        block_size: Values that share a block scale.
    """
    blocks = values.unflatten(-1, (-1, block_size))
    block_scale = round_e4m3(blocks.abs().amax(-1, keepdim=True) / (E2M1_MAX * scale)) * scale
    # A block that is all zero, or too small for any E4M3 scale, is zero.
    quotient = torch.where(block_scale > 0, blocks / block_scale, 0.0)
    return (round_e2m1(quotient) * block_scale).flatten(-2)
