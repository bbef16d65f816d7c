# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""An algorithm's record agrees with the tables that it stands for, and is found by its name."""

import json
from importlib.resources import files

import pytest

from nemo_ptq.config import CUSTOM, NO_QUANT, QUALITIES, QuantizationConfig
from nemo_ptq.errors import PtqError
from nemo_ptq.plugins import locate
from nemo_ptq.quantization.algorithms import (
    ALGORITHMS,
    Algorithm,
    algorithm_named,
    algorithm_of,
    amax_floor,
    moves_weights,
    register,
)
from nemo_ptq.quantization.schemes import scheme_for

QUANTIZED = [algorithm for algorithm in ALGORITHMS.values() if algorithm.quantizes]


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=lambda algorithm: algorithm.name)
def test_the_record_says_what_its_scheme_says(algorithm: Algorithm) -> None:
    scheme = scheme_for(algorithm.scheme)
    assert algorithm.quant_algo == scheme.quant_algo
    assert (algorithm.row_multiple, algorithm.column_multiple) == (scheme.row_multiple, scheme.column_multiple)


@pytest.mark.parametrize("algorithm", QUANTIZED, ids=lambda algorithm: algorithm.name)
def test_method_and_preset_are_there(algorithm: Algorithm) -> None:
    presets = json.loads(files("nemo_ptq.quantization").joinpath("modelopt_presets.json").read_text())
    assert algorithm.preset in (None, *presets["algorithms"])
    if not algorithm.needs_data:
        assert algorithm.method is None and algorithm.entries == ()
        return
    assert algorithm.method is not None and algorithm.preset is not None
    method = locate(algorithm.method)(**algorithm.settings(QuantizationConfig(algorithm.name), "llama"))
    assert callable(method.statistic) and callable(method.decide)


@pytest.mark.parametrize("algorithm", QUANTIZED, ids=lambda algorithm: algorithm.name)
def test_memory_is_told_of_what_is_packed(algorithm: Algorithm) -> None:
    assert 0.5 <= algorithm.packed_bytes <= 1.0 and algorithm.packing_bytes > 0


@pytest.mark.parametrize(
    ("algorithm", "decoder", "floor"),
    [
        ("fp8", "gpt", 4.48),
        ("int8_sq", "gpt", 1.27),
        ("fp8", "llama", None),
        ("int4_awq", "gpt", None),
        ("w4a8_awq", "gpt", None),
        ("nvfp4", "gpt", None),
        (None, "gpt", None),
        ("config.json", "gpt", None),
    ],
)
def test_activations_of_gpt_have_a_floor(algorithm: str, decoder: str, floor: float | None) -> None:
    assert amax_floor(QuantizationConfig(algorithm), decoder) == pytest.approx(floor)


def test_w4a8_tries_coarse_exponents_where_finer_ones_overflow() -> None:
    settings = ALGORITHMS["w4a8_awq"].settings
    assert settings(QuantizationConfig("w4a8_awq"), "gemma")["exponent_step"] == 1.0
    assert settings(QuantizationConfig("w4a8_awq"), "llama")["exponent_step"] == 0.1


@pytest.mark.parametrize(
    ("algorithm", "moving"),
    [
        ("fp8", ["max"]),
        ("int8_sq", ["max"]),
        ("int4_awq", ["balanced", "max"]),
        ("nvfp4", ["balanced", "max"]),
        ("auto", ["balanced", "max"]),  # one of its candidates has four bits
    ],
)
def test_weights_of_four_bits_are_moved_and_with_max_all(algorithm: str, moving: list[str]) -> None:
    assert [quality for quality in QUALITIES if moves_weights(QuantizationConfig(algorithm, quality=quality))] == moving


def test_none_and_files_have_records() -> None:
    assert algorithm_of(QuantizationConfig(None)).name == NO_QUANT
    assert algorithm_of(QuantizationConfig("my.yaml")).name == CUSTOM


def test_an_unknown_name_is_told_its_neighbour() -> None:
    with pytest.raises(PtqError, match=r"algorithm=int4_akq is not known: did you mean int4_awq\?"):
        algorithm_named("int4_akq")


@pytest.mark.parametrize("name", ["fp8", CUSTOM])
def test_a_name_is_taken_once(name: str) -> None:
    with pytest.raises(PtqError, match=f"there is an algorithm {name} already"):
        register(Algorithm(name, "another"))
