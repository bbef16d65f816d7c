# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Rounding of a weight that keeps the layer's output, given the Gram matrix of the layer's inputs.

GPTQ (Frantar et al., https://arxiv.org/abs/2210.17323) rounds one input column after the other, and moves the columns
not rounded yet so that they make up for the error. With D the change of the weight it lowers tr(D H D^T), the squared
change of the output over the calibration data, where H = X^T X.

What the layer should give is the output of the unquantized model, and what it gets are the inputs of the quantized
one. :func:`moved` moves the weight toward that first (as GPTAQ, https://arxiv.org/abs/2504.02692, does column by
column); GPTQ with H of the quantized model's inputs then rounds what it returns.

Rows of a weight do not depend on one another: under tensor parallelism a rank rounds the output rows it has, given the
whole H; where the inputs are sharded, whole rows are gathered first.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch

from nemo_ptq.calibration.search import nvfp4_block_scales
from nemo_ptq.errors import PtqError
from nemo_ptq.quantization.grids import FP4, FP8, INT4, INT8, Grid
from nemo_ptq.quantization.rounding import fp4_codes, int4_codes, to_fp8, to_int8

DAMPING = 0.01
"""What is added to the diagonal of H, relative to its mean."""
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
    """The inverse of a damped Gram matrix, decomposed: what rounding wants to know of a layer's inputs.

    Attributes:
        upper: float32 (in, in), upper triangular U: U^T U is the inverse of H + damping * I with rows and columns in
            ``order``.
        order: int64 (in): the columns in the order in which they are rounded.
        importance: float32 (in), in the weight's own order: 1 / diag of the inverse, what a squared error of a column
            costs after the best correction of all other columns.
        damping: What was added to the diagonal, relative to its mean.
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
        weight: float32 (out, in): what a reader of codes and scales computes with.
        error: float32 (out): tr(D (H + damping) D^T) of each row.
        scale_2: float32 (1), of NVFP4 and W4A8: see :class:`~nemo_ptq.quantization.rounded_weight.RoundedWeight`.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    weight: torch.Tensor
    error: torch.Tensor
    scale_2: torch.Tensor | None = None


@contextmanager
def coarse_products(device: torch.device) -> Iterator[None]:
    """Has a GPU multiply float32 matrices as TF32, at several times the rate.

    Corrections can do with 11 bits: a thousandth of a correction is a thousandth of a rounding step.
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
        sort: Round the columns with the largest inputs first; otherwise from left to right, as formats want whose
            scales are chosen on the way.
        damping: What is added to the diagonal, relative to its mean; more where that is not enough.
        dtype: The arithmetic's: float32 takes half the memory, and more damping where H is nearly singular.

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
    matrix = gram[reverse[:, None], reverse].to(dtype).div_(mean)
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
    upper = _inverse_of_upper(lower.flip(0, 1)) / mean.sqrt()
    importance = torch.empty_like(diagonal)
    importance[order] = 1 / upper.square().sum(0)
    return InverseFactor(upper.float(), order, importance.float(), damping)


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
    inverse[first, last] = -(inverse[first, first] @ matrix[first, last]) @ inverse[last, last]
    return inverse


def unit_factor(size: int, device: torch.device) -> InverseFactor:
    """Returns that of inputs of which nothing is known: each column is rounded to nearest, and counts alike."""
    return InverseFactor(
        torch.eye(size, device=device), torch.arange(size, device=device), torch.ones(size, device=device), 0.0
    )


def predictable_share(
    cross: torch.Tensor, factor: InverseFactor, mean: torch.Tensor, lack: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """Returns which part of a prediction from the quantized model's inputs is more than a fit to chance.

    What the quantized model lacks, dY, is predicted from X_q by least squares. Of noise, a prediction from d inputs
    explains d / tokens on the data that it was fitted to, and nothing of other data. What is explained beyond that is
    what the prediction is worth (as James and Stein shrink an estimate). It is most of it where weights are rounded
    coarsely, and little where the rounding of activations is all that there is.

    Args:
        cross: float32 (features, in): dY^T X_q.
        factor: Of H = X_q^T X_q.
        mean: The mean of H's diagonal.
        lack: The sum of dY^2.
        tokens: How many there are.

    Returns:
        float32 (), from 0 to 1; 0 where there are fewer than two tokens for each input that varies.
    """
    explained = (cross[:, factor.order] @ factor.upper.T).square().sum()
    inputs = len(factor.order) - factor.damping * mean * factor.upper.square().sum()
    if explained <= 0 or tokens < 2 * inputs:
        return torch.zeros_like(explained)
    by_chance = inputs * (lack - explained).clamp(min=0) / (tokens - inputs)
    return (1 - by_chance / explained).clamp(min=0)


def moved(weight: torch.Tensor, lack: torch.Tensor, factor: InverseFactor) -> torch.Tensor:
    """Returns the weight that gives what its output lacks as well, as far as the inputs predict that.

    That is W + dY^T X_q (H + damping)^-1, with H = X_q^T X_q and dY what the output should be less W X_q.

    Args:
        weight: float32 (out, in).
        lack: float32 (out, in): dY^T X_q over the tokens of H. Where the output should be that of the unquantized
            model, W X, this is W (X - X_q)^T X_q. Not X^T X_q less H: float32 would lose the difference.
        factor: Of H.
    """
    # Twice triangular, in the order of the factor.
    correction = (lack[:, factor.order] @ factor.upper.T) @ factor.upper
    found = weight.clone()
    found[:, factor.order] += correction
    return found


def round_columns(
    columns: torch.Tensor, upper: torch.Tensor, step: torch.Tensor, grid: Grid, fp8_scale: torch.Tensor | None = None
) -> torch.Tensor:
    """Rounds some columns one after the other, correcting those that follow among them.

    The one function here whose cost is in its many small steps; everything around it is products of matrices. On a GPU
    it is a kernel of Triton's.

    Args:
        columns: float32 (columns, out): a slice of the transposed weight; becomes the rounded one, code times step.
        upper: float32 (columns, columns), the factor's block on the diagonal.
        step: float32 (columns or 1, out or 1): the scale of each element.
        grid: The values of the codes.
        fp8_scale: float32, one element, where a reader rounds code times step to FP8 at this scale.

    Returns:
        float32 (columns, out): the error of each column, by which the columns after these are to be corrected.
    """
    if columns.is_cuda and _has_triton():
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


def _block_scales(columns: torch.Tensor, importance: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
    """The NVFP4 scale of one block of each row: float32 (out), from (block, out)."""
    if columns.is_cuda and _has_triton():
        from nemo_ptq.calibration import gptq_kernel

        return gptq_kernel.nvfp4_block_scales(columns, importance, scale_2)
    return nvfp4_block_scales(columns.T, importance, scale_2, len(columns)).float()[:, 0]


@cache
def _has_triton() -> bool:
    """Whether kernels can be built: Triton comes with torch for CUDA, and wants a C compiler for what calls them."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return "CC" in os.environ or any(map(shutil.which, ("cc", "gcc", "clang")))


# Gives the steps of some columns, float32 (columns or 1, out or 1), from their numbers in the order of the factor and
# what they have become when they are reached, (columns, out).
_Steps = Callable[[slice, torch.Tensor], torch.Tensor]


def _round(
    weight: torch.Tensor,
    factor: InverseFactor,
    grid: Grid,
    steps: _Steps,
    group: int | None = None,
    fp8_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds a weight, so many columns at a time as have their steps chosen together, or as suit the device.

    Returns:
        The rounded weight, float32 (out, in), and the error of each row, float32 (out).
    """
    size = weight.shape[1]
    if group is None:
        group = _BLOCK if weight.is_cuda and _has_triton() else _TILE
    if factor.upper.shape[0] != size:
        raise PtqError(
            f"a weight of shape {tuple(weight.shape)} and a Gram matrix of {factor.upper.shape[0]} inputs: "
            "both must have the layer's in-features; gather the shards of a layer whose inputs are sharded"
        )
    columns = weight.float().T[factor.order].contiguous()
    total = torch.zeros(weight.shape[0], device=weight.device)
    for start in range(0, size, _BLOCK):
        stop = min(start + _BLOCK, size)
        block = columns[start:stop]
        errors = torch.empty_like(block)
        for first in range(start, stop, group):
            last = min(first + group, stop)
            here = slice(first, last)
            found = round_columns(columns[here], factor.upper[here, here], steps(here, columns[here]), grid, fp8_scale)
            errors[first - start : last - start] = found
            columns[last:stop] -= factor.upper[here, last:stop].T @ found
        columns[stop:] -= factor.upper[start:stop, stop:].T @ errors
        total += errors.square().sum(0)
    rounded = torch.empty_like(weight, dtype=torch.float32)
    rounded[:, factor.order] = columns.T
    return rounded, total


def round_fp8(weight: torch.Tensor, factor: InverseFactor, scale: torch.Tensor) -> Rounded:
    """Rounds to FP8 (E4M3) with one scale.

    Args:
        weight: (out, in), any floating-point type.
        factor: Of the Gram matrix of the inputs.
        scale: float32, one element; of the whole tensor, all shards of it.
    """
    scale = scale.reshape(1)
    rounded, error = _round(weight, factor, FP8, lambda *_: scale[None])
    return Rounded(to_fp8(rounded, scale), scale, rounded, error)


def round_int8(weight: torch.Tensor, factor: InverseFactor, scale: torch.Tensor) -> Rounded:
    """Rounds to INT8 with a scale for each row.

    Args:
        weight: (out, in), smoothed where the layer has a pre-quantization scale.
        factor: Of the Gram matrix of the inputs, smoothed likewise: :func:`smoothed`.
        scale: float32 (out).
    """
    rounded, error = _round(weight, factor, INT8, lambda *_: scale[None])
    return Rounded(to_int8(rounded, scale), scale, rounded, error)


def round_int4(
    weight: torch.Tensor, factor: InverseFactor, scale: torch.Tensor, fp8_scale: torch.Tensor | None = None
) -> Rounded:
    """Rounds to INT4 with a scale for each group of inputs.

    The columns are taken in any order; the groups stay what they are in the file.

    Args:
        weight: (out, in).
        factor: Of the Gram matrix of the inputs.
        scale: float32 (out, groups), for example from :func:`nemo_ptq.calibration.search.group_scales`.
        fp8_scale: float32, one element, of W4A8: readers round the dequantized weight to FP8 at this scale.
    """
    group_size = weight.shape[1] // scale.shape[1]
    groups = factor.order // group_size
    by_group = scale.T.contiguous()
    rounded, error = _round(weight, factor, INT4, lambda here, _: by_group[groups[here]], fp8_scale=fp8_scale)
    codes = int4_codes(rounded, scale)
    if fp8_scale is not None:
        rounded = FP8.nearest(rounded / fp8_scale) * fp8_scale
    return Rounded(codes, scale, rounded, error, fp8_scale)


def round_nvfp4(weight: torch.Tensor, factor: InverseFactor, scale_2: torch.Tensor, block_size: int = 16) -> Rounded:
    """Rounds to FP4 (E2M1), and chooses the scale of each block when it is reached: what the block has become counts.

    Args:
        weight: (out, in), in-features a multiple of ``block_size``.
        factor: Of the Gram matrix of the inputs, its columns not sorted.
        scale_2: float32, one element: the scale of the block scales, of the whole tensor.
        block_size: Consecutive in-features that share a scale.

    Raises:
        PtqError: If the factor's columns are sorted, which tears the blocks apart.
    """
    if not torch.equal(factor.order, torch.arange(len(factor.order), device=factor.order.device)):
        raise PtqError("NVFP4 chooses the scales of blocks of neighbours on the way: give inverse_factor(sort=False)")
    scales = torch.empty(weight.shape[0], weight.shape[1] // block_size, device=weight.device)

    def choose(here: slice, columns: torch.Tensor) -> torch.Tensor:
        # Of the inverse of H without the columns that are rounded already, the diagonal.
        remaining = 1 / factor.upper[here, here].square().sum(0)
        chosen = _block_scales(columns, remaining, scale_2)
        scales[:, here.start // block_size] = chosen
        return chosen[None] * scale_2

    rounded, error = _round(weight, factor, FP4, choose, block_size)
    scale = scales.to(torch.float8_e4m3fn)
    return Rounded(fp4_codes(rounded, scale, scale_2.reshape(())), scale, rounded, error, scale_2)


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
        change: (out, in): D, what the weight has become less what it should be.
        gram: (in, in).

    Returns:
        float64 (out).
    """
    change = change.double()
    return ((change @ gram.double()) * change).sum(1)
