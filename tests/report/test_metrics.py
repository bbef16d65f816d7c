# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Sums of shards give the figures of whole layers."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_ptq.report.metrics import (
    LinearSums,
    Sums,
    expert_records,
    join_shards,
    layer_records,
    quantiles,
    with_rounding,
)
from nemo_ptq.report.records import ExpertTokens, Layer


def sums(values: np.ndarray, step: float | None = None) -> Sums:
    """Of values, and of their rounding to multiples of ``step``."""
    noise = None if step is None else float(np.square(values - np.round(values / step) * step).sum())
    return Sums(values.size, float(np.square(values).sum()), noise, float(np.abs(values).max(initial=0.0)))


def test_noise_in_decibels() -> None:
    assert Sums(10, 1000.0, 1.0, 20.0).sqnr_db == pytest.approx(30.0)
    assert Sums(10, 1000.0, 1000.0, 20.0).sqnr_db == pytest.approx(0.0)
    assert Sums(10, 1000.0, None, 20.0).sqnr_db is None


def test_lossless_and_empty_tensors_have_no_noise_figure() -> None:
    assert Sums(10, 1000.0, 0.0, 20.0).sqnr_db is None
    assert Sums(10, 0.0, 1.0, 0.0).sqnr_db is None
    assert Sums().outlier_ratio is None


def test_a_uniform_rounding_loses_what_theory_says() -> None:
    """A step of d leaves noise of d^2 / 12: six decibels for each bit."""
    values = np.random.default_rng(0).uniform(-1, 1, 200_000)
    for bits in (4, 6, 8):
        step = 2 / 2**bits
        assert sums(values, step).sqnr_db == pytest.approx(10 * math.log10((1 / 3) / (step**2 / 12)), abs=0.05)


def test_an_outlier_shows() -> None:
    assert sums(np.ones(1000)).outlier_ratio == 1
    assert sums(np.array([*np.ones(9999), 100.0])).outlier_ratio == pytest.approx(100 / math.sqrt(2), rel=1e-3)


@settings(deadline=None)
@given(st.integers(0, 10_000), st.lists(st.integers(1, 199), max_size=4))
def test_figures_do_not_depend_on_how_a_tensor_is_cut(seed: int, cuts: list[int]) -> None:
    values = np.random.default_rng(seed).standard_t(3, 200)
    whole = sums(values, 0.1)
    parts = sum((sums(part, 0.1) for part in np.split(values, sorted(cuts))), Sums())
    assert parts.count == whole.count
    assert parts.sqnr_db == pytest.approx(whole.sqnr_db)
    assert parts.outlier_ratio == pytest.approx(whole.outlier_ratio)


def linear(row_parallel: bool, seed: float) -> LinearSums:
    return LinearSums(
        "FP8",
        row_parallel,
        Sums(10, 100.0, 1.0, seed),
        Sums(4, 16.0, 0.5, 2.0),
        Sums(6, 36.0, 0.25, 3.0),
        input_amax=7.0,
        pre_quant_scale=np.array([seed, seed], np.float32),
    )


def test_column_parallel_shards_have_the_same_inputs() -> None:
    joined = join_shards([linear(False, 1.0), linear(False, 2.0)])
    assert joined.weight == Sums(20, 200.0, 2.0, 2.0)
    assert joined.inputs == Sums(4, 16.0, 0.5, 2.0)
    assert joined.outputs == Sums(12, 72.0, 0.5, 3.0)
    assert joined.pre_quant_scale.tolist() == [1, 1]


def test_row_parallel_shards_have_the_same_outputs() -> None:
    joined = join_shards([linear(True, 1.0), linear(True, 2.0)])
    assert joined.inputs == Sums(8, 32.0, 1.0, 2.0)
    assert joined.outputs == Sums(6, 36.0, 0.25, 3.0)
    assert joined.pre_quant_scale.tolist() == [1, 1, 2, 2]


def test_records_are_sorted_experts_joined_and_copies_left_out() -> None:
    qkv, fc1 = "decoder.layers.1.self_attention.linear_qkv", "decoder.layers.0.mlp.experts.local_experts.{}.linear_fc1"
    rank0 = {qkv: linear(False, 1.0), fc1.format(0): linear(False, 1.0)}
    rank1 = {qkv: linear(False, 9.0), fc1.format(1): linear(False, 2.0)}
    records = layer_records([rank0, rank1], {qkv: [0], fc1.format(0): [0], fc1.format(1): [1]})
    assert [(record.layer, record.kind) for record in records] == [(0, "experts.fc1"), (1, "qkv")]
    experts, attention = records
    assert attention.weight_amax == 1
    assert experts.weight_amax == 2
    assert experts.weight_sqnr_db == pytest.approx(20.0)
    assert experts.pre_quant_scale is not None
    assert experts.pre_quant_scale[0] == 1
    assert experts.pre_quant_scale[-1] == 2


def test_quantized_layers_say_how_they_are_rounded() -> None:
    layers = [Layer(0, "qkv", "FP8"), Layer(1, "qkv", None), Layer(2, "qkv", "FP8")]

    def roundings(by_data: bool, nearest: list[int] | None) -> list[str | None]:
        return [layer.rounding for layer in with_rounding(layers, by_data, nearest)]

    assert roundings(False, []) == ["nearest", None, "nearest"]
    assert roundings(True, []) == ["gptq", None, "gptq"]
    assert roundings(True, [2]) == ["gptq", None, "nearest"]
    assert roundings(True, None) == [None, None, None]


def test_quantiles_go_from_the_least_to_the_largest() -> None:
    assert quantiles(np.arange(101.0)) == (0, 5, 25, 50, 75, 95, 100)


def test_expert_counts_by_layer() -> None:
    assert expert_records({(1, 0): 5, (0, 1): 2, (0, 0): 1, (1, 1): 0}) == (
        ExpertTokens(0, (1, 2)),
        ExpertTokens(1, (5, 0)),
    )
