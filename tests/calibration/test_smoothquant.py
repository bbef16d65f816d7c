# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""SmoothQuant's scales follow its formula, and channels that say nothing are left alone."""

import pytest
import torch

from nemo_ptq.calibration.smoothquant import smoothed_amax, smoothing_scale


def amaxes() -> tuple[torch.Tensor, torch.Tensor]:
    """Of an activation's channels, and of a weight's columns."""
    generator = torch.Generator().manual_seed(0)
    activation, weight = torch.rand(2, 64, generator=generator) + 0.01
    return activation * 30, weight.bfloat16()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_the_scale_is_the_papers(alpha: float) -> None:
    activation, weight = amaxes()
    expected = weight.double() ** (1 - alpha) / activation.double() ** alpha
    found = smoothing_scale(activation, weight, alpha)
    assert found.dtype == torch.float32
    # The weight's power is rounded to bfloat16.
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=0.0)


def test_half_and_half_makes_activations_and_weights_alike() -> None:
    activation, weight = amaxes()
    scale = smoothing_scale(activation, weight, 0.5)
    torch.testing.assert_close(activation * scale, weight.float() / scale, rtol=2**-6, atol=0.0)


def test_channels_without_activations_are_not_smoothed() -> None:
    activation, weight = amaxes()
    activation[3] = 0.0
    scale = smoothing_scale(activation, weight, 1.0)
    assert torch.isfinite(scale).all()
    assert float(scale.max()) <= 1e4
    weight[3] = 0.0
    assert float(smoothing_scale(activation, weight, 0.5)[3]) == 1.0


def test_scales_stay_within_bounds() -> None:
    activation, weight = torch.tensor([1e-7, 1e7]), torch.tensor([1.0, 1.0]).bfloat16()
    assert smoothing_scale(activation, weight, 1.0).tolist() == pytest.approx([1e4, 1e-4])


def test_the_smoothed_amax_is_that_of_smoothed_channels() -> None:
    channels, scale = torch.tensor([8.0, 2.0, 0.5]), torch.tensor([0.25, 3.0, 1.0])
    found = smoothed_amax(channels, scale, torch.bfloat16)
    assert (float(found), found.shape, found.dtype) == (6.0, (), torch.bfloat16)
