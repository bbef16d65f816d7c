# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""SmoothQuant's scales (Xiao et al., https://arxiv.org/abs/2211.10438), in ModelOpt's arithmetic, bit for bit."""

import torch

_SCALE_RANGE = (1e-4, 1e4)
# A channel that is never larger than this is not smoothed.
_TINY = 1.0 / (1 << 31)


def smoothing_scale(channel_amax: torch.Tensor, weight_amax: torch.Tensor, alpha: float) -> torch.Tensor:
    """Returns the factors by which a linear layer's input is multiplied and its weight divided.

    Args:
        channel_amax: float32 (in-features): largest magnitude of each input channel.
        weight_amax: (in-features), the weight's data type: largest magnitude of each weight column.
        alpha: Migration strength: 0 leaves the difficulty with the activations, 1 moves all of it to the weights.

    Returns:
        float32 (in-features).
    """
    scale = weight_amax.pow(1 - alpha) / channel_amax.pow(alpha)
    scale[scale.isnan()] = 1  # neither activations nor weights: 0 / 0, which ModelOpt leaves
    if scale.min() <= _TINY:
        scale[channel_amax <= _TINY] = 1
    return scale.clamp(*_SCALE_RANGE)


def smoothed_amax(channel_amax: torch.Tensor, pre_quant_scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns the largest magnitude of an input once it is multiplied with its pre-quantization scale.

    Args:
        channel_amax: float32 (in-features): largest magnitude of each channel before that.
        pre_quant_scale: float32 (in-features).
        dtype: Data type of the activations.

    Returns:
        (), in that type.
    """
    return (channel_amax.to(dtype) * pre_quant_scale).amax().to(dtype)
