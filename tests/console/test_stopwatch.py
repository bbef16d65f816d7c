# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Time and memory of steps."""

import time

import numpy as np
import pytest

from nemo_ptq.console.stopwatch import Step, Stopwatch, slowest

MIB = 1 << 20


def test_steps_have_their_own_time_and_peak() -> None:
    watch = Stopwatch()
    with watch.measure("large"):
        block = np.ones(96 * MIB, dtype=np.uint8)
        del block
        time.sleep(0.05)
    with watch.measure("small"):
        pass
    large, small = watch.steps
    assert (large.name, small.name) == ("large", "small")
    assert large.seconds >= 0.05 > small.seconds
    # What one step has freed does not count for the next.
    assert large.peak_memory_bytes - small.peak_memory_bytes > 64 * MIB


def test_a_step_that_fails_is_not_kept() -> None:
    watch = Stopwatch()
    with pytest.raises(RuntimeError), watch.measure("load"):
        raise RuntimeError
    assert watch.steps == []


def test_ranks_are_merged_to_the_slowest_and_the_largest() -> None:
    ranks = [[Step("load", 1.0, 30), Step("export", 4.0, 10)], [Step("load", 2.0, 20), Step("export", 3.0, 40)]]
    assert slowest(ranks) == [Step("load", 2.0, 30), Step("export", 4.0, 40)]


def test_a_rank_may_lack_steps() -> None:
    """A job that is resumed may have nothing left to calibrate on one stage."""
    ranks = [[Step("export", 4.0, 10)], [Step("load", 2.0, 20), Step("calibrate", 1.0, 5), Step("export", 3.0, 40)]]
    assert slowest(ranks) == [Step("load", 2.0, 20), Step("calibrate", 1.0, 5), Step("export", 4.0, 40)]
