# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A data set: somebody counts."""

from collections.abc import Iterator
from itertools import count

from nemo_ptq.calibration.datasets import register


def counting() -> Iterator[str]:
    """Yields an endless series of texts."""
    for start in count():
        yield " ".join(map(str, range(start, start + 40)))


register("counting", counting)
