# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What is measured is what a whole, plain model says, at every parallelism."""

from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_ptq.config import QuantizationConfig
from nemo_ptq.report.records import Layer
from nemo_ptq.verify.evaluate import DocumentScore
from tests.families import TOKENS
from tests.ranks import run_ranks

TEXTS = [torch.randint(0, TOKENS, size, generator=torch.Generator().manual_seed(3)) for size in ((3, 40), (1, 9))]


def measured(
    checkpoint: Path, algorithm: str, tp: int, pp: int, ep: int, texts: list[torch.Tensor]
) -> tuple[tuple[Layer, ...], tuple[DocumentScore, ...]]:
    """In float32: rounding in bfloat16 would differ with the order of sums."""
    from tests import steps

    with steps.loaded(checkpoint, tp, pp, ep) as model:
        steps.in_float32(model)
        quantization = QuantizationConfig(algorithm)
        found = steps.measure(model, quantization, steps.calibrated_layers(model, quantization), texts)
    return found.layers, found.scores


def figures(layer: Layer) -> list[float]:
    numbers = [value for value in astuple(layer) if isinstance(value, float)]
    return numbers + list(layer.pre_quant_scale or ())


def assert_same(ours: tuple[Layer, ...], theirs: tuple[Layer, ...]) -> None:
    assert [(a.layer, a.kind, a.scheme) for a in ours] == [(b.layer, b.kind, b.scheme) for b in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert figures(a) == pytest.approx(figures(b), rel=1e-2)


@pytest.mark.parametrize("algorithm", ["fp8", "int8_sq", "int4_awq"])
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_parallelism_changes_no_figure(algorithm: str, tp: int, pp: int, checkpoint_of: Callable[[str], Path]) -> None:
    checkpoint = checkpoint_of("llama31")
    ((layers, scores),) = run_ranks(measured, 1, checkpoint, algorithm, 1, 1, 1, TEXTS)
    (parallel_layers, parallel_scores), *others = run_ranks(measured, tp * pp, checkpoint, algorithm, tp, pp, 1, TEXTS)
    assert_same(parallel_layers, layers)
    assert len(scores) == 4
    for a, b in zip(parallel_scores, scores, strict=True):
        assert (a.tokens, a.nll, a.baseline_nll) == pytest.approx((b.tokens, b.nll, b.baseline_nll), rel=2e-3)
        # A small difference of large numbers, which bfloat16 rounds in another order.
        assert a.kl_divergence == pytest.approx(b.kl_divergence, rel=0.1)
        # Which of two tokens comes first may hang on one rounding.
        assert abs(a.agreements - b.agreements) <= 1
    assert all(other == ((), ()) for other in others)


def test_experts_are_measured_wherever_they_are(checkpoint_of: Callable[[str], Path]) -> None:
    checkpoint = checkpoint_of("mixtral")
    ((alone, _),) = run_ranks(measured, 1, checkpoint, "fp8", 1, 1, 1, TEXTS)
    (spread, _), _ = run_ranks(measured, 2, checkpoint, "fp8", 1, 1, 2, TEXTS)
    assert {layer.kind for layer in alone} == {"qkv", "proj", "experts.fc1", "experts.fc2"}
    assert_same(spread, alone)


def by_hand(checkpoint: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Figures of one layer of an FP8 model: those measured, and the same from its tensors and their definitions."""
    from nemo_ptq.verify.dequantize import fake_quantize_fp8
    from tests import steps

    def sqnr(exact: torch.Tensor, found: torch.Tensor) -> float:
        return float(10 * (exact.square().sum() / (exact - found).square().sum()).log10())

    with steps.loaded(checkpoint) as model:
        steps.in_float32(model)
        quantization = QuantizationConfig("fp8", enable_kv_cache=False)
        layers = steps.calibrated_layers(model, quantization)
        linear: Any = model.module.decoder.layers[1].mlp.linear_fc2
        weight, seen = linear.weight, []
        hook = linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        measured = steps.measure(model, quantization, layers, TEXTS[:1]).layers[-1]
        hook.remove()
        # The last to pass are those of the calibrated model; the hook sees them before they are rounded.
        inputs = seen[-1]
        amax = layers.state["decoder.layers.1.mlp.linear_fc2.input_quantizer.amax"]
        rounded = fake_quantize_fp8(inputs, amax / 448)
        rounded_weight = fake_quantize_fp8(weight, weight.abs().max() / 448)
        truth = {
            "weight_sqnr_db": sqnr(weight, rounded_weight),
            "input_sqnr_db": sqnr(inputs, rounded),
            "output_sqnr_db": sqnr(inputs @ weight.T, rounded @ rounded_weight.T),
            "weight_amax": float(weight.abs().max()),
            "weight_outlier_ratio": float(weight.abs().max() / weight.square().mean().sqrt()),
            "input_amax": float(amax),
            "input_outlier_ratio": float(inputs.abs().max() / inputs.square().mean().sqrt()),
        }
    assert (measured.layer, measured.kind, measured.scheme) == (1, "fc2", "FP8")
    return {name: getattr(measured, name) for name in truth}, truth


def test_figures_are_those_of_their_definitions(checkpoint_of: Callable[[str], Path]) -> None:
    ((found, truth),) = run_ranks(by_hand, 1, checkpoint_of("llama2"))
    assert found == pytest.approx(truth, rel=1e-3)


def test_nvfp4_is_simulated_on_a_cpu(checkpoint_of: Callable[[str], Path]) -> None:
    ((layers, scores),) = run_ranks(measured, 1, checkpoint_of("llama2"), "nvfp4", 1, 1, 1, TEXTS)
    assert len(scores) == 4
    for layer in layers:
        assert layer.weight_sqnr_db is not None
        assert 15 < layer.weight_sqnr_db < 25
        assert layer.input_outlier_ratio is not None
        assert layer.input_sqnr_db is not None
        assert layer.output_sqnr_db is not None
        # Errors of weights and inputs add up.
        assert 10 < layer.output_sqnr_db < layer.weight_sqnr_db


def test_without_text_or_quantization_the_weights_are_looked_at(checkpoint_of: Callable[[str], Path]) -> None:
    ((layers, scores),) = run_ranks(measured, 1, checkpoint_of("gpt"), "no_quant", 1, 1, 1, [])
    assert scores == ()
    assert len(layers) == 2 * 4
    for layer in layers:
        assert layer.scheme is layer.weight_sqnr_db is layer.input_outlier_ratio is None
        assert layer.weight_outlier_ratio is not None
