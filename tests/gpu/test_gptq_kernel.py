# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of GPTQ's inner loop rounds as the loop in torch does."""

import pytest
import torch

from nemo_ptq.calibration import gptq
from nemo_ptq.quantization.grids import FP4, FP8, INT4, INT8, Grid

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("columns", "rows"), [(128, 4096), (16, 1000), (40, 333)])
@pytest.mark.parametrize(
    ("grid", "has_fp8_scale"), [(INT8, False), (INT4, False), (INT4, True), (FP8, False), (FP4, False)]
)
def test_the_kernel_rounds_as_the_loop(grid: Grid, has_fp8_scale: bool, columns: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(columns, rows, generator=generator)
    factor = torch.randn(300, 300, generator=generator).triu() * 0.1 + torch.eye(300)
    # As triangular solvers return it: columns after each other, in memory.
    factor = factor.T.contiguous().T
    upper = factor[20 : 20 + columns, 20 : 20 + columns]
    step = torch.rand(columns, rows, generator=generator) * 0.2 + 0.1
    if grid is not INT4:
        step = weight.abs().amax(0, keepdim=True) / grid.largest
    fp8_scale = torch.tensor([0.01]) if has_fp8_scale else None
    on_gpu = weight.cuda()
    upper_there = factor.cuda()[20 : 20 + columns, 20 : 20 + columns]
    found = gptq.round_columns(on_gpu, upper_there, step.cuda(), grid, None if fp8_scale is None else fp8_scale.cuda())
    wanted = gptq.round_columns(weight, upper, step, grid, fp8_scale)
    # Fused products round otherwise in the last bit, which seldom tips a column over to the next code; then the row's
    # later columns differ too.
    same = (on_gpu.cpu() == weight).all(0)
    assert same.float().mean() > 0.98
    torch.testing.assert_close(found.cpu()[:, same], wanted[:, same], rtol=1e-4, atol=1e-5)
