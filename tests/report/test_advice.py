# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Layers that stand out are named with what to try."""

from dataclasses import fields

import pytest

from nemo_ptq.config import CUSTOM
from nemo_ptq.options import OPTIONS
from nemo_ptq.quantization.algorithms import ALGORITHMS, algorithm_named
from nemo_ptq.report.advice import findings_of
from nemo_ptq.report.records import Layer


def test_sound_layers_are_not_named() -> None:
    sound = Layer(0, "qkv", "FP8", 31.5, 31.5, 30.0)
    assert findings_of([sound], "fp8") == ()


def test_the_worst_comes_first() -> None:
    layers = [Layer(0, "fc2", "W4A16_AWQ", 14.0), Layer(1, "fc2", "W4A16_AWQ", 8.0), Layer(2, "fc2", "W4A16_AWQ", 20.0)]
    worst, other = findings_of(layers, "int4_awq")
    assert (worst.layer, worst.kind, worst.figure, worst.value, worst.limit) == (1, "fc2", "weight_sqnr_db", 8.0, 15.0)
    assert "awq_block_size" in worst.advice
    assert other.layer == 0


def test_a_weight_that_was_moved_on_purpose_is_not_named() -> None:
    layers = [Layer(0, "fc2", "W4A16_AWQ", 8.0, None, 9.0)]
    (finding,) = findings_of(layers, "int4_awq", moves_weights=True)
    assert finding.figure == "output_sqnr_db"
    assert findings_of(layers, "int4_awq", moves_weights=True, moves_outputs=True) == ()


def test_what_was_not_measured_breaks_no_rule() -> None:
    assert findings_of([Layer(0, "qkv", None)], "int8_sq") == ()


@pytest.mark.parametrize("name", [*ALGORITHMS, CUSTOM])
def test_limits_speak_of_figures_and_options_that_exist(name: str) -> None:
    limits = algorithm_named(name).limits
    assert {limit.figure for limit in limits} <= {field.name for field in fields(Layer)}
    words = " ".join(limit.advice for limit in limits).replace(",", " ").replace(":", " ").split()
    assert {word for word in words if word.startswith("quantization_config.")} <= OPTIONS.keys()


@pytest.mark.parametrize("name", [*ALGORITHMS, CUSTOM])
def test_every_algorithm_that_quantizes_has_a_limit_for_its_weights(name: str) -> None:
    algorithm = algorithm_named(name)
    assert ("weight_sqnr_db" in {limit.figure for limit in algorithm.limits}) == algorithm.quantizes
