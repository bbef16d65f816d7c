# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Timings of whole processes, their medians, and one table of them."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """What one process took, in seconds.

    Attributes:
        steps: Of each step, by its name.
        total: From its command to its end.
    """

    steps: Mapping[str, float]
    total: float

    @property
    def rest(self) -> float:
        """What no step accounts for: imports, start and end."""
        return self.total - sum(self.steps.values())


def median(timings: Sequence[Timing]) -> Timing:
    """Returns the median of each step and of the total, each taken on its own.

    Args:
        timings: Runs of the same steps, at least one.

    Raises:
        ValueError: If the runs have different steps.
    """
    names = list(timings[0].steps)
    for timing in timings[1:]:
        if list(timing.steps) != names:
            raise ValueError(f"runs with steps {names} and {list(timing.steps)} have no common median")
    steps = {name: statistics.median(timing.steps[name] for timing in timings) for name in names}
    return Timing(steps, statistics.median(timing.total for timing in timings))


def table(columns: Mapping[str, Timing], reference: str) -> str:
    """Returns a table in Markdown: a row for each step, then what is left, the total, and its ratio to one column's.

    Args:
        columns: The timings, by the headers of their columns. The rows are in the order of the first column's steps.
        reference: The header of the column that the totals are divided by.
    """
    names = list(dict.fromkeys(name for timing in columns.values() for name in timing.steps))
    whole = columns[reference].total

    def row(name: str, cells: Sequence[str]) -> str:
        return f"| {name} | {' | '.join(cells)} |"

    return "\n".join(
        [
            row("seconds", list(columns)),
            "|---|" + "--:|" * len(columns),
            *(
                row(name, [f"{timing.steps[name]:.2f}" if name in timing.steps else "" for timing in columns.values()])
                for name in names
            ),
            row("imports, start and end", [f"{timing.rest:.2f}" for timing in columns.values()]),
            row("**in all**", [f"**{timing.total:.2f}**" for timing in columns.values()]),
            row(f"ratio to {reference}", [f"{timing.total / whole:.2f}" for timing in columns.values()]),
        ]
    )
