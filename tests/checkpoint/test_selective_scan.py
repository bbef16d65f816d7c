# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The scan in chunks against the recurrence that defines it, in float64."""

import pytest
import torch
import torch.nn.functional as F

from nemo_ptq.checkpoint.selective_scan import GatedNorm, selective_scan

HEADS, SIZE, GROUPS, WIDTH = 6, 5, 2, 7


def random_inputs(length: int) -> list[torch.Tensor]:
    """x, dt, A, B, C and D of two sequences, in float32."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    rates = -torch.exp(2.7 * torch.rand(HEADS, generator=generator))
    steps = F.softplus(normal(2, length, HEADS))
    projected = [normal(2, length, GROUPS, WIDTH) for _ in "BC"]
    return [normal(2, length, HEADS, SIZE), steps, rates, *projected, normal(HEADS)]


def by_definition(inputs: list[torch.Tensor]) -> torch.Tensor:
    x, dt, a, b, c, d = (tensor.double() for tensor in inputs)
    b, c = (projected.repeat_interleave(HEADS // GROUPS, dim=2) for projected in (b, c))
    state = torch.zeros(len(x), HEADS, SIZE, WIDTH, dtype=torch.float64)
    outputs = []
    for place in range(x.shape[1]):
        decay = torch.exp(dt[:, place] * a)
        entering = torch.einsum("bh,bhp,bhn->bhpn", dt[:, place], x[:, place], b[:, place])
        state = decay[..., None, None] * state + entering
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, c[:, place]) + d[:, None] * x[:, place])
    return torch.stack(outputs, dim=1)


@pytest.mark.parametrize("length", [1, 63, 64, 150])
def test_the_scan_is_the_recurrence(length: int) -> None:
    inputs = random_inputs(length)
    torch.testing.assert_close(selective_scan(*inputs).double(), by_definition(inputs), rtol=1e-4, atol=1e-4)


def test_long_steps_do_not_overflow() -> None:
    inputs = random_inputs(130)
    inputs[1] = inputs[1] * 100  # decays to nothing within a position, and the other way round to infinity
    torch.testing.assert_close(selective_scan(*inputs).double(), by_definition(inputs), rtol=1e-4, atol=1e-4)


def test_the_result_has_the_type_of_what_enters() -> None:
    inputs = random_inputs(9)
    rounded = [inputs[0].bfloat16(), *inputs[1:]]
    found = selective_scan(*rounded)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, selective_scan(inputs[0].bfloat16().float(), *inputs[1:]).bfloat16())


def test_the_gated_norm_is_of_each_group() -> None:
    norm = GatedNorm(6, 2, 1e-5, torch.float32)
    norm.weight.data = torch.tensor([1.0, 2.0, 3.0, 1.0, 1.0, 1.0])
    x, gate = torch.tensor([3.0, 4.0, 0.0, 1.0, 1.0, 1.0]), torch.full((6,), 50.0)  # silu(50) is 50
    expected = torch.tensor([3.0, 8.0, 0.0, 3**-0.5, 3**-0.5, 3**-0.5]) / torch.tensor([5.0] * 3 + [1.0] * 3) * 3**0.5
    torch.testing.assert_close(norm(x, gate).detach(), expected, rtol=1e-5, atol=0)
