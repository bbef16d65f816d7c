# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The values that a format's codes stand for, and rounding to them. Scales and packing are in rounding.py."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Grid:
    """The values of a format's codes.

    Attributes:
        name: The format: "int4", "int8", "fp8" or "fp4".
        largest: The value that an amax is scaled to.
        nearest: Rounds float32 values of any shape to the nearest value of the grid, ties to the even code; values
            beyond the grid are clipped to its ends.
    """

    name: str
    largest: float
    nearest: Callable[[torch.Tensor], torch.Tensor]


def _nearest_int8(values: torch.Tensor) -> torch.Tensor:
    return values.round().clamp(-128, 127)


def _nearest_int4(values: torch.Tensor) -> torch.Tensor:
    return values.round().clamp(-8, 7)


def _nearest_fp8(values: torch.Tensor) -> torch.Tensor:
    return values.clamp(-448, 448).to(torch.float8_e4m3fn).to(values.dtype)


def _nearest_fp4(values: torch.Tensor) -> torch.Tensor:
    # E2M1 has two codes in each power of two from 1 on: steps of 0.5 below 2, then 1, then 2.
    magnitude = values.abs()
    step = 0.5 + 0.5 * (magnitude >= 2).to(values.dtype) + (magnitude >= 4).to(values.dtype)
    return ((values / step).round() * step).clamp(-6, 6)


INT8 = Grid("int8", 127.0, _nearest_int8)
INT4 = Grid("int4", 7.0, _nearest_int4)
FP8 = Grid("fp8", 448.0, _nearest_fp8)
FP4 = Grid("fp4", 6.0, _nearest_fp4)
