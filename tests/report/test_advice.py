# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Layers that stand out are named with what to try."""

from dataclasses import fields

from nemo_ptq.config import ALGORITHMS, CUSTOM
from nemo_ptq.options import OPTIONS
from nemo_ptq.report.advice import RULES, findings_of
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


def test_what_was_not_measured_breaks_no_rule() -> None:
    assert findings_of([Layer(0, "qkv", None)], "int8_sq") == ()


def test_rules_speak_of_figures_algorithms_and_options_that_exist() -> None:
    figures = {field.name for field in fields(Layer)}
    for rule in RULES:
        assert rule.figure in figures
        assert set(rule.algorithms) <= {*ALGORITHMS, CUSTOM}
        words = rule.advice.replace(",", " ").replace(":", " ").split()
        options = [word for word in words if word.startswith("quantization_config.")]
        assert all(option in OPTIONS for option in options)


def test_every_algorithm_that_quantizes_has_rules_for_its_weights() -> None:
    judged = {algorithm for rule in RULES if rule.figure == "weight_sqnr_db" for algorithm in rule.algorithms}
    assert judged == {*ALGORITHMS, CUSTOM} - {"no_quant"}
