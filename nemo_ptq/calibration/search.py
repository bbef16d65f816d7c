# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Scales chosen by the error they make, not by the largest magnitude alone. Pure functions of weights and statistics.

The error of a rounded weight is that of the layer's output, tr(D H D^T) with D the change of the weight and H the Gram
matrix of the inputs. Where GPTQ makes up for a column's error in the other columns, the error that is left is
D_j^2 / (H^-1)_jj (Optimal Brain Surgeon, Hassibi and Stork 1993): the weights by which group scales are compared.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter

import torch

from nemo_ptq.calibration.statistics import product
from nemo_ptq.quantization.grids import FP4, FP8, INT4, INT8, Grid
from nemo_ptq.quantization.kernels import has_kernels
from nemo_ptq.quantization.rounding import scale_of

GROUP_MULTIPLIERS: Sequence[float] = tuple(torch.linspace(1.0, 0.5, 22, dtype=torch.float64).tolist())
"""Factors for the amax of an INT4 group; the first wins a tie."""

ALPHAS: Sequence[float] = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9)
"""SmoothQuant's migration strengths that are compared."""

# Codes of E4M3 around the one whose block just holds its amax, in steps of an eighth of a power of two: down to half,
# which clips, and up to 1.75, which puts the amax on a code below 6 (the grid is finer there).
NVFP4_STEPS = tuple(range(-8, 7))
_E4M3_LARGEST_CODE = 126
_ELEMENTS_AT_ONCE = 1 << 22
# Limits that are tried, from 0, which clips all held-out excess, to 1, which clips nothing; and for how many alphas,
# those with the least errors at limit 0.
_HEADROOMS, _PROMISING = (0.25, 0.5, 0.75, 1.0), 3


def group_scales(weight: torch.Tensor, importance: torch.Tensor, group_size: int) -> torch.Tensor:
    """Chooses the scale of each INT4 group.

    Args:
        weight: (out, in), in-features a multiple of ``group_size``; any floating-point type.
        importance: float32 (in): the weight of a column's squared error, e.g. 1 / diag(H^-1).
        group_size: Consecutive in-features that share a scale.

    Returns:
        float32 (out, in / group_size), positive; 1 where a group is all zeros.
    """
    if has_kernels(weight) and not group_size & (group_size - 1):  # a kernel takes powers of two
        from nemo_ptq.calibration import gptq_kernel

        return gptq_kernel.group_scales(weight.float(), importance.float(), group_size)
    groups = weight.float().unflatten(1, (-1, group_size))
    counts = importance.float().unflatten(0, (-1, group_size))
    full = groups.abs().amax(-1) / INT4.largest
    full = torch.where(full == 0, 1.0, full)
    best = full * GROUP_MULTIPLIERS[0]
    least = torch.full_like(best, torch.inf)
    for multiplier in GROUP_MULTIPLIERS:
        scale = full * multiplier
        error = _weighted_error(groups, scale[..., None], counts, INT4)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


def nvfp4_block_scales(
    weight: torch.Tensor, importance: torch.Tensor, scale_2: torch.Tensor, block_size: int = 16
) -> torch.Tensor:
    """Chooses the scale of each NVFP4 block among the E4M3 codes around the one that just holds the block's amax.

    Args:
        weight: (out, in), in-features a multiple of ``block_size``; any floating-point type.
        importance: float32 (in): the weight of a column's squared error.
        scale_2: float32, one element: the scale of these scales.
        block_size: Consecutive in-features that share a scale.

    Returns:
        float8_e4m3fn (out, in / block_size), positive; 1 where a block is all zeros.
    """
    # All candidates at once, of some rows at a time.
    at_once = max(1, _ELEMENTS_AT_ONCE // weight.shape[1])
    counts = importance.float().unflatten(0, (-1, block_size))
    return torch.cat(
        [_block_scales(rows.unflatten(1, (-1, block_size)), counts, scale_2) for rows in weight.split(at_once)]
    )


def _block_scales(blocks: torch.Tensor, counts: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
    blocks = blocks.float()
    amax = blocks.abs().amax(-1)
    full = (amax / (FP4.largest * scale_2)).clamp(max=FP8.largest).to(torch.float8_e4m3fn)
    # The codes of positive E4M3 numbers are in the order of the numbers.
    steps = torch.tensor(NVFP4_STEPS, dtype=torch.int16, device=blocks.device).reshape(-1, 1, 1)
    codes = (full.view(torch.uint8).to(torch.int16) + steps).clamp(1, _E4M3_LARGEST_CODE)
    candidates = codes.to(torch.uint8).view(torch.float8_e4m3fn)
    error = _weighted_error(blocks, (candidates.float() * scale_2)[..., None], counts, FP4)
    chosen = codes.gather(0, error.argmin(0, keepdim=True))[0].to(torch.uint8).view(torch.float8_e4m3fn)
    return torch.where(amax == 0, 1.0, chosen.float()).to(torch.float8_e4m3fn)


def _weighted_error(groups: torch.Tensor, scale: torch.Tensor, counts: torch.Tensor, grid: Grid) -> torch.Tensor:
    difference = grid.nearest(groups / scale).mul_(scale).sub_(groups)
    return difference.square_().mul_(counts).sum(-1)


def smoothing_scale(channel_amax: torch.Tensor, weight_amax: torch.Tensor, alpha: float) -> torch.Tensor:
    """Returns SmoothQuant's pre-quantization scale (Xiao et al., https://arxiv.org/abs/2211.10438), as ModelOpt has it.

    Args:
        channel_amax: float32 (in): largest magnitude of each input channel.
        weight_amax: float32 (in): largest magnitude of each weight column.
        alpha: Between 0, which looks at the weight alone, and 1, which looks at the inputs alone.

    Returns:
        float32 (in): the factors by which the input is multiplied and the weight divided; 1 for a channel without
        magnitude.
    """
    scale = (weight_amax.pow(1 - alpha) / channel_amax.pow(alpha)).clamp(1e-4, 1e4)
    return torch.where((channel_amax == 0) | (weight_amax == 0), 1.0, scale)


@dataclass(frozen=True)
class Smoothing:
    """What INT8 needs to know of a layer's inputs.

    Attributes:
        alpha: SmoothQuant's migration strength.
        pre_quant_scale: float32 (in).
        input_amax: float32 (1): the value that the largest code of the scaled input stands for.
        error: Squared error of the output relative to its square, on the held-out tokens.
    """

    alpha: float
    pre_quant_scale: torch.Tensor
    input_amax: torch.Tensor
    error: float


def choose_smoothing(
    weight: torch.Tensor,
    inputs: torch.Tensor,
    channel_amax: torch.Tensor,
    held_out_amax: torch.Tensor,
    alphas: Sequence[float] = ALPHAS,
    constrain: Callable[[torch.Tensor], torch.Tensor] = lambda scale: scale,
) -> Smoothing:
    """Chooses alpha for one layer, and the limit of its scaled inputs, by the error of the output on held-out tokens.

    Candidate scales come from one part of the samples; tokens of the other part then exceed the limit, as a user's
    will. For the most promising alphas, the error decides between clipping these and widening every token's step.

    The error is the mean of the tokens' relative errors plus the relative error of all tokens together: the first is
    that of an ordinary token, the second that of the few with massive activations, on which attention leans.

    Args:
        weight: (out, in), not smoothed.
        inputs: (tokens, in): some hundreds of tokens, of samples held out.
        channel_amax: float32 (in): largest magnitude of each channel over the samples that give the scale.
        held_out_amax: float32 (in): likewise, over the samples held out.
        alphas: Candidates; the first wins a tie.
        constrain: Gives the scale that can be stored for a scale, float32 (in) each.
    """
    weight, inputs = weight.float(), inputs.float()
    weight_amax, amax = weight.abs().amax(0), torch.maximum(channel_amax, held_out_amax)
    exact = inputs @ weight.T
    size = exact.square().sum(1)
    # Numbers instead of a mask, and errors that stay on the device, avoid waiting for a GPU at each candidate.
    used = size.nonzero()[:, 0]
    scales = [constrain(smoothing_scale(channel_amax, weight_amax, alpha)) for alpha in alphas]
    limits = torch.stack([(channel_amax * scale).amax() for scale in scales])
    excesses = torch.stack([(amax * scale).amax() for scale in scales]) / limits
    exceeds = (excesses > 1).tolist()

    def compare(places: Sequence[int], shares: Sequence[float]) -> list[tuple[float, int, torch.Tensor]]:
        """Returns the error of each candidate, the place of its alpha, and its limit."""
        tried, errors = [], []
        for place in places:
            smooth, scaled = weight / scales[place], inputs * scales[place]
            rows = scale_of(smooth.abs().amax(1, keepdim=True), INT8.largest)
            codes = _operand(INT8.nearest(smooth / rows)).T
            for share in shares:
                limit = limits[place] * excesses[place] ** share if share else limits[place]
                step = scale_of(limit, INT8.largest)
                products = product(_operand(INT8.nearest(scaled / step)), codes)
                change = torch.addcmul(exact, products, rows.T * step, value=-1).square().sum(1)
                errors.append((change / size)[used].mean() + change.sum() / size.sum())
                tried.append((place, limit))
        values = torch.stack(errors).tolist()
        return [(value, *candidate) for value, candidate in zip(values, tried, strict=True)]

    found = sorted(compare(range(len(scales)), (0.0,)), key=itemgetter(0))
    promising = [place for _, place, _ in found[:_PROMISING] if exceeds[place]]
    if promising:
        found += compare(promising, _HEADROOMS)
    error, place, limit = min(found, key=itemgetter(0))
    return Smoothing(alphas[place], scales[place], limit.reshape(1), error)


def _operand(codes: torch.Tensor) -> torch.Tensor:
    """INT8 values, float32, as they are multiplied: a GPU does so at bfloat16's rate, which holds them exactly."""
    return codes.bfloat16() if codes.is_cuda else codes
