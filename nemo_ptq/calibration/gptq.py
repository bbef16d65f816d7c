# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Rounding of a weight that keeps the layer's output, given the Gram matrix of the layer's inputs.

GPTQ (Frantar et al., https://arxiv.org/abs/2210.17323) rounds one input column after the other, and moves the columns
not rounded yet so that they make up for the error. With D the change of the weight it lowers tr(D H D^T), the squared
change of the output over the calibration data, where H = X^T X.

The layer should give the unquantized model's output from the quantized model's inputs. :func:`moved` first moves the
weight toward that (as GPTAQ, https://arxiv.org/abs/2504.02692, does column by column); GPTQ, with H of the quantized
model's inputs, then rounds the moved weight.

Rows of a weight do not depend on one another: under tensor parallelism a rank rounds the output rows it has, given the
whole H; where the inputs are sharded, whole rows are gathered first.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from nemo_ptq.calibration.search import nvfp4_block_scales
from nemo_ptq.errors import PtqError
from nemo_ptq.quantization.grids import FP4, FP8, INT4, INT8, Grid
from nemo_ptq.quantization.kernels import has_kernels
from nemo_ptq.quantization.rounding import fp4_codes, int4_codes, to_fp8, to_int8

DAMPING = 0.01
"""The value added to the diagonal of H, relative to the diagonal's mean."""
# Columns that are rounded before all others are corrected: one product of matrices instead of 128 of vectors.
_BLOCK = 128
# Columns among these that are rounded before the rest of the block is corrected: their rows stay in the cache.
_TILE = 32
# Rows of a triangular matrix that are inverted by solving.
_INVERTED_AT_ONCE = 1024
# Decompositions tried, each with ten times the damping of the one before.
_ATTEMPTS = 4


@dataclass(frozen=True)
class InverseFactor:
    """The decomposed inverse of a damped Gram matrix: what rounding needs to know of a layer's inputs.

    Attributes:
        upper: float32 (in, in), upper triangular U: U^T U is the inverse of H + damping * I with rows and columns in
            ``order``.
        order: int64 (in): the columns in the order in which they are rounded.
        importance: float32 (in), in the weight's own order: 1 / diag of the inverse, the cost of a squared error in a
            column after the best correction of all other columns.
        damping: The value added to the diagonal, relative to the diagonal's mean.
    """

    upper: torch.Tensor
    order: torch.Tensor
    importance: torch.Tensor
    damping: float


@dataclass(frozen=True)
class Rounded:
    """A rounded weight.

    Attributes:
        codes: (out, in), not packed: float8_e4m3fn, int8 of INT8 and INT4, or uint8 of FP4.
        scale: Its scales as they are stored: float32 (1) of FP8, (out) of INT8, (out, groups) of INT4, or
            float8_e4m3fn (out, blocks) of NVFP4.
        weight: float32 (out, in): the values that a reader computes from codes and scales.
        scale_2: float32 (1), of NVFP4 and W4A8: see :class:`~nemo_ptq.quantization.rounded_weight.RoundedWeight`.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    weight: torch.Tensor
    scale_2: torch.Tensor | None = None


@contextmanager
def coarse_products(device: torch.device) -> Iterator[None]:
    """Has a GPU multiply float32 matrices as TF32, at several times the rate.

    Eleven bits are enough for corrections: a thousandth of a correction is a thousandth of a rounding step.
    """
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def inverse_factor(
    gram: torch.Tensor, sort: bool = True, damping: float = DAMPING, dtype: torch.dtype = torch.float64
) -> InverseFactor:
    """Decomposes the inverse of a Gram matrix.

    Inputs that no token used have nothing to compensate with, and are rounded to nearest.

    Args:
        gram: (in, in): X^T X of all calibration tokens, or a multiple of it. Not changed.
        sort: Round the columns with the largest inputs first; otherwise from left to right, as formats need whose
            scales are chosen during the rounding.
        damping: The value added to the diagonal, relative to the diagonal's mean; raised where it is too small.
        dtype: Data type of the arithmetic: float32 takes half the memory, but more damping where H is nearly singular.

    Raises:
        PtqError: If the matrix is not finite.
    """
    diagonal = gram.diagonal().to(dtype)
    mean = diagonal.mean()
    if not (mean.isfinite() and gram.isfinite().all()):
        raise PtqError(
            "the Gram matrix of a layer's inputs is not finite: its activations overflow on the calibration data; "
            "look at the data, or leave the layer unquantized"
        )
    size = len(gram)
    if mean <= 0:
        return unit_factor(size, gram.device)
    order = diagonal.argsort(descending=True, stable=True) if sort else torch.arange(size, device=gram.device)
    # H in reverse order is L L^T; in order, it is R R^T with R upper triangular, whose inverse is the factor wanted.
    reverse = order.flip(0)
    matrix = gram[reverse].index_select(1, reverse).to(dtype).div_(mean)
    matrix.diagonal().add_(damping)
    for _ in range(_ATTEMPTS):
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            break
        matrix.diagonal().add_(9 * damping)
        damping *= 10
    else:
        raise PtqError(
            "the Gram matrix of a layer's inputs is not positive semidefinite, and does not become so with "
            f"{damping / 10:g} of its mean diagonal added: give X^T X, summed in float32 or better"
        )
    del matrix
    factor = lower.flip(0, 1)
    if factor.is_cuda:  # in float64 a GPU takes four times as long: the decomposition is what wants it
        factor = factor.float()
    upper = (_inverse_of_upper(factor) / mean.sqrt()).float()
    importance = torch.empty(size, device=gram.device)
    importance[order] = 1 / upper.square().sum(0)
    return InverseFactor(upper, order, importance, damping)


def _inverse_of_upper(matrix: torch.Tensor) -> torch.Tensor:
    """Inverts an upper triangular matrix, (n, n), by halves: products of matrices, and a third of a solver's work."""
    size = len(matrix)
    if size <= _INVERTED_AT_ONCE:
        identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
        return torch.linalg.solve_triangular(matrix, identity, upper=True)
    first, last = slice(None, size // 2), slice(size // 2, None)
    inverse = torch.zeros_like(matrix, memory_format=torch.contiguous_format)
    inverse[first, first] = _inverse_of_upper(matrix[first, first])
    inverse[last, last] = _inverse_of_upper(matrix[last, last])
    inverse[first, last] = _times_upper(-_upper_times(inverse[first, first], matrix[first, last]), inverse[last, last])
    return inverse


# Columns or rows of a product with a triangular matrix that are computed at once: its zeros beside them are left out.
_PRODUCED_AT_ONCE = 2048


def _times_upper(matrix: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
    """Multiplies (m, n) with an upper triangular (n, n)."""
    product = torch.empty_like(matrix)
    for start in range(0, upper.shape[1], _PRODUCED_AT_ONCE):
        stop = min(start + _PRODUCED_AT_ONCE, upper.shape[1])
        product[:, start:stop] = matrix[:, :stop] @ upper[:stop, start:stop]
    return product


def _upper_times(upper: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Multiplies an upper triangular (n, n) with (n, m)."""
    product = torch.empty_like(matrix, memory_format=torch.contiguous_format)
    for start in range(0, len(upper), _PRODUCED_AT_ONCE):
        stop = min(start + _PRODUCED_AT_ONCE, len(upper))
        product[start:stop] = upper[start:stop, start:] @ matrix[start:]
    return product


def _times_lower(matrix: torch.Tensor, lower: torch.Tensor) -> torch.Tensor:
    """Multiplies (m, n) with a lower triangular (n, n)."""
    product = torch.empty_like(matrix)
    for start in range(0, lower.shape[1], _PRODUCED_AT_ONCE):
        stop = min(start + _PRODUCED_AT_ONCE, lower.shape[1])
        product[:, start:stop] = matrix[:, start:] @ lower[start:, start:stop]
    return product


def unit_factor(size: int, device: torch.device) -> InverseFactor:
    """Returns the factor for unknown inputs: each column is rounded to nearest, and all columns count alike."""
    return InverseFactor(
        torch.eye(size, device=device), torch.arange(size, device=device), torch.ones(size, device=device), 0.0
    )


def predictable_share(
    cross: torch.Tensor, factor: InverseFactor, mean: torch.Tensor, lack: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """Returns the share of a prediction from the quantized model's inputs that is more than a fit to noise.

    Least squares predict dY, the output that the quantized model lacks, from X_q. Even of pure noise, a prediction from
    d inputs explains a share of d / tokens on the data that it was fitted to, and nothing on other data. Only the share
    explained beyond that is real (James and Stein shrink estimates likewise). It is large where weights are rounded
    coarsely, and small where only activations are rounded.

    Args:
        cross: float32 (features, in): dY^T X_q.
        factor: The factor of H = X_q^T X_q.
        mean: The mean of H's diagonal.
        lack: The sum of dY^2.
        tokens: How many there are.

    Returns:
        float32 (), from 0 to 1; 0 where there are fewer than two tokens for each input that varies.
    """
    explained = _times_lower(cross.index_select(1, factor.order), factor.upper.T).square().sum()
    inputs = len(factor.order) - factor.damping * mean * factor.upper.square().sum()
    if explained <= 0 or tokens < 2 * inputs:
        return torch.zeros_like(explained)
    by_chance = inputs * (lack - explained).clamp(min=0) / (tokens - inputs)
    return (1 - by_chance / explained).clamp(min=0)


def moved(weight: torch.Tensor, lack: torch.Tensor, factor: InverseFactor) -> torch.Tensor:
    """Returns the weight whose output includes what it lacks so far, as far as the inputs predict that.

    The result is W + dY^T X_q (H + damping)^-1, with H = X_q^T X_q and dY the wanted output minus W X_q.

    Args:
        weight: float32 (out, in).
        lack: float32 (out, in): dY^T X_q over the tokens of H. Where the output should be that of the unquantized
            model, W X, this is W (X - X_q)^T X_q. Not X^T X_q less H: float32 would lose the difference.
        factor: The factor of H.
    """
    # Twice triangular, in the order of the factor.
    correction = _times_upper(_times_lower(lack.index_select(1, factor.order), factor.upper.T), factor.upper)
    return weight + correction.index_select(1, factor.order.argsort())


def round_columns(
    columns: torch.Tensor, upper: torch.Tensor, step: torch.Tensor, grid: Grid, fp8_scale: torch.Tensor | None = None
) -> torch.Tensor:
    """Rounds some columns one after the other, correcting those that follow among them.

    This is the only function here that takes many small steps; everything around it is matrix products. On a GPU it is
    a Triton kernel.

    Args:
        columns: float32 (columns, out): a slice of the transposed weight; becomes the rounded one, code times step.
        upper: float32 (columns, columns), the factor's block on the diagonal.
        step: float32 (columns or 1, out or 1): the scale of each element.
        grid: The values of the codes.
        fp8_scale: float32, one element, where a reader rounds code times step to FP8 at this scale.

    Returns:
        float32 (columns, out): the error of each column, by which the columns after these are to be corrected.
    """
    if has_kernels(columns):
        from nemo_ptq.calibration import gptq_kernel

        return gptq_kernel.round_columns(columns, upper, step, grid, fp8_scale)
    errors = torch.empty_like(columns)
    step = step.expand(len(columns), -1)
    for index, column in enumerate(columns):
        rounded = grid.nearest(column / step[index]) * step[index]
        read = rounded if fp8_scale is None else FP8.nearest(rounded / fp8_scale) * fp8_scale
        errors[index] = (column - read) / upper[index, index]
        column.copy_(rounded)
        columns[index + 1 :].addr_(upper[index, index + 1 :], errors[index], alpha=-1)
    return errors


# Rounds some columns, (columns, out), by their numbers in the order of the factor: see :func:`round_columns`.
_RoundColumns = Callable[[slice, torch.Tensor], torch.Tensor]


def _round(weight: torch.Tensor, factor: InverseFactor, round_some: _RoundColumns, at_once: int) -> torch.Tensor:
    """Rounds a weight.

    Args:
        weight: (out, in).
        factor: The factor of the inputs' Gram matrix.
        round_some: Rounds some columns, given their values after all corrections so far.
        at_once: How many columns it rounds at a time; on a GPU all of a block.

    Returns:
        float32 (out, in).
    """
    size = weight.shape[1]
    if has_kernels(weight):
        at_once = _BLOCK
    if factor.upper.shape[0] != size:
        raise PtqError(
            f"a weight of shape {tuple(weight.shape)} and a Gram matrix of {factor.upper.shape[0]} inputs: "
            "both must have the layer's in-features; gather the shards of a layer whose inputs are sharded"
        )
    # Gathers whole rows of transposed copies: single elements would take a GPU several times as long.
    columns = weight.float().T.contiguous()[factor.order]
    for start in range(0, size, _BLOCK):
        stop = min(start + _BLOCK, size)
        errors = []
        for first in range(start, stop, at_once):
            here = slice(first, min(first + at_once, stop))
            errors.append(round_some(here, columns[here]))
            if here.stop < stop:
                _correct(columns[here.stop : stop], factor.upper[here, here.stop : stop], errors[-1])
        if stop < size:
            together = errors[0] if len(errors) == 1 else torch.cat(errors)
            _correct(columns[stop:], factor.upper[start:stop, stop:], together)
    return columns[factor.order.argsort()].T.contiguous()


def _correct(columns: torch.Tensor, upper: torch.Tensor, errors: torch.Tensor) -> None:
    """Corrects columns by the errors of some before them, in place."""
    if columns.is_cuda:  # without a copy of all that is left
        columns.addmm_(upper.T, errors, alpha=-1)
    else:
        columns -= upper.T @ errors


def _by_steps(
    factor: InverseFactor,
    grid: Grid,
    steps: Callable[[slice], torch.Tensor],
    fp8_scale: torch.Tensor | None = None,
) -> _RoundColumns:
    """Rounds columns whose steps, float32 (columns or 1, out or 1), are known from their numbers."""
    return lambda here, columns: round_columns(columns, factor.upper[here, here], steps(here), grid, fp8_scale)


def round_fp8(weight: torch.Tensor, factor: InverseFactor, scale: torch.Tensor) -> Rounded:
    """Rounds to FP8 (E4M3) with one scale.

    Args:
        weight: (out, in), any floating-point type.
        factor: The factor of the inputs' Gram matrix.
        scale: float32, one element; of the whole tensor, all shards of it.
    """
    scale = scale.reshape(1)
    rounded = _round(weight, factor, _by_steps(factor, FP8, lambda _: scale[None]), _TILE)
    return Rounded(to_fp8(rounded, scale), scale, rounded)


def round_int8(weight: torch.Tensor, factor: InverseFactor, scale: torch.Tensor) -> Rounded:
    """Rounds to INT8 with a scale for each row.

    Args:
        weight: (out, in), smoothed where the layer has a pre-quantization scale.
        factor: The factor of the inputs' Gram matrix, smoothed likewise: :func:`smoothed`.
        scale: float32 (out).
    """
    rounded = _round(weight, factor, _by_steps(factor, INT8, lambda _: scale[None]), _TILE)
    return Rounded(to_int8(rounded, scale), scale, rounded)


def round_int4(
    weight: torch.Tensor, factor: InverseFactor, scale: torch.Tensor, fp8_scale: torch.Tensor | None = None
) -> Rounded:
    """Rounds to INT4 with a scale for each group of inputs.

    The columns are taken in any order; the groups stay what they are in the file.

    Args:
        weight: (out, in).
        factor: The factor of the inputs' Gram matrix.
        scale: float32 (out, groups), for example from :func:`nemo_ptq.calibration.search.group_scales`.
        fp8_scale: float32, one element, of W4A8: readers round the dequantized weight to FP8 at this scale.
    """
    group_size = weight.shape[1] // scale.shape[1]
    groups = factor.order // group_size
    by_group = scale.T.contiguous()
    by_steps = _by_steps(factor, INT4, lambda here: by_group[groups[here]], fp8_scale)
    rounded = _round(weight, factor, by_steps, _TILE)
    codes = int4_codes(rounded, scale)
    if fp8_scale is not None:
        rounded = FP8.nearest(rounded / fp8_scale) * fp8_scale
    return Rounded(codes, scale, rounded, fp8_scale)


def round_nvfp4(weight: torch.Tensor, factor: InverseFactor, scale_2: torch.Tensor, block_size: int = 16) -> Rounded:
    """Rounds to FP4 (E2M1), and chooses each block's scale when the block is reached, from its corrected values.

    Args:
        weight: (out, in), in-features a multiple of ``block_size``.
        factor: The factor of the inputs' Gram matrix, its columns not sorted.
        scale_2: float32, one element: the scale of the block scales, of the whole tensor.
        block_size: Consecutive in-features that share a scale.

    Raises:
        PtqError: If the factor's columns are sorted, which tears the blocks apart.
    """
    if not torch.equal(factor.order, torch.arange(len(factor.order), device=factor.order.device)):
        raise PtqError("NVFP4 chooses the scales of blocks of neighbours on the way: give inverse_factor(sort=False)")
    scales = torch.empty(weight.shape[0], weight.shape[1] // block_size, device=weight.device)

    def round_blocks(here: slice, columns: torch.Tensor) -> torch.Tensor:
        errors, chosen = _round_nvfp4_columns(columns, factor.upper[here, here], scale_2, block_size)
        scales[:, here.start // block_size : here.stop // block_size] = chosen.T
        return errors

    rounded = _round(weight, factor, round_blocks, block_size)
    scale = scales.to(torch.float8_e4m3fn)
    return Rounded(fp4_codes(rounded, scale, scale_2.reshape(())), scale, rounded, scale_2)


def _round_nvfp4_columns(
    columns: torch.Tensor, upper: torch.Tensor, scale_2: torch.Tensor, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds one block, on a GPU several: see :func:`round_columns`; returns the scales as well, (blocks, out)."""
    if has_kernels(columns):
        from nemo_ptq.calibration import gptq_kernel

        return gptq_kernel.round_nvfp4_columns(columns, upper, scale_2, block_size)
    # The diagonal of the inverse of H without the columns that are rounded already.
    remaining = 1 / upper.square().sum(0)
    chosen = nvfp4_block_scales(columns.T, remaining, scale_2, block_size).float().T
    return round_columns(columns, upper, chosen * scale_2, FP4), chosen


def smoothed(gram: torch.Tensor, pre_quant_scale: torch.Tensor) -> torch.Tensor:
    """Returns the Gram matrix of inputs multiplied with a pre-quantization scale.

    Args:
        gram: (in, in).
        pre_quant_scale: float32 (in).
    """
    return gram * pre_quant_scale[:, None] * pre_quant_scale[None]


def output_error(change: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Returns tr(D G D^T) of each row: the squared change of the layer's output over all tokens.

    Args:
        change: (out, in): D, the weight minus its target.
        gram: (in, in).

    Returns:
        float64 (out).
    """
    change = change.double()
    return ((change @ gram.double()) * change).sum(1)
