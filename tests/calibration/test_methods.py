# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Each algorithm has its method, and each method decides from its statistic alone."""

from typing import Any

import pytest
import torch

from nemo_ptq.calibration.awq import search_scale
from nemo_ptq.calibration.methods import Awq, LinearShard, Max, Method, SmoothQuant, method_for
from nemo_ptq.calibration.smoothquant import smoothing_scale
from nemo_ptq.config import QuantizationConfig
from nemo_ptq.parallel.ranks import ALONE, Ranks
from tests.ranks import run_ranks

OUT, IN, BLOCK, TOKENS = 8, 256, 64, 40


def linear() -> LinearShard:
    generator = torch.Generator().manual_seed(0)
    return LinearShard("linear", torch.randn(OUT, IN, generator=generator).bfloat16())


def inputs() -> torch.Tensor:
    """With channels of very different sizes."""
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(TOKENS, IN, generator=generator) * torch.rand(IN, generator=generator) * 4).bfloat16()


def decided(method: Method, layer: LinearShard, seen: torch.Tensor) -> dict[str, torch.Tensor]:
    statistic = method.statistic(layer)
    statistic.observe(seen, layer.input_ranks.gather(seen))
    statistic.merge(layer.ranks, ALONE, layer.shares_inputs)
    return dict(method.decide(layer, statistic))


@pytest.mark.parametrize(
    ("algorithm", "decoder", "options", "expected"),
    [
        ("fp8", "llama", {}, Max()),
        ("nvfp4", "llama", {}, Max()),
        ("int8_sq", "llama", {"sq_alpha": 0.8}, SmoothQuant(0.8)),
        ("int4_awq", "llama", {"awq_block_size": 64}, Awq(64)),
        ("w4a8_awq", "llama", {}, Awq(128, rounds_inputs=True)),
        # Finer exponents overflow in TensorRT-LLM's kernels.
        ("w4a8_awq", "gemma", {}, Awq(128, 1.0, rounds_inputs=True)),
    ],
)
def test_algorithms_have_their_methods(algorithm: str, decoder: str, options: dict[str, Any], expected: Method) -> None:
    assert method_for(QuantizationConfig(algorithm, **options), decoder) == expected


@pytest.mark.parametrize(("algorithm", "floor"), [("fp8", 4.48), ("int8_sq", 1.27)])
def test_amaxes_of_gpt_decoders_have_a_floor(algorithm: str, floor: float) -> None:
    small = inputs() * 1e-3
    found = decided(method_for(QuantizationConfig(algorithm), "gpt"), linear(), small)
    assert float(found["amax"]) == pytest.approx(floor, rel=2**-8)
    assert float(decided(method_for(QuantizationConfig(algorithm), "llama"), linear(), small)["amax"]) < floor


def test_max_decides_the_largest_magnitude() -> None:
    found = decided(Max(), linear(), inputs())
    assert found.keys() == {"amax"}
    assert torch.equal(found["amax"], inputs().abs().max().reshape(1))


def test_smoothquant_decides_scales_and_what_they_leave() -> None:
    layer, seen = linear(), inputs()
    found = decided(SmoothQuant(0.5), layer, seen)
    channels = seen.abs().amax(0).float()
    assert torch.equal(found["channel_amax"], channels)
    assert torch.equal(found["pre_quant_scale"], smoothing_scale(channels, layer.weight.abs().amax(0), 0.5))
    smoothed = (channels.bfloat16() * found["pre_quant_scale"]).amax().bfloat16()
    assert torch.equal(found["amax"], smoothed.reshape(1))


@pytest.mark.parametrize("rounds_inputs", [False, True])
def test_awq_decides_the_searched_scale(rounds_inputs: bool) -> None:
    layer, seen = linear(), inputs()
    method = Awq(BLOCK, rounds_inputs=rounds_inputs)
    found = decided(method, layer, seen)
    assert found.keys() == ({"pre_quant_scale"} | ({"amax", "channel_amax"} if rounds_inputs else set()))
    statistic = method.statistic(layer)
    statistic.observe(seen, seen)
    assert torch.equal(found["pre_quant_scale"], 1 / search_scale(layer.weight, statistic, BLOCK))
    if rounds_inputs:
        assert torch.equal(found["channel_amax"], seen.abs().amax(0).float())


@pytest.mark.parametrize("method", [Max(), SmoothQuant(0.5), Awq(BLOCK, rounds_inputs=True)])
def test_the_weight_is_left_alone(method: Method) -> None:
    layer = linear()
    before = layer.weight.clone()
    decided(method, layer, inputs())
    assert torch.equal(layer.weight, before)


def on_a_shard(method: Method, shares_inputs: bool) -> dict[str, torch.Tensor]:
    """What two ranks decide of a layer that they share."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    ranks = Ranks(dist.get_rank(), 2, dist.group.WORLD)
    weight = ranks.shard(linear().weight, 1 if shares_inputs else 0)
    layer = LinearShard("linear", weight.contiguous(), shares_inputs, ranks)
    return decided(method, layer, ranks.shard(inputs()) if shares_inputs else inputs())


@pytest.mark.parametrize("shares_inputs", [False, True])
@pytest.mark.parametrize("method", [Max(), SmoothQuant(0.5), Awq(BLOCK, rounds_inputs=True)], ids=["max", "sq", "awq"])
def test_ranks_that_share_a_layer_decide_what_one_does(method: Method, shares_inputs: bool) -> None:
    expected = decided(method, linear(), inputs())
    for found in run_ranks(on_a_shard, 2, method, shares_inputs):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            # Sums of two ranks add up in another order.
            torch.testing.assert_close(found[name], value, rtol=1e-5 if name == "pre_quant_scale" else 2**-8, atol=0.0)
