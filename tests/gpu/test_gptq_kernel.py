# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What is computed otherwise on a GPU gives what torch gives on a CPU."""

import pytest
import torch

from nemo_ptq.calibration import gptq
from nemo_ptq.calibration.search import group_scales
from nemo_ptq.calibration.statistics import PairedMoments
from nemo_ptq.parallel.ranks import ALONE
from nemo_ptq.quantization.activations import rounded_by_scale
from nemo_ptq.quantization.grids import FP4, FP8, INT4, INT8, Grid
from nemo_ptq.quantization.schemes import scheme_for

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


def random_inputs(tokens: int, features: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(tokens, features, generator=generator) * torch.randn(tokens, 1, generator=generator).exp()


def test_nvfp4_blocks_get_the_scales_and_codes_of_the_loop() -> None:
    inputs, weight = random_inputs(1000, 256), torch.randn(333, 256, generator=torch.Generator().manual_seed(2))
    factor = gptq.inverse_factor(inputs.T @ inputs, sort=False)
    scale_2 = (weight.abs().max() / (6 * 448)).reshape(1)
    there = gptq.InverseFactor(factor.upper.cuda(), factor.order.cuda(), factor.importance.cuda(), factor.damping)
    found, wanted = gptq.round_nvfp4(weight.cuda(), there, scale_2.cuda()), gptq.round_nvfp4(weight, factor, scale_2)
    assert (found.scale.float().cpu() == wanted.scale.float()).float().mean() > 0.99
    assert (found.codes.cpu() == wanted.codes).float().mean() > 0.99


def test_groups_get_the_scales_of_the_search() -> None:
    weight, importance = random_inputs(333, 512), random_inputs(512, 1)[:, 0].abs()
    weight[3, :64] = 0
    found = group_scales(weight.cuda(), importance.cuda(), 64).cpu()
    assert (found == group_scales(weight, importance, 64)).float().mean() > 0.999


@pytest.mark.parametrize(("scheme", "largest"), [("fp8", 448.0), ("int8_sq", 127.0), ("nvfp4", 448.0 * 6)])
def test_activations_are_rounded_to_the_same_bits(scheme: str, largest: float) -> None:
    values = random_inputs(300, 512).bfloat16()
    values[0, :16], values[1, :16] = 0, values[1, :16] * 1e-9
    scale = values.abs().max().float() / 2 / largest  # what exceeds it is clipped
    found = rounded_by_scale(values.cuda(), scale.cuda(), scheme_for(scheme))
    wanted = rounded_by_scale(values, scale, scheme_for(scheme))
    assert torch.equal(found.cpu().view(torch.int16), wanted.view(torch.int16))


def test_a_gram_matrix_is_whole_in_the_end() -> None:
    inputs, found = random_inputs(64, 2500).bfloat16(), []
    for device in map(torch.device, ("cpu", "cuda")):
        moments = PairedMoments(2500, 2500, device, compares=False)
        moments.observe(inputs.to(device), inputs.to(device), None)
        moments.merge(ALONE)
        found.append(moments.gram.cpu())
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-3)
