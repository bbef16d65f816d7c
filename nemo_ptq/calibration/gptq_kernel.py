# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""GPTQ's inner loops as Triton kernels: on a GPU each column would otherwise cost ten launches, each block fifty.

Imported only where the weights are on a GPU, for which torch comes with Triton. The arithmetic is that of
:mod:`nemo_ptq.calibration.gptq` and :mod:`nemo_ptq.calibration.search`, except that products and sums may be fused.
"""

from collections.abc import Mapping
from functools import cache

import torch
import triton
import triton.language as tl

from nemo_ptq.calibration.search import GROUP_MULTIPLIERS, NVFP4_STEPS
from nemo_ptq.quantization.grid_kernels import E2M1, E4M3, INTEGER, nearest, nearest_e2m1, nearest_e4m3
from nemo_ptq.quantization.grids import FP4, Grid

_KINDS: Mapping[str, int] = {"int8": INTEGER.value, "int4": INTEGER.value, "fp8": E4M3.value, "fp4": E2M1.value}
# Rows of the weight that one program rounds. One warp, so that a column is found without going through shared memory.
_ROWS = 32
_WARPS = 1
# Columns that a program holds at a time: the cost of a column is the search through them.
_TILE = 32
# Rows for which one program chooses the scale of a group.
_GROUP_ROWS = 16


@triton.jit
def _block_scales(block, counts, scale, FIRST_STEP: tl.constexpr, STEPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """NVFP4's scales of a block of each row, (block, rows), values of E4M3: see search.nvfp4_block_scales."""
    amax = tl.max(tl.abs(block), 0)
    full = nearest_e4m3(tl.div_rn(amax, 6.0 * scale + tl.zeros_like(amax)))
    # An E4M3 number's code: exponent and mantissa of float32, cut to three bits; below 2^-6 a multiple of 2^-9.
    code = tl.where(full >= 0.015625, (full.to(tl.int32, bitcast=True) >> 20) - 960, (full * 512.0).to(tl.int32))
    least = tl.full(amax.shape, float("inf"), tl.float32)
    best = tl.full(amax.shape, 1.0, tl.float32)
    for step in range(STEPS):
        candidate = tl.minimum(tl.maximum(code + (FIRST_STEP + step), 1), 126)
        normal = ((candidate + 960) << 20).to(tl.float32, bitcast=True)
        value = tl.where(candidate >= 8, normal, candidate.to(tl.float32) / 512.0)
        width = (value * scale)[None, :]
        difference = nearest_e2m1(tl.div_rn(block, width + tl.zeros_like(block))) * width - block
        error = tl.sum(difference * difference * counts[:, None], 0)
        is_better = error < least
        least, best = tl.where(is_better, error, least), tl.where(is_better, value, best)
    return tl.where(amax == 0.0, 1.0, best)


@triton.jit
def _round_columns(  # type: ignore[no-untyped-def]
    columns,
    upper,
    steps,
    errors,
    scale,
    chosen,
    num_columns,
    num_rows,
    column_stride,
    upper_row_stride,
    upper_column_stride,
    step_column_stride,
    step_row_stride,
    KIND: tl.constexpr,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    HAS_FP8_SCALE: tl.constexpr,
    CHOOSES: tl.constexpr,
    FIRST_STEP: tl.constexpr,
    STEPS: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_rows
    numbers = tl.arange(0, TILE)
    for tile in range(tl.cdiv(num_columns, TILE)):
        own = tile * TILE + numbers
        is_own = own < num_columns
        is_element = is_own[:, None] & is_row[None, :]
        places = columns + own[:, None] * column_stride + rows[None, :]
        block = tl.load(places, mask=is_element, other=0.0)
        # The preceding tiles have not corrected this one yet.
        for before in range(tile):
            others = before * TILE + numbers
            factors = upper + others[None, :] * upper_row_stride + own[:, None] * upper_column_stride
            weights = tl.load(factors, mask=is_own[:, None], other=0.0)
            made = tl.load(errors + others[:, None] * num_rows + rows[None, :], mask=is_row[None, :], other=0.0)
            block = tl.dot(-weights, made, acc=block, input_precision="ieee")
        step = tl.full((ROWS,), 1.0, tl.float32)
        if CHOOSES:
            factor = tl.load(upper + own[None, :] * upper_row_stride + own[:, None] * upper_column_stride)
            # The diagonal of the inverse of H without the columns that are rounded already.
            remaining = tl.sum(factor * factor, 1)
            counts = tl.div_rn(1.0 + tl.zeros_like(remaining), remaining)
            scale_2 = tl.load(scale)
            found = _block_scales(block, counts, scale_2, FIRST_STEP, STEPS)
            tl.store(chosen + tile * num_rows + rows, found, mask=is_row)
            step = found * scale_2
        for index in range(tl.minimum(TILE, num_columns - tile * TILE)):
            number = tile * TILE + index
            is_column = (numbers == index)[:, None]
            column = tl.sum(tl.where(is_column, block, 0.0), 0)
            if not CHOOSES:
                step = tl.load(steps + number * step_column_stride + rows * step_row_stride, mask=is_row, other=1.0)
            rounded = nearest(tl.div_rn(column, step), KIND, LOWEST, HIGHEST) * step
            read = rounded
            if HAS_FP8_SCALE:
                fp8_scale = tl.load(scale)
                read = nearest_e4m3(tl.div_rn(rounded, fp8_scale + tl.zeros_like(rounded))) * fp8_scale
            diagonal = tl.load(upper + number * (upper_row_stride + upper_column_stride))
            error = tl.div_rn(column - read, diagonal + tl.zeros_like(column))
            after = is_own & (numbers > index)
            weights = tl.load(upper + number * upper_row_stride + own * upper_column_stride, mask=after, other=0.0)
            block = tl.where(is_column, rounded[None, :], block - weights[:, None] * error[None, :])
            tl.store(errors + number * num_rows + rows, error, mask=is_row)
        tl.store(places, block, mask=is_element)
        # Other threads of the program read the errors.
        tl.debug_barrier()


@cache
def _ends(grid: Grid) -> tuple[float, float]:
    lowest, highest = grid.nearest(torch.tensor([-1e9, 1e9])).tolist()
    return lowest, highest


def round_columns(
    columns: torch.Tensor, upper: torch.Tensor, step: torch.Tensor, grid: Grid, fp8_scale: torch.Tensor | None = None
) -> torch.Tensor:
    """As :func:`nemo_ptq.calibration.gptq.round_columns`, for tensors on a GPU."""
    step = step.expand(*columns.shape)
    errors = torch.empty_like(columns, memory_format=torch.contiguous_format)
    lowest, highest = _ends(grid)
    num_columns, num_rows = columns.shape
    with torch.cuda.device_of(columns):
        _round_columns[(triton.cdiv(num_rows, _ROWS),)](
            columns,
            upper,
            step,
            errors,
            columns if fp8_scale is None else fp8_scale,
            columns,
            num_columns,
            num_rows,
            columns.stride(0),
            upper.stride(0),
            upper.stride(1),
            step.stride(0),
            step.stride(1),
            KIND=_KINDS[grid.name],
            LOWEST=lowest,
            HIGHEST=highest,
            HAS_FP8_SCALE=fp8_scale is not None,
            CHOOSES=False,
            FIRST_STEP=0,
            STEPS=0,
            TILE=_TILE,
            ROWS=_ROWS,
            num_warps=_WARPS,
        )
    return errors


def round_nvfp4_columns(
    columns: torch.Tensor, upper: torch.Tensor, scale_2: torch.Tensor, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds some columns to FP4, for tensors on a GPU, and chooses the scale of each block when it is reached.

    Args:
        columns: float32 (columns, out): whole blocks of the transposed weight; becomes the rounded one.
        upper: float32 (columns, columns), the factor's block on the diagonal.
        scale_2: float32, one element: the scale of the scales.
        block_size: Columns that share a scale, a power of two.

    Returns:
        float32 (columns, out), the error of each column; and float32 (blocks, out), the scales, values of E4M3.
    """
    errors = torch.empty_like(columns, memory_format=torch.contiguous_format)
    num_columns, num_rows = columns.shape
    chosen = torch.empty(num_columns // block_size, num_rows, device=columns.device)
    with torch.cuda.device_of(columns):
        _round_columns[(triton.cdiv(num_rows, _ROWS),)](
            columns,
            upper,
            columns,
            errors,
            scale_2,
            chosen,
            num_columns,
            num_rows,
            columns.stride(0),
            upper.stride(0),
            upper.stride(1),
            0,
            0,
            KIND=E2M1.value,
            LOWEST=-FP4.largest,
            HIGHEST=FP4.largest,
            HAS_FP8_SCALE=False,
            CHOOSES=True,
            FIRST_STEP=NVFP4_STEPS[0],
            STEPS=len(NVFP4_STEPS),
            TILE=block_size,
            ROWS=_ROWS,
            num_warps=_WARPS,
        )
    return errors, chosen


@triton.jit
def _choose_group_scales(  # type: ignore[no-untyped-def]
    weight,
    importance,
    multipliers,
    chosen,
    num_rows,
    num_groups,
    row_stride,
    COUNT: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    is_row = rows < num_rows
    inputs = group * GROUP + tl.arange(0, GROUP)
    block = tl.load(weight + rows[:, None].to(tl.int64) * row_stride + inputs[None, :], mask=is_row[:, None], other=0.0)
    counts = tl.load(importance + inputs)
    amax = tl.max(tl.abs(block), 1)
    full = tl.where(amax == 0.0, 1.0, tl.div_rn(amax, 7.0 + tl.zeros_like(amax)))
    least = tl.full(full.shape, float("inf"), tl.float32)
    best = full
    for index in range(COUNT):
        scale = full * tl.load(multipliers + index)
        width = scale[:, None] + tl.zeros_like(block)
        difference = nearest(tl.div_rn(block, width), INTEGER, -8.0, 7.0) * width - block
        error = tl.sum(difference * difference * counts[None, :], 1)
        is_better = error < least
        least, best = tl.where(is_better, error, least), tl.where(is_better, scale, best)
    tl.store(chosen + rows * num_groups + group, best, mask=is_row)


def group_scales(weight: torch.Tensor, importance: torch.Tensor, group_size: int) -> torch.Tensor:
    """As :func:`nemo_ptq.calibration.search.group_scales`, for tensors on a GPU.

    Args:
        weight: float32 (out, in), in-features a multiple of ``group_size``.
        importance: float32 (in).
        group_size: Consecutive in-features that share a scale, a power of two.

    Returns:
        float32 (out, in / group_size).
    """
    weight = weight.contiguous()
    num_rows, num_groups = len(weight), weight.shape[1] // group_size
    chosen = torch.empty(num_rows, num_groups, device=weight.device)
    multipliers = torch.tensor(GROUP_MULTIPLIERS, dtype=torch.float32, device=weight.device)
    with torch.cuda.device_of(weight):
        _choose_group_scales[(triton.cdiv(num_rows, _GROUP_ROWS), num_groups)](
            weight,
            importance.contiguous(),
            multipliers,
            chosen,
            num_rows,
            num_groups,
            weight.stride(0),
            COUNT=len(GROUP_MULTIPLIERS),
            GROUP=group_size,
            ROWS=_GROUP_ROWS,
        )
    return chosen
