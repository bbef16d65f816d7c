# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Bits are spent where they save most: against all allocations that there are."""

import random
from itertools import pairwise, product

import pytest

from nemo_ptq.calibration.bit_allocation import Allocation, Cost, Costs, allocate, sweep


def made_up(seed: int) -> Costs:
    """Five parts of different sizes with four options each, some of them no better than a cheaper one."""
    numbers = random.Random(seed)
    costs = {}
    for part in "abcde":
        size, error = numbers.randint(1, 9), numbers.random()
        options = {"4": error, "4.5": error * numbers.uniform(0.3, 1.3), "8": error * numbers.uniform(0.01, 0.5)}
        costs[part] = {name: Cost(found, float(name) * size) for name, found in (*options.items(), ("16", 0.0))}
    return costs


def best(costs: Costs, budget: float) -> float:
    """The least error of all allocations within a budget."""
    every = (tuple(options.values()) for options in costs.values())
    return min(sum(cost.error for cost in chosen) for chosen in product(*every) if bits(chosen) <= budget + 1e-9)


def bits(chosen: tuple[Cost, ...]) -> float:
    return sum(cost.bits for cost in chosen)


def assert_adds_up(found: Allocation, costs: Costs) -> None:
    chosen = tuple(costs[part][option] for part, option in found.options.items())
    assert found.options.keys() == costs.keys()
    assert (found.bits, found.error) == pytest.approx((bits(chosen), sum(cost.error for cost in chosen)))


@pytest.mark.parametrize("seed", range(8))
def test_every_stop_has_the_least_error_that_its_bits_allow(seed: int) -> None:
    costs = made_up(seed)
    stops = sweep(costs)
    assert len(stops) > 5
    for stop in stops:
        assert_adds_up(stop, costs)
        assert stop.error == pytest.approx(best(costs, stop.bits))
        assert allocate(costs, stop.bits).error == pytest.approx(stop.error)
    assert [stop.bits for stop in stops] == sorted(stop.bits for stop in stops)
    assert stops[-1].error == 0
    assert stops[0].bits == sum(min(cost.bits for cost in options.values()) for options in costs.values())


@pytest.mark.parametrize("seed", range(8))
def test_a_budget_between_two_stops_is_spent(seed: int) -> None:
    costs = made_up(seed)
    stops = sweep(costs)
    excess = []
    for before, after in pairwise(stops):
        for share in (0.2, 0.5, 0.8):
            budget = before.bits + share * (after.bits - before.bits)
            found = allocate(costs, budget)
            assert_adds_up(found, costs)
            assert found.bits <= budget
            assert best(costs, budget) <= found.error + 1e-9
            assert found.error <= before.error
            excess.append(found.error / best(costs, budget) - 1 if found.error else 0.0)
    assert sum(excess) / len(excess) < 0.15  # the budgets of a model are coarser than its layers by far


def test_a_budget_below_all_options_is_refused() -> None:
    costs = made_up(0)
    with pytest.raises(ValueError, match="no allocation has 1 bits"):
        allocate(costs, 1)


def test_many_parts_come_close_to_their_budget() -> None:
    costs = {f"{seed}{part}": options for seed in range(20) for part, options in made_up(seed).items()}
    weights = sum(options["16"].bits for options in costs.values()) / 16
    for budget in (4.3, 5, 6, 8, 12):
        found = allocate(costs, budget * weights)
        assert 0.995 * budget <= found.bits / weights <= budget
