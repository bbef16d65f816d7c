# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Calibrated layers: weights and a state become what ModelOpt makes of them, wherever the shards are."""

from typing import Any

import pytest
import torch

from nemo_ptq.config import NO_QUANT, QuantizationConfig
from nemo_ptq.export.calibrated import CalibratedLayers, algorithm_scheme, smoothed, weight_amax
from nemo_ptq.parallel.ranks import Ranks
from nemo_ptq.quantization.algorithms import ALGORITHMS
from tests.ranks import run_ranks

QKV, PROJ = "decoder.layers.0.self_attention.linear_qkv", "decoder.layers.0.self_attention.linear_proj"
NORM, CACHE = "decoder.layers.0.input_layernorm", "decoder.layers.0.self_attention.core_attention"
OUT, IN = 16, 256
QUANTIZED = [algorithm for algorithm in ALGORITHMS if algorithm != NO_QUANT]


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {f"{QKV}.weight": (OUT, IN), f"{QKV}.bias": (OUT,), f"{PROJ}.weight": (OUT, IN), f"{NORM}.weight": (IN,)}
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    entries = {}
    for name in (QKV, PROJ):
        entries[f"{name}.input_quantizer.pre_quant_scale"] = torch.rand(IN, generator=generator) + 0.5
        entries[f"{name}.input_quantizer.amax"] = torch.tensor([3.0], dtype=torch.bfloat16)
    return entries | {
        f"{CACHE}.{kind}_bmm_quantizer.amax": torch.tensor([value]) for kind, value in (("k", 5.0), ("v", 7.0))
    }


def layers(algorithm: str, **options: Any) -> CalibratedLayers:
    scheme = algorithm_scheme(QuantizationConfig(algorithm))
    schemes = {} if scheme.quant_algo is None else {QKV: scheme, PROJ: scheme}
    return CalibratedLayers(weights().get, state(), schemes, zero_centered_norms=False, **options)


def test_what_is_not_quantized_is_the_checkpoints() -> None:
    found = layers(NO_QUANT).linear(QKV)
    assert (found.scheme.quant_algo, found.weight_amax, found.pre_quant_scale) == (None, None, None)
    assert torch.equal(found.weight, weights()[f"{QKV}.weight"])
    assert found.bias is not None
    assert torch.equal(found.bias, weights()[f"{QKV}.bias"])
    assert not layers(NO_QUANT).is_quantized(QKV)


@pytest.mark.parametrize("algorithm", QUANTIZED)
def test_the_weight_is_smoothed_and_then_its_amax_is_computed(algorithm: str) -> None:
    found = layers(algorithm).linear(QKV)
    scale = state()[f"{QKV}.input_quantizer.pre_quant_scale"]
    weight = smoothed(weights()[f"{QKV}.weight"], scale)
    assert torch.equal(found.weight, weight)
    assert found.weight_amax is not None
    assert torch.equal(found.weight_amax, weight_amax(weight, found.scheme))
    assert found.pre_quant_scale is not None
    assert torch.equal(found.pre_quant_scale, scale.bfloat16())
    assert (found.weight_amax_2 is not None) == (algorithm == "w4a8_awq")


@pytest.mark.parametrize(
    ("algorithm", "shape"),
    [
        *((name, ()) for name in ("fp8", "nvfp4", "w4a16_nvfp4")),
        *((name, (OUT,)) for name in ("int8_sq", "fp8_dynamic", "int8_dynamic")),
        *((name, (OUT, IN // 128)) for name in ("int4_awq", "w4a8_awq")),
    ],
)
def test_weight_amaxes_have_the_schemes_shape(algorithm: str, shape: tuple[int, ...]) -> None:
    weight = weights()[f"{QKV}.weight"]
    found = weight_amax(weight, algorithm_scheme(QuantizationConfig(algorithm)))
    assert found.shape == shape
    assert float(found.max()) == float(weight.abs().max())


def test_block_sizes_are_the_users() -> None:
    assert algorithm_scheme(QuantizationConfig("int4_awq", awq_block_size=64)).block_size == 64
    assert algorithm_scheme(QuantizationConfig("nvfp4")).block_size == 16
    assert algorithm_scheme(QuantizationConfig(NO_QUANT)).quant_algo is None


def test_weights_that_are_smoothed_already_are_not_again() -> None:
    found = layers("int8_sq", is_smoothed=True).linear(QKV)
    assert torch.equal(found.weight, weights()[f"{QKV}.weight"])
    assert found.pre_quant_scale is not None


def test_given_weight_amaxes_are_used() -> None:
    given = torch.tensor(9.0)
    found = layers("fp8", weight_amaxes={QKV: (given, None)})
    assert found.linear(QKV).weight_amax is given
    assert found.linear(PROJ).weight_amax is not given


@pytest.mark.parametrize("zero_centered", [False, True])
def test_gains_may_be_kept_minus_one(zero_centered: bool) -> None:
    found = CalibratedLayers(weights().get, {}, {}, zero_centered)
    assert found.plain(NORM).offset == float(zero_centered)
    assert torch.equal(found.plain(NORM).weight, weights()[f"{NORM}.weight"])


def test_keys_and_values_have_an_amax_each() -> None:
    assert [float(amax) for amax in layers("fp8").kv_cache(CACHE)] == [5.0, 7.0]


def on_a_rank(algorithm: str) -> dict[str, list[torch.Tensor | None]]:
    """The layers on one of two ranks that share them."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    ranks = Ranks(dist.get_rank(), 2, dist.group.WORLD)
    own = {
        name: ranks.shard(value, 1 if name.startswith(PROJ) else 0) if name != f"{NORM}.weight" else value
        for name, value in weights().items()
    }
    scheme = algorithm_scheme(QuantizationConfig(algorithm))
    shared = CalibratedLayers(own.get, state(), {QKV: scheme, PROJ: scheme}, False, tensor=ranks)
    shared.agree_on_weights([QKV, PROJ])
    found = {name: shared.linear(name) for name in (QKV, PROJ)}
    return {
        name: [linear.weight, linear.weight_amax, linear.weight_amax_2, linear.input_amax, linear.pre_quant_scale]
        for name, linear in found.items()
    }


def joined(first: torch.Tensor, second: torch.Tensor, whole: torch.Tensor, dim: int) -> torch.Tensor:
    """Two ranks' shares of a tensor, or what both have of it."""
    if first.shape == whole.shape:
        assert torch.equal(first, second)
        return first
    return torch.cat([first, second], dim=min(dim, whole.dim() - 1))


@pytest.mark.parametrize("algorithm", QUANTIZED)
def test_ranks_that_share_layers_have_what_one_has(algorithm: str) -> None:
    first, second = run_ranks(on_a_rank, 2, algorithm)
    for name, dim in ((QKV, 0), (PROJ, 1)):
        linear = layers(algorithm).linear(name)
        expected = [linear.weight, linear.weight_amax, linear.weight_amax_2, linear.input_amax, linear.pre_quant_scale]
        for one, other, whole in zip(first[name], second[name], expected, strict=True):
            if whole is None:
                assert one is other is None
            else:
                assert one is not None
                assert other is not None
                assert torch.equal(joined(one, other, whole, dim), whole)
