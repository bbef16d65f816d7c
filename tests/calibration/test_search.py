# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Scales chosen by error, against every candidate tried one by one."""

import pytest
import torch

from nemo_ptq.calibration.search import (
    ALPHAS,
    GROUP_MULTIPLIERS,
    choose_smoothing,
    group_scales,
    nvfp4_block_scales,
    smoothing_scale,
)
from nemo_ptq.quantization.grids import FP4, INT4
from nemo_ptq.quantization.rounding import block_scales, scale_of


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def group_error(group: torch.Tensor, importance: torch.Tensor, scale: float) -> float:
    return float(((INT4.nearest(group / scale) * scale - group).square() * importance).sum())


def test_group_multipliers_are_the_documented_ones() -> None:
    assert len(GROUP_MULTIPLIERS) == 22
    assert (GROUP_MULTIPLIERS[0], GROUP_MULTIPLIERS[-1]) == (1.0, 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_group_has_the_best_multiplier(dtype: torch.dtype) -> None:
    weight, importance = normal(6, 64).to(dtype), normal(64, seed=1).exp()
    found = group_scales(weight, importance, 16)
    assert found.dtype == torch.float32 and found.shape == (6, 4)
    for row in range(6):
        for group in range(4):
            values, counts = weight[row, group * 16 :][:16].float(), importance[group * 16 :][:16]
            errors = [group_error(values, counts, float(values.abs().max() / 7) * m) for m in GROUP_MULTIPLIERS]
            assert group_error(values, counts, float(found[row, group])) == pytest.approx(min(errors), rel=1e-4)


def test_importance_decides_which_columns_are_kept() -> None:
    weight = torch.tensor([[8.0, *[0.45] * 15]])
    outlier_counts = torch.tensor([1e6] + [1.0] * 15)
    outlier_does_not = torch.tensor([1e-6] + [1.0] * 15)
    assert group_error(weight[0], outlier_counts, float(group_scales(weight, outlier_counts, 16))) < 1e5
    assert group_scales(weight, outlier_does_not, 16) < group_scales(weight, outlier_counts, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_scales_are_the_best_of_their_neighbourhood(dtype: torch.dtype) -> None:
    weight, importance = normal(5, 64).to(dtype), normal(64, seed=1).exp()
    scale_2 = scale_of(weight.abs().amax(), 6.0 * 448.0)
    found = nvfp4_block_scales(weight, importance, scale_2)
    assert found.dtype == torch.float8_e4m3fn and found.shape == (5, 4)

    def errors(scale: torch.Tensor) -> torch.Tensor:
        step = (scale.float() * scale_2).repeat_interleave(16, 1)
        return ((FP4.nearest(weight / step) * step - weight).square() * importance).unflatten(1, (-1, 16)).sum(-1)

    amax_scale = block_scales(weight.float(), scale_2.reshape(()), 16)
    ours = errors(found)
    for code in range(1, 127):
        candidate = torch.tensor(code, dtype=torch.uint8).view(torch.float8_e4m3fn).float().expand(5, 4)
        near = (candidate >= 0.51 * amax_scale.float()) & (candidate <= 1.7 * amax_scale.float())
        assert (ours <= errors(candidate) * (1 + 1e-4))[near].all()
    assert (ours <= errors(amax_scale) * (1 + 1e-4)).all() and ours.sum() < 0.9 * errors(amax_scale).sum()


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_zeros_and_extremes_have_usable_scales(size: float) -> None:
    weight = torch.zeros(2, 32)
    weight[0, :16] = normal(16) * size
    importance = torch.ones(32)
    groups = group_scales(weight, importance, 16)
    blocks = nvfp4_block_scales(weight, importance, scale_of(weight.abs().amax(), 6.0 * 448.0)).float()
    for scale in (groups, blocks):
        assert scale.isfinite().all() and (scale > 0).all()
        assert torch.equal(scale[1], torch.ones(2)) and scale[0, 1] == 1


def test_smoothing_scale_is_modelopts() -> None:
    amax, weight_amax = torch.tensor([4.0, 0.0, 1e-30]), torch.tensor([0.25, 1.0, 1.0])
    found = smoothing_scale(amax, weight_amax, 0.5)
    torch.testing.assert_close(found, torch.tensor([0.25**0.5 / 2.0, 1.0, 1e4]))


def smoothing_problem(outlier: float, overshoot: float = 1.0) -> tuple[torch.Tensor, ...]:
    """Inputs of which one in sixteen channels is larger; held-out samples overshoot in a quiet channel."""
    inputs = normal(2000, 64)
    inputs[:, ::16] *= outlier
    held_out = inputs[1000:].clone()
    held_out[0, 3] = inputs[:1000, 3].abs().amax() * overshoot
    return normal(32, 64, seed=2) * 0.05, inputs[:1000], held_out


def int8_error(weight: torch.Tensor, inputs: torch.Tensor, scale: torch.Tensor, limit: torch.Tensor) -> float:
    """What INT8 does to the output: the mean of the tokens' relative errors, and that of all tokens together."""
    step = limit / 127
    smooth = weight / scale
    rows = smooth.abs().amax(1, keepdim=True) / 127
    rounded = (smooth / rows).round() * rows
    given = (inputs * scale / step).round().clamp(-128, 127) * step
    exact = inputs @ weight.T
    change = (exact - given @ rounded.T).square().sum(1)
    return float((change / exact.square().sum(1)).mean() + change.sum() / exact.square().sum())


@pytest.mark.parametrize("outlier", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("overshoot", [1.0, 5.0])
def test_the_smoothing_chosen_is_the_best(outlier: float, overshoot: float) -> None:
    weight, fit, held_out = smoothing_problem(outlier, overshoot)
    amax, held_out_amax = fit.abs().amax(0), held_out.abs().amax(0)
    found = choose_smoothing(weight.bfloat16(), held_out, amax, held_out_amax)
    weight = weight.bfloat16().float()
    errors = []
    for alpha in ALPHAS:
        scale = smoothing_scale(amax, weight.abs().amax(0), alpha)
        clips_all = (amax * scale).amax()
        clips_none = torch.maximum(clips_all, (held_out_amax * scale).amax())
        limits = [clips_all ** (1 - share / 4) * clips_none ** (share / 4) for share in range(5)]
        errors += [int8_error(weight, held_out, scale, limit) for limit in limits]
    ours = int8_error(weight, held_out, found.pre_quant_scale, found.input_amax)
    assert found.error == pytest.approx(ours, rel=1e-2)
    assert found.error == pytest.approx(min(errors), rel=1e-2) and found.error < 0.95 * max(errors)
    assert torch.equal(found.pre_quant_scale, smoothing_scale(amax, weight.abs().amax(0), found.alpha))


def test_massive_tokens_have_headroom() -> None:
    """A hundredth of the tokens has most of the output's square: clipping them costs more than a wider step."""
    weight, fit, held_out = smoothing_problem(1.0)
    held_out[:10] *= 12
    amax, largest = fit.abs().amax(0), held_out.abs().amax(0)
    found = choose_smoothing(weight, held_out, amax, largest, alphas=[0.5])
    assert found.input_amax > 3 * (amax * found.pre_quant_scale).amax()


def test_without_a_token_the_first_alpha_stands() -> None:
    weight, zeros = normal(8, 16), torch.zeros(16)
    found = choose_smoothing(weight, torch.zeros(4, 16), zeros, zeros)
    assert found.alpha == ALPHAS[0]
    assert torch.equal(found.pre_quant_scale, torch.ones(16))
