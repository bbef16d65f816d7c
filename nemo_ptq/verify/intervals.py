# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Confidence intervals from resampling documents. Needs numpy only."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from nemo_ptq.errors import PtqError


@dataclass(frozen=True)
class Interval:
    """An estimate with a bootstrap percentile interval around it."""

    value: float
    low: float
    high: float


def bootstrap_interval(
    numerators: Sequence[float],
    denominators: Sequence[float],
    transform: Callable[[np.ndarray], np.ndarray] = np.asarray,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """A ratio of sums over documents, with a percentile interval from resampling whole documents.

    Args:
        numerators: One sum for each document, such as its negative log-likelihood.
        denominators: One positive weight for each document, such as its number of tokens.
        transform: Monotone function of the ratio, such as ``np.exp`` for perplexity.
        confidence: Share of resamples inside the interval.
        resamples: Number of bootstrap resamples.
        seed: Seed of the resampling.

    Raises:
        PtqError: There are no documents, or the two lists differ in length.
    """
    above, below = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    if above.size == 0 or above.shape != below.shape:
        raise PtqError(f"{above.size} numerators and {below.size} denominators, expected as many of both, at least one")
    generator = np.random.default_rng(seed)
    # How often each document is drawn: a multinomial row for each resample, then one matrix product.
    draws = generator.multinomial(above.size, np.full(above.size, 1 / above.size), size=resamples)
    ratios = transform((draws @ above) / (draws @ below))
    tail = (1 - confidence) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return Interval(float(transform(above.sum() / below.sum())), float(low), float(high))
