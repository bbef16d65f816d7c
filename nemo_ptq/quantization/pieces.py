# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Large matrices a few rows at a time, so that intermediate results take little memory."""

from collections.abc import Callable

import torch

# Elements of a matrix that are worked on at a time: 512 MiB in float32.
_AT_ONCE = 1 << 27
# Rows of a piece are a multiple of this: formats that pack two rows in a byte need pairs, matrix products like tiles.
_ALIGNMENT = 128


def rows_at_once(matrix: torch.Tensor) -> int:
    """Returns how many rows of (rows, columns) are worked on at a time."""
    return max(_AT_ONCE // matrix.shape[1] // _ALIGNMENT, 1) * _ALIGNMENT


def by_rows(compute: Callable[[torch.Tensor], torch.Tensor], matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Computes a function of a matrix whose rows do not depend on each other, some rows at a time.

    Args:
        compute: Gives (some rows, columns), of any data type, for (some rows, columns).
        matrix: (rows, columns).
        dtype: Data type of the result.

    Returns:
        (rows, columns).
    """
    result = torch.empty(matrix.shape, dtype=dtype, device=matrix.device)
    rows = rows_at_once(matrix)
    for target, piece in zip(result.split(rows), matrix.split(rows), strict=True):
        target.copy_(compute(piece))
    return result
