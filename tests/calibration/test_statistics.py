# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Activation statistics do not depend on the order of the batches, nor on how they are spread over ranks."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from nemo_ptq.calibration import statistics
from nemo_ptq.calibration.statistics import (
    Amax,
    ChannelAmax,
    HeldOutChannels,
    Moments,
    PairedMoments,
    add_product,
    add_upper_half,
    mirror_upper_half,
    product,
)
from nemo_ptq.parallel.ranks import ALONE, Ranks
from tests.ranks import run_ranks

CPU, FEATURES = torch.device("cpu"), 6
MAKE: dict[str, Callable[[], Any]] = {
    "amax": lambda: Amax(torch.bfloat16, CPU),
    "channel_amax": lambda: ChannelAmax(FEATURES, torch.bfloat16, CPU),
    "moments": lambda: Moments(FEATURES, FEATURES, CPU),
}


def batches() -> list[torch.Tensor]:
    """Whole numbers, whose sums are exact, and one batch without tokens."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(-9, 9, (size, FEATURES), generator=generator).bfloat16() for size in (5, 0, 1, 7)]


def values(statistic: Any) -> list[torch.Tensor]:
    return [value for value in vars(statistic).values() if isinstance(value, torch.Tensor)]


def observed(kind: str, seen: Sequence[torch.Tensor]) -> Any:
    statistic = MAKE[kind]()
    for inputs in seen:
        statistic.observe(inputs, inputs)
    return statistic


def test_each_is_its_definition() -> None:
    inputs = torch.cat(batches())
    amax, channels, moments = (observed(kind, batches()) for kind in MAKE)
    assert torch.equal(amax.value, inputs.abs().max())
    assert torch.equal(channels.value, inputs.abs().amax(0))
    exact = inputs.float()
    assert torch.equal(moments.gram, exact.T @ exact)
    assert torch.equal(moments.abs_sum, exact.abs().sum(0))
    assert torch.equal(moments.amax, exact.abs().amax(0))
    assert float(moments.count) == 13
    assert [statistic.tokens for statistic in (amax, channels, moments)] == [13, 13, 13]


@pytest.mark.parametrize("kind", MAKE)
def test_the_order_of_batches_does_not_show(kind: str) -> None:
    forwards, backwards = values(observed(kind, batches())), values(observed(kind, batches()[::-1]))
    assert all(torch.equal(one, other) for one, other in zip(forwards, backwards, strict=True))


@pytest.mark.parametrize("kind", MAKE)
def test_without_a_token_everything_is_zero(kind: str) -> None:
    statistic = observed(kind, [torch.empty(0, FEATURES, dtype=torch.bfloat16)])
    assert statistic.tokens == 0
    assert not any(value.any() for value in values(statistic))


def merged(kind: str, over: str, shares_inputs: bool) -> list[torch.Tensor]:
    """Gathers on two ranks, each its own batches or, sharing a layer, its own channels of all batches."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    ranks = Ranks(rank, 2, dist.group.WORLD)
    if over == "data":
        statistic = observed(kind, batches()[rank::2])
        statistic.merge(ALONE, ranks, shares_inputs)
        return values(statistic)
    local = FEATURES // 2
    statistic = {
        "amax": lambda: Amax(torch.bfloat16, CPU),
        "channel_amax": lambda: ChannelAmax(local, torch.bfloat16, CPU),
        "moments": lambda: Moments(local, FEATURES, CPU),
    }[kind]()
    for inputs in batches():
        statistic.observe(ranks.shard(inputs), inputs)
    statistic.merge(ranks, ALONE, shares_inputs)
    return values(statistic)


@pytest.mark.parametrize("kind", MAKE)
def test_ranks_with_other_samples_find_what_one_does(kind: str) -> None:
    expected = values(observed(kind, batches()))
    for found in run_ranks(merged, 2, kind, "data", False):
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", MAKE)
def test_ranks_with_other_channels_have_their_share(kind: str) -> None:
    expected = values(observed(kind, batches()))
    first, second = run_ranks(merged, 2, kind, "tensor", True)
    for one, other, whole in zip(first, second, expected, strict=True):
        if one.shape == whole.shape:
            assert torch.equal(one, whole)
            assert torch.equal(other, whole)
        else:
            assert torch.equal(torch.cat([one, other]), whole)


def test_products_are_summed_in_float32() -> None:
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(size, generator=generator).bfloat16() for size in ((3, 512), (512, 4)))
    exact = left.double() @ right.double()
    found = product(left, right)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)
    total = torch.ones(3, 4)
    add_product(total, left, right)
    torch.testing.assert_close(total, found + 1)


def test_paired_moments_are_their_definition() -> None:
    given, exact = torch.cat(batches()), torch.cat(batches()[::-1])
    moments = PairedMoments(FEATURES, FEATURES, CPU, compares=True)
    for rows in (slice(0, 4), slice(4, 4), slice(4, None)):
        moments.observe(given[rows], given[rows], exact[rows])
    assert moments.cross is not None
    assert torch.equal(moments.gram, given.float().T @ given.float())
    assert torch.equal(moments.cross, (exact - given).float().T @ given.float())
    assert (moments.tokens, float(moments.count)) == (13, 13)


def test_every_fourth_batch_is_held_out() -> None:
    seen = [torch.full((3, FEATURES), float(number)).bfloat16() for number in range(1, 7)]
    channels = HeldOutChannels(FEATURES, FEATURES, torch.bfloat16, CPU)
    for inputs in seen:
        channels.observe(inputs, inputs)
    channels.merge(ALONE, ALONE, shares_inputs=False)
    assert channels.held_out.unique().tolist() == [5]
    assert channels.value.unique().tolist() == [6]
    assert channels.sample.unique().tolist() == [1, 5]


def test_a_single_batch_is_both() -> None:
    channels = HeldOutChannels(FEATURES, FEATURES, torch.bfloat16, CPU)
    channels.observe(torch.full((2000, FEATURES), 3.0).bfloat16(), torch.full((2000, FEATURES), 3.0).bfloat16())
    channels.merge(ALONE, ALONE, shares_inputs=False)
    assert torch.equal(channels.value, channels.held_out)
    assert len(channels.sample) == 250


def test_half_of_a_gram_matrix_tells_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_ROWS_OF_HALF", 4)
    inputs = torch.cat(batches())
    gram = torch.zeros(FEATURES, FEATURES)
    for part in inputs.split(3):
        add_upper_half(gram, part)
    assert not gram[4:, :4].any()
    mirror_upper_half(gram)
    assert torch.equal(gram, inputs.float().T @ inputs.float())
