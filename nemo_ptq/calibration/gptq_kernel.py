# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""GPTQ's inner loops as Triton kernels: on a GPU each column would otherwise cost ten launches, each block fifty.

Imported where the weights are on a GPU, which is where torch brings Triton with it. The arithmetic is that of
:func:`nemo_ptq.calibration.gptq.round_columns` and :func:`nemo_ptq.calibration.search.nvfp4_block_scales`, except that
products and sums may be fused.
"""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl

from nemo_ptq.calibration.search import NVFP4_STEPS
from nemo_ptq.quantization.grids import Grid

_INTEGER, _FP8, _FP4 = 0, 1, 2
_KINDS: Mapping[str, int] = {"int8": _INTEGER, "int4": _INTEGER, "fp8": _FP8, "fp4": _FP4}
# Rows of the weight that one program rounds. One warp, so that a column is found without a detour by shared memory.
_ROWS = 32
_WARPS = 1


@triton.jit
def _to_even(values):  # type: ignore[no-untyped-def]
    # float32 has no bits left for a fraction beside 1.5 * 2^23, and rounds it off, ties to even.
    return (values + 12582912.0) - 12582912.0


@triton.jit
def _nearest_e4m3(values):  # type: ignore[no-untyped-def]
    values = tl.minimum(tl.maximum(values, -448.0), 448.0)
    exponent = (values.to(tl.int32, bitcast=True) >> 23) & 0xFF
    # Three bits of mantissa, and below 2^-6 steps of 2^-9.
    step = ((tl.maximum(exponent, 121) - 3) << 23).to(tl.float32, bitcast=True)
    return _to_even(values / step) * step


@triton.jit
def _nearest_e2m1(values):  # type: ignore[no-untyped-def]
    magnitude = tl.abs(values)
    step = 0.5 + 0.5 * (magnitude >= 2.0).to(tl.float32) + (magnitude >= 4.0).to(tl.float32)
    return tl.minimum(tl.maximum(_to_even(tl.minimum(tl.maximum(values, -6.0), 6.0) / step) * step, -6.0), 6.0)


@triton.jit
def _nearest(values, KIND: tl.constexpr, LOWEST: tl.constexpr, HIGHEST: tl.constexpr):  # type: ignore[no-untyped-def]
    if KIND == 1:
        return _nearest_e4m3(values)
    if KIND == 2:
        return _nearest_e2m1(values)
    return _to_even(tl.minimum(tl.maximum(values, LOWEST), HIGHEST))


@triton.jit
def _round_columns(  # type: ignore[no-untyped-def]
    columns,
    upper,
    steps,
    errors,
    fp8_scale,
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
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    numbers = tl.arange(0, COLUMNS)
    is_row = rows < num_rows
    is_element = (numbers < num_columns)[:, None] & is_row[None, :]
    places = columns + numbers[:, None] * column_stride + rows[None, :]
    block = tl.load(places, mask=is_element, other=0.0)
    for index in range(num_columns):
        is_column = (numbers == index)[:, None]
        column = tl.sum(tl.where(is_column, block, 0.0), 0)
        step = tl.load(steps + index * step_column_stride + rows * step_row_stride, mask=is_row, other=1.0)
        rounded = _nearest(tl.div_rn(column, step), KIND, LOWEST, HIGHEST) * step
        read = rounded
        if HAS_FP8_SCALE:
            scale = tl.load(fp8_scale)
            read = _nearest_e4m3(tl.div_rn(rounded, scale + tl.zeros_like(rounded))) * scale
        diagonal = tl.load(upper + index * (upper_row_stride + upper_column_stride))
        error = tl.div_rn(column - read, diagonal + tl.zeros_like(column))
        after = (numbers > index) & (numbers < num_columns)
        weights = tl.load(upper + index * upper_row_stride + numbers * upper_column_stride, mask=after, other=0.0)
        block = tl.where(is_column, rounded[None, :], block - weights[:, None] * error[None, :])
        tl.store(errors + index * num_rows + rows, error, mask=is_row)
    tl.store(places, block, mask=is_element)


def round_columns(
    columns: torch.Tensor, upper: torch.Tensor, step: torch.Tensor, grid: Grid, fp8_scale: torch.Tensor | None = None
) -> torch.Tensor:
    """As :func:`nemo_ptq.calibration.gptq.round_columns`, of tensors on a GPU; at most 128 columns."""
    num_columns, num_rows = columns.shape
    errors = torch.empty(num_columns, num_rows, dtype=torch.float32, device=columns.device)
    step = step.expand(num_columns, num_rows)
    lowest, highest = (float(grid.nearest(torch.tensor(end))) for end in (-1e9, 1e9))
    with torch.cuda.device_of(columns):
        _round_columns[(triton.cdiv(num_rows, _ROWS),)](
            columns,
            upper,
            step,
            errors,
            fp8_scale if fp8_scale is not None else columns,
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
            COLUMNS=max(16, triton.next_power_of_2(num_columns)),
            ROWS=_ROWS,
            num_warps=_WARPS,
        )
    return errors


@triton.jit
def _choose_block_scales(  # type: ignore[no-untyped-def]
    columns,
    importance,
    scale_2,
    chosen,
    num_rows,
    column_stride,
    FIRST_STEP: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    numbers = tl.arange(0, BLOCK)
    is_row = rows < num_rows
    places = columns + numbers[:, None] * column_stride + rows[None, :]
    block = tl.load(places, mask=(numbers < BLOCK)[:, None] & is_row[None, :], other=0.0)
    counts = tl.load(importance + numbers)
    scale = tl.load(scale_2)
    amax = tl.max(tl.abs(block), 0)
    full = _nearest_e4m3(tl.div_rn(amax, 6.0 * scale + tl.zeros_like(amax)))
    # An E4M3 number's code: exponent and mantissa of float32, cut to three bits; below 2^-6 a multiple of 2^-9.
    code = tl.where(full >= 0.015625, (full.to(tl.int32, bitcast=True) >> 20) - 960, (full * 512.0).to(tl.int32))
    least = tl.full(amax.shape, float("inf"), tl.float32)
    best = tl.full(amax.shape, 1.0, tl.float32)
    for step in range(STEPS):
        candidate = tl.minimum(tl.maximum(code + (FIRST_STEP + step), 1), 126)
        normal = ((candidate + 960) << 20).to(tl.float32, bitcast=True)
        value = tl.where(candidate >= 8, normal, candidate.to(tl.float32) / 512.0)
        width = (value * scale)[None, :]
        difference = _nearest_e2m1(tl.div_rn(block, width + tl.zeros_like(block))) * width - block
        error = tl.sum(difference * difference * counts[:, None], 0)
        is_better = error < least
        least, best = tl.where(is_better, error, least), tl.where(is_better, value, best)
    tl.store(chosen + rows, tl.where(amax == 0.0, 1.0, best), mask=is_row)


def nvfp4_block_scales(columns: torch.Tensor, importance: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
    """As :func:`nemo_ptq.calibration.search.nvfp4_block_scales`, of one block of each row.

    Args:
        columns: float32 (block, out), the block a power of two.
        importance: float32 (block).
        scale_2: float32, one element.

    Returns:
        float32 (out): values of E4M3.
    """
    size, num_rows = columns.shape
    chosen = torch.empty(num_rows, dtype=torch.float32, device=columns.device)
    with torch.cuda.device_of(columns):
        _choose_block_scales[(triton.cdiv(num_rows, _ROWS),)](
            columns,
            importance.contiguous(),
            scale_2,
            chosen,
            num_rows,
            columns.stride(0),
            FIRST_STEP=NVFP4_STEPS[0],
            STEPS=len(NVFP4_STEPS),
            BLOCK=size,
            ROWS=_ROWS,
            num_warps=_WARPS,
        )
    return chosen
