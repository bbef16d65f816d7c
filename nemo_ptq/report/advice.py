# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Which layers stand out, and what to try: rules as data."""

from collections.abc import Sequence
from dataclasses import dataclass

from nemo_ptq.report.records import Finding, Layer


@dataclass(frozen=True)
class Rule:
    """What a figure should keep, for some algorithms.

    Attributes:
        figure: Field of :class:`~nemo_ptq.report.records.Layer`.
        algorithms: For which of them.
        limit: The figure is out of bounds beyond it.
        at_least: Whether the limit is a least value; else it is a largest one.
        problem: What is wrong, in words.
        advice: What to try.
        kinds: For which kinds of layers; all if empty.
    """

    figure: str
    algorithms: tuple[str, ...]
    limit: float
    at_least: bool
    problem: str
    advice: str
    kinds: tuple[str, ...] = ()

    def broken_by(self, layer: Layer, algorithm: str) -> bool:
        """Whether a layer is out of bounds."""
        value = getattr(layer, self.figure)
        if value is None or algorithm not in self.algorithms or (self.kinds and layer.kind not in self.kinds):
            return False
        return value < self.limit if self.at_least else value > self.limit

    def finding(self, layer: Layer) -> Finding:
        """Names a layer that is out of bounds."""
        value = getattr(layer, self.figure)
        return Finding(layer.layer, layer.kind, self.figure, value, self.limit, self.problem, self.advice)


_FOUR_BITS = ("int4_awq", "w4a8_awq", "nvfp4")
_EXCLUDE = "leave the layer unquantized: give quantization_config.algorithm a ModelOpt configuration that disables it"

# Rounding to FP8 (E4M3) leaves about 31 dB, to INT8 about 40 dB for well-behaved values, to INT4 in blocks about 20 dB,
# whatever the model. Limits are some 6 dB (a doubled error) below.
RULES = (
    Rule(
        "weight_sqnr_db",
        ("fp8", "custom"),
        25.0,
        True,
        "its weights lose much: most of them are so small beside the largest that FP8 rounds them to few values",
        _EXCLUDE,
    ),
    Rule(
        "weight_sqnr_db",
        ("int8_sq",),
        28.0,
        True,
        "its weights lose much: SmoothQuant has moved more into them than INT8 can hold",
        "a smaller quantization_config.sq_alpha, which leaves more with the activations; or fp8",
    ),
    Rule(
        "weight_sqnr_db",
        ("int4_awq", "w4a8_awq"),
        15.0,
        True,
        "its weights lose much: blocks hold weights of very different sizes",
        "a smaller quantization_config.awq_block_size (64), or fp8",
    ),
    Rule(
        "weight_sqnr_db",
        ("nvfp4",),
        15.0,
        True,
        "its weights lose much: blocks hold weights of very different sizes",
        "fp8, or " + _EXCLUDE,
    ),
    Rule(
        "input_sqnr_db",
        ("fp8", "w4a8_awq", "custom"),
        22.0,
        True,
        "its inputs lose much: outliers leave few codes for the others",
        "int8_sq, which moves outliers into the weights; or " + _EXCLUDE,
    ),
    Rule(
        "input_sqnr_db",
        ("int8_sq",),
        22.0,
        True,
        "its inputs lose much: outliers leave few codes for the others",
        "a larger quantization_config.sq_alpha, which moves more into the weights; or fp8",
    ),
    Rule(
        "input_sqnr_db",
        ("nvfp4",),
        15.0,
        True,
        "its inputs lose much: outliers leave few codes for the others of their block",
        "fp8, or " + _EXCLUDE,
    ),
    Rule(
        "output_sqnr_db",
        ("fp8", "int8_sq", "custom"),
        20.0,
        True,
        "its outputs lose much: the errors of weights and inputs add up in large terms that nearly cancel",
        "more, and more varied, calibration samples; or " + _EXCLUDE,
    ),
    Rule(
        "output_sqnr_db",
        _FOUR_BITS,
        10.0,
        True,
        "its outputs lose much: the errors add up in large terms that nearly cancel",
        "more, and more varied, calibration samples; or fp8",
    ),
)


def findings_of(layers: Sequence[Layer], algorithm: str) -> tuple[Finding, ...]:
    """Names the layers that break a rule, those that are furthest out first.

    Args:
        layers: All layers.
        algorithm: Our name of the algorithm.
    """
    found = [rule.finding(layer) for layer in layers for rule in RULES if rule.broken_by(layer, algorithm)]
    return tuple(sorted(found, key=lambda finding: (-abs(finding.value - finding.limit), finding.layer)))
