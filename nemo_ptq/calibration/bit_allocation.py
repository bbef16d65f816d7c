# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Chooses an option for each part of a model, for the least total error within a budget of bits.

The errors of the parts are assumed to add up. Given a Lagrange multiplier, the price of one bit in units of error, each
part independently takes the option with the least error + price x bits. As the price falls to zero, the parts move one
by one along the corners of the lower convex hulls of their options (Everett 1963; Shoham and Gersho 1988), and every
allocation on that path has the least error that its bits allow. A budget between two of these allocations takes the
cheaper one, and spends the remaining bits on the parts that gain most. Pure functions over plain records.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Cost:
    """The cost of one option for one part.

    Attributes:
        error: At least 0; errors of all parts are comparable.
        bits: Total bits of the part's weights.
    """

    error: float
    bits: float


# The options of each part, by name.
Costs = Mapping[str, Mapping[str, Cost]]


@dataclass(frozen=True)
class Allocation:
    """An option for each part.

    Attributes:
        options: Name of the option, by part.
        bits: Total over all parts.
        error: Total over all parts.
    """

    options: Mapping[str, str]
    bits: float
    error: float


def sweep(costs: Costs) -> list[Allocation]:
    """Returns the allocations that are best for some price of a bit, from the fewest bits to the least error.

    Args:
        costs: At least one option of each part.
    """
    hulls = {part: _hull(options) for part, options in costs.items()}
    steps = [
        ((options[before].error - options[after].error) / (options[after].bits - options[before].bits), part, after)
        for part, hull in hulls.items()
        for options in [costs[part]]
        for before, after in pairwise(hull)
    ]
    # The steps of one hull are in this order already: each saves less error per bit than the one before it.
    steps.sort(key=lambda step: -step[0])
    found = [_allocation({part: hull[0] for part, hull in hulls.items()}, costs)]
    for _, part, option in steps:
        found.append(_allocation({**found[-1].options, part: option}, costs))
    return found


def allocate(costs: Costs, budget: float) -> Allocation:
    """Returns an allocation within a budget: the optimum where the budget is that of a step of :func:`sweep`.

    Args:
        costs: At least one option of each part.
        budget: The most bits of all parts.

    Raises:
        ValueError: If the cheapest options together exceed it.
    """
    affordable = [found for found in sweep(costs) if found.bits <= budget]
    if not affordable:
        raise ValueError(f"no allocation has {budget} bits or fewer")
    found = affordable[-1]
    while better := _best_step(found, costs, budget):
        part, option = better
        found = _allocation({**found.options, part: option}, costs)
    return found


def _best_step(found: Allocation, costs: Costs, budget: float) -> tuple[str, str] | None:
    """The part and option that save most error per further bit, among those within the budget."""
    best, best_rate = None, 0.0
    for part, options in costs.items():
        now = options[found.options[part]]
        for name, option in options.items():
            further, saved = option.bits - now.bits, now.error - option.error
            if saved > 0 and found.bits + further <= budget:
                rate = saved / further if further > 0 else float("inf")
                if rate > best_rate:
                    best, best_rate = (part, name), rate
    return best


def _hull(options: Mapping[str, Cost]) -> Sequence[str]:
    """The options on the lower convex hull of error over bits, from the fewest bits to the least error."""
    hull: list[str] = []
    for name in sorted(options, key=lambda name: (options[name].bits, options[name].error)):
        new = options[name]
        if hull and new.error >= options[hull[-1]].error:
            continue
        while len(hull) > 1 and _is_above(options[hull[-2]], options[hull[-1]], new):
            hull.pop()
        hull.append(name)
    return hull


def _is_above(first: Cost, middle: Cost, last: Cost) -> bool:
    """Whether the middle one is on the line between the others, or above it."""
    share = (middle.bits - first.bits) / (last.bits - first.bits)
    return middle.error >= first.error + share * (last.error - first.error)


def _allocation(options: Mapping[str, str], costs: Costs) -> Allocation:
    chosen = [costs[part][option] for part, option in options.items()]
    return Allocation(options, sum(cost.bits for cost in chosen), sum(cost.error for cost in chosen))
