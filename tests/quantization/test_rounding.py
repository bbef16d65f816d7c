# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Codes and scales are ModelOpt's, bit for bit, ties and zeros included; and what they stand for is near the weight."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_ptq.quantization.rounding import block_scales, scale_of, to_fp8, to_int4, to_int8, to_nvfp4
from nemo_ptq.verify import dequantize as dq
from tests.ranks import run_ranks

BLOCK = 16


def weights() -> list[torch.Tensor]:
    """Ordinary ones, ones with whole zero rows and blocks, and ones full of ties between two codes."""
    generator = torch.Generator().manual_seed(3)
    usual = torch.randn(64, 128, generator=generator).bfloat16()
    empty = usual.clone()
    empty[3], empty[8:16, 32:48] = 0.0, 0.0
    ties = torch.randint(-28, 29, (64, 128), generator=generator) / 4
    ties[:, ::BLOCK] = 7.0
    return [usual, empty, ties.bfloat16(), usual.half()]


def modelopts(cases: list[torch.Tensor]) -> list[dict[str, Any]]:
    """What ModelOpt makes of weights."""
    from modelopt.torch.export.quant_utils import get_scaling_factor_from_weight, to_quantized_weight
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    found = []
    for weight in cases:
        fp8 = (weight.abs().amax().float() / 448.0).reshape(1)
        rows, blocks = get_scaling_factor_from_weight(weight, 0), get_scaling_factor_from_weight(weight, BLOCK)
        scale_2 = weight.abs().amax().float() / (6.0 * 448.0)
        nvfp4, _ = NVFP4QTensor.get_weights_scaling_factor(weight, BLOCK, scale_2)
        results = {
            "fp8": to_quantized_weight(weight, fp8, "fp8").view(torch.uint8),
            "int8": to_quantized_weight(weight, rows, "int8_sq"),
            "int4": to_quantized_weight(weight, blocks, "int4_awq", block_size=BLOCK).view(torch.int8),
            "nvfp4": to_quantized_weight(weight, nvfp4, "nvfp4", scale_2, BLOCK),
            "block scales": nvfp4.view(torch.uint8),
            "row scales": rows,
        }
        found.append(results)
    return found


def ours(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    rows = scale_of(weight.abs().amax(1), 127.0)
    blocks = scale_of(weight.unflatten(1, (-1, BLOCK)).abs().amax(-1), 7.0)
    scale_2 = scale_of(weight.abs().amax(), 6.0 * 448.0)
    nvfp4 = block_scales(weight, scale_2, BLOCK)
    return {
        "fp8": to_fp8(weight, scale_of(weight.abs().amax(), 448.0).reshape(1)).view(torch.uint8),
        "int8": to_int8(weight, rows),
        "int4": to_int4(weight, blocks),
        "nvfp4": to_nvfp4(weight, nvfp4, scale_2),
        "block scales": nvfp4.view(torch.uint8),
        "row scales": rows,
    }


def test_codes_and_scales_are_modelopts() -> None:
    (expected,) = run_ranks(modelopts, 1, weights())
    for weight, theirs in zip(weights(), expected, strict=True):
        found = ours(weight)
        assert found.keys() == theirs.keys()
        assert [name for name in theirs if not torch.equal(found[name], theirs[name])] == []


@pytest.mark.parametrize("dimensions", [(), (1,)])
def test_a_scale_without_dimensions_leaves_the_quotient_in_the_weights_type(dimensions: tuple[int, ...]) -> None:
    """Of 3 / 0.7 in bfloat16 and in float32, rounded to FP8, the former may be another number."""
    weight = torch.arange(1, 449).bfloat16()
    scale = torch.full(dimensions, 0.7)
    exact = (weight.float() / 0.7).to(torch.float8_e4m3fn) if dimensions else (weight / 0.7).to(torch.float8_e4m3fn)
    assert torch.equal(to_fp8(weight, scale).view(torch.uint8), exact.view(torch.uint8))


@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-6, 1.0, 300.0]))
@settings(max_examples=50, deadline=None)
def test_what_codes_stand_for_is_within_half_a_step(seed: int, size: float) -> None:
    weight = torch.from_numpy(np.random.default_rng(seed).standard_normal((8, 64)) * size).float()
    rows, blocks = scale_of(weight.abs().amax(1), 127.0), scale_of(weight.unflatten(1, (-1, BLOCK)).abs().amax(-1), 7.0)
    int8 = dq.dequantize_int8(to_int8(weight, rows), rows)
    assert ((int8 - weight).abs() <= 0.501 * rows[:, None]).all()
    int4 = dq.dequantize_int4(to_int4(weight, blocks), blocks)
    assert ((int4 - weight).abs() <= 0.501 * blocks.repeat_interleave(BLOCK, dim=1)).all()


def test_what_is_all_zeros_has_the_scale_one() -> None:
    assert torch.equal(scale_of(torch.tensor([0.0, 14.0, torch.nan]), 7.0), torch.tensor([1.0, 2.0, 1.0]))
