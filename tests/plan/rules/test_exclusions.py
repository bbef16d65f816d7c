# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Rules of what is left out of the quantization."""

from dataclasses import replace
from typing import Any

import pytest

from nemo_ptq.config import ExportConfig, QuantizationConfig
from nemo_ptq.models.registry import family_of
from nemo_ptq.plan import make_plan
from nemo_ptq.plan.rules.exclusions import (
    excluded_layers_can_be_named,
    excluded_layers_exist,
    kv_cache_alone_is_possible,
)
from nemo_ptq.plan.rules.format_limits import experts_have_a_format, kv_cache_has_layers
from nemo_ptq.plan.rules.quantization_limits import (
    awq_blocks_fit_calibration,
    awq_blocks_fit_inference,
    nvfp4_blocks_fit,
)
from nemo_ptq.quantization.excluded import unquantized_layers
from tests.plan.models import LLAMA_8B, MIXTRAL
from tests.plan.rules.examples import expect

DOWN = unquantized_layers(QuantizationConfig(exclude="*linear_fc*"), LLAMA_8B)
SOME = unquantized_layers(QuantizationConfig(exclude="3"), LLAMA_8B)


@pytest.mark.parametrize(
    ("exclude", "algorithm", "message"),
    [
        (None, "no_quant", None),
        (["*down_proj*", "0"], "fp8", None),
        ("*down_prj*", "fp8", "quantization_config.exclude=*down_prj* matches no layer: did you mean *down_proj?"),
        ("0", "no_quant", "quantization_config.exclude=0 with no_quant, which quantizes nothing: leave it out"),
        ("0", "config.json", None),
    ],
)
def test_excluded_layers_exist(exclude: Any, algorithm: str, message: str | None) -> None:
    expect(excluded_layers_exist(exclude, algorithm, LLAMA_8B), message)


def test_a_quantized_checkpoint_is_as_it_is() -> None:
    quantized = replace(LLAMA_8B, is_quantized=True)
    expect(excluded_layers_exist("0", "fp8", quantized), "with a checkpoint that is quantized already")


def test_stages_count_from_zero() -> None:
    assert excluded_layers_can_be_named("3", SOME, ["trtllm"], 1, LLAMA_8B) is None
    assert excluded_layers_can_be_named("*linear_fc*", DOWN, ["trtllm"], 2, LLAMA_8B) is None
    assert excluded_layers_can_be_named("3", SOME, ["hf"], 2, LLAMA_8B) is None
    problem = excluded_layers_can_be_named("3", SOME, ["hf", "trtllm"], 2, LLAMA_8B)
    expect(problem, "use inference_pp=1, or export_format=hf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"kv_cache_only": False, "algorithm": "int8_sq"}, None),
        ({"algorithm": "int8_sq"}, "leaves all weights in 16 bits: leave quantization_config.algorithm out"),
        ({"quality": "balanced"}, "leave quantization_config.quality out"),
        ({"exclude": "0"}, "leave quantization_config.exclude out"),
        ({"enable_kv_cache": False}, "leave quantization_config.enable_kv_cache out"),
        (
            {"formats": ["hf"]},
            "does not go into export_format=hf: its readers want quantized weights; use",
        ),
        ({"model": replace(LLAMA_8B, is_quantized=True)}, "quantized already"),
    ],
)
def test_a_kv_cache_alone(changes: dict[str, Any], message: str | None) -> None:
    values = {"kv_cache_only": True, "algorithm": "fp8", "quality": "fast", "exclude": None, "enable_kv_cache": None}
    values |= {"formats": ["trtllm", "compressed_tensors"], "model": LLAMA_8B, **changes}
    expect(kv_cache_alone_is_possible(**values), message)


def test_one_layer_for_queries_keys_and_values_has_no_place_for_scales() -> None:
    family = family_of("StarcoderConfig")
    expect(kv_cache_has_layers(family, "gpt", ["compressed_tensors"], "fp8", None, True), "leave out kv_cache_only")
    assert kv_cache_has_layers(family, "gpt", ["trtllm"], "fp8", None, True) is None


def test_sizes_of_what_is_not_quantized_do_not_matter() -> None:
    odd = replace(LLAMA_8B, ffn_hidden_size=14336 + 96)
    excluded = unquantized_layers(QuantizationConfig(exclude="*linear_fc*"), odd)
    for apply in (
        lambda *rest: awq_blocks_fit_calibration("int4_awq", 128, 1, odd, *rest),
        lambda *rest: awq_blocks_fit_inference("int4_awq", 128, ["trtllm"], 1, odd, *rest),
        lambda *rest: nvfp4_blocks_fit("nvfp4", ["trtllm"], 1, odd, *rest),
    ):
        expect(apply(), "ffn_hidden_size 14432")
        assert apply(excluded) is None
        expect(apply(unquantized_layers(QuantizationConfig(exclude="0"), odd)), "ffn_hidden_size 14432")


def test_experts_that_are_excluded_need_no_format() -> None:
    expect(experts_have_a_format("int4_awq", ["hf"], MIXTRAL), "or leave the experts out with quantization_config")
    excluded = unquantized_layers(QuantizationConfig(exclude="*experts*"), MIXTRAL)
    assert experts_have_a_format("int4_awq", ["hf"], MIXTRAL, excluded) is None


def test_the_plan_counts_what_is_excluded() -> None:
    sizes = {}
    for exclude in (None, "last4", "*linear_fc*"):
        plan = make_plan(LLAMA_8B, QuantizationConfig("int4_awq", exclude=exclude), ExportConfig("OUT"))
        assert plan.ok
        sizes[exclude] = sum(file.bytes for file in plan.files)
    assert sizes[None] < sizes["last4"] < sizes["*linear_fc*"]
    wrong = make_plan(LLAMA_8B, QuantizationConfig(exclude="*down_prj*"), ExportConfig("OUT"))
    assert [line.name for line in wrong.rules if line.problem] == ["excluded_layers_exist"]
    unnamed = make_plan(LLAMA_8B, QuantizationConfig(exclude="0"), ExportConfig("OUT", inference_pp=2))
    assert [line.name for line in unnamed.rules if line.problem] == ["excluded_layers_can_be_named"]
