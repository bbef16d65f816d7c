# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Which layers stand out, and what to try: the algorithm's limits are in its record."""

from collections.abc import Iterator, Sequence

from nemo_ptq.quantization.algorithms import Limit, algorithm_named
from nemo_ptq.report.records import Finding, Layer


def findings_of(
    layers: Sequence[Layer], algorithm: str, moves_weights: bool = False, moves_outputs: bool = False
) -> tuple[Finding, ...]:
    """Names the layers with a figure below its limit, those that are furthest out first.

    Args:
        layers: All layers.
        algorithm: Our name of the algorithm.
        moves_weights: Whether weights were moved away from the checkpoint's to improve the outputs, as
            quality "balanced" does: their own error then says nothing.
        moves_outputs: Whether outputs were moved away as well, to make up for the layers before, as "max" does.
    """
    moved = {"weight_sqnr_db": moves_weights, "output_sqnr_db": moves_outputs}
    limits = [limit for limit in algorithm_named(algorithm).limits if not moved.get(limit.figure)]
    found = [finding for layer in layers for finding in _findings(layer, limits)]
    return tuple(sorted(found, key=lambda finding: (-abs(finding.value - finding.limit), finding.layer)))


def _findings(layer: Layer, limits: Sequence[Limit]) -> Iterator[Finding]:
    for limit in limits:
        value = getattr(layer, limit.figure)
        if value is not None and value < limit.least:
            yield Finding(layer.layer, layer.kind, limit.figure, value, limit.least, limit.problem, limit.advice)
