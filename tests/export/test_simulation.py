# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What is simulated of a layer is what its codes say, and an error of the size that the format has."""

from dataclasses import replace

import pytest
import torch

from nemo_ptq.config import QuantizationConfig
from nemo_ptq.export.calibrated import algorithm_scheme, weight_amax
from nemo_ptq.export.module_tensors import Linear
from nemo_ptq.export.simulation import rounded_input, rounded_weight, scaled_input
from nemo_ptq.quantization.activations import cache_scale, rounded_cache

# The share of the noise in the signal, in dB: about 6 for each bit, less where few weights share a scale.
SQNR = {
    **{"fp8": (28, 36), "int8_sq": (35, 50), "int4_awq": (15, 25), "w4a8_awq": (15, 25), "nvfp4": (15, 25)},
    **{"fp8_dynamic": (28, 36), "int8_dynamic": (35, 50), "w4a16_nvfp4": (15, 25)},
}
WEIGHTS_ALONE, DYNAMIC = ("int4_awq", "w4a16_nvfp4"), ("fp8_dynamic", "int8_dynamic")
ROUNDS_INPUTS = [name for name in SQNR if name not in WEIGHTS_ALONE]


def linear(algorithm: str) -> Linear:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 256, generator=generator).bfloat16()
    scheme = algorithm_scheme(QuantizationConfig(algorithm))
    return Linear(
        weight,
        None,
        scheme,
        weight_amax(weight, scheme),
        weight.abs().max() if algorithm == "w4a8_awq" else None,
        None if algorithm in (*WEIGHTS_ALONE, *DYNAMIC) else torch.tensor([4.0]),
    )


def inputs() -> torch.Tensor:
    return torch.randn(20, 256, generator=torch.Generator().manual_seed(1)).bfloat16()


def sqnr(exact: torch.Tensor, found: torch.Tensor) -> float:
    exact = exact.float()
    return float(10 * (exact.square().sum() / (exact - found.float()).square().sum()).log10())


@pytest.mark.parametrize("algorithm", SQNR)
def test_weights_are_rounded_as_much_as_the_format_does(algorithm: str) -> None:
    layer = linear(algorithm)
    found = rounded_weight(layer)
    assert (found.dtype, found.shape) == (torch.float32, layer.weight.shape)
    least, most = SQNR[algorithm]
    assert least < sqnr(layer.weight, found) < most


@pytest.mark.parametrize("algorithm", SQNR)
def test_a_rounded_weight_stays_what_it_is(algorithm: str) -> None:
    layer = linear(algorithm)
    once = rounded_weight(layer)
    again = rounded_weight(replace(layer, weight=once))
    torch.testing.assert_close(again, once, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("algorithm", ROUNDS_INPUTS)
def test_inputs_are_rounded_in_their_own_type(algorithm: str) -> None:
    found = rounded_input(inputs(), linear(algorithm))
    assert (found.dtype, found.shape) == (torch.bfloat16, inputs().shape)
    assert 10 < sqnr(inputs(), found) < 50


@pytest.mark.parametrize("algorithm", WEIGHTS_ALONE)
def test_weight_only_schemes_leave_inputs_alone(algorithm: str) -> None:
    assert torch.equal(rounded_input(inputs(), linear(algorithm)), inputs())


@pytest.mark.parametrize("algorithm", DYNAMIC)
def test_each_token_has_its_own_scale(algorithm: str) -> None:
    tokens = inputs() * torch.logspace(-3, 3, 20)[:, None]
    layer = linear(algorithm)
    found = rounded_input(tokens, layer)
    for token, rounded in zip(tokens, found, strict=True):
        assert 30 < sqnr(token, rounded) < 50
        assert torch.equal(rounded_input(token[None], layer)[0], rounded)


@pytest.mark.parametrize("algorithm", ["fp8", "int8_sq"])
def test_inputs_beyond_the_calibrated_amax_are_cut_off(algorithm: str) -> None:
    found = rounded_input(inputs() * 100, linear(algorithm))
    assert float(found.abs().max()) == pytest.approx(4.0, rel=2**-7)


def test_inputs_are_multiplied_with_the_pre_quantization_scale() -> None:
    layer = linear("int8_sq")
    assert scaled_input(inputs(), layer) is not None
    assert torch.equal(scaled_input(inputs(), layer), inputs())
    scale = torch.linspace(0.5, 2.0, 256).bfloat16()
    assert torch.equal(scaled_input(inputs(), replace(layer, pre_quant_scale=scale)), inputs() * scale)


def test_a_cache_is_rounded_to_fp8() -> None:
    values = inputs()
    found = rounded_cache(values, cache_scale(values.abs().max().reshape(1)), "fp8")
    assert found.dtype == torch.bfloat16
    assert 28 < sqnr(values, found) < 36
    codes = (found.float() / (values.abs().max().float() / 448)).to(torch.float8_e4m3fn)
    assert len(codes.view(torch.uint8).unique()) < 256
    cut = rounded_cache(values, cache_scale(torch.tensor([1.0])), "fp8")
    assert float(cut.abs().max()) == 1.0


def test_a_cache_is_rounded_to_nvfp4() -> None:
    """As ModelOpt's tensors are, with the scale that servers are given: the largest magnitude over 448."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    values = inputs()
    amax = values.abs().max().reshape(1).float()
    found = rounded_cache(values, cache_scale(amax), "nvfp4")
    packed, scale, scale_2 = NVFP4QTensor.quantize(values.float(), 16, weights_scaling_factor_2=amax / 448)
    expected = packed.dequantize(torch.float32, scale=scale, double_scale=scale_2, block_sizes={-1: 16})
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected.bfloat16())
    assert 18 < sqnr(values, found) < 22
