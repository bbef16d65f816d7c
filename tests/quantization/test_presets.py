# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The presets that are kept as data are those of the installed ModelOpt, and the user's settings reach them."""

from typing import Any

import pytest

from nemo_ptq.config import QuantizationConfig
from nemo_ptq.quantization.algorithms import ALGORITHMS
from nemo_ptq.quantization.presets import kv_cache_config, preset_config
from tests.ranks import run_ranks

QUANTIZED = [name for name, algorithm in ALGORITHMS.items() if algorithm.preset is not None]


def modelopts_presets() -> tuple[dict[str, Any], dict[str, Any]]:
    """ModelOpt's presets for our algorithms, and those of KV caches, as JSON has them."""
    import modelopt.torch.quantization as mtq

    from nemo_ptq.modelopt.quantizers import as_json

    presets = {
        "fp8": mtq.FP8_DEFAULT_CFG,
        "int8_sq": mtq.INT8_SMOOTHQUANT_CFG,
        "int4_awq": mtq.INT4_AWQ_CFG,
        "w4a8_awq": mtq.W4A8_AWQ_BETA_CFG,
        "nvfp4": mtq.NVFP4_DEFAULT_CFG,
        "fp8_dynamic": mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG,
        "w4a16_nvfp4": mtq.W4A16_NVFP4_CFG,
    }
    caches = {"fp8": mtq.FP8_KV_CFG, "nvfp4": mtq.NVFP4_KV_CFG}
    return as_json(presets), {name: as_json(config)["quant_cfg"] for name, config in caches.items()}


def method(config: dict[str, Any]) -> str:
    algorithm = config["algorithm"]
    return algorithm["method"] if isinstance(algorithm, dict) else algorithm


def test_the_presets_are_modelopts() -> None:
    ((presets, kv_caches),) = run_ranks(modelopts_presets, 1)
    assert presets.keys() == set(QUANTIZED)
    for algorithm, expected in presets.items():
        found = preset_config(QuantizationConfig(algorithm, enable_kv_cache=False), "llama")
        assert found["quant_cfg"] == expected["quant_cfg"], algorithm
        assert method(found) == method(expected), algorithm
    for qformat, entries in kv_caches.items():
        assert kv_cache_config(qformat) == entries


@pytest.mark.parametrize("algorithm", QUANTIZED)
def test_a_config_may_be_changed(algorithm: str) -> None:
    quantization = QuantizationConfig(algorithm)
    before = preset_config(quantization, "llama")
    changed = preset_config(quantization, "llama")
    changed["quant_cfg"][1].clear()
    changed["quant_cfg"].clear()
    kv_cache_config("fp8")[0].clear()
    assert preset_config(quantization, "llama") == before


def test_there_is_no_config_where_modelopt_has_no_preset() -> None:
    assert preset_config(QuantizationConfig("int8_dynamic"), "llama") == {}


def weights_of(config: dict[str, Any]) -> Any:
    return [entry["cfg"] for entry in config["quant_cfg"] if entry["quantizer_name"] == "*weight_quantizer"][-1]


@pytest.mark.parametrize("size", [64, 128])
def test_the_block_size_is_the_users(size: int) -> None:
    awq = preset_config(QuantizationConfig("int4_awq", awq_block_size=size), "llama")
    assert weights_of(awq)["block_sizes"]["-1"] == size
    w4a8 = preset_config(QuantizationConfig("w4a8_awq", awq_block_size=size), "llama")
    assert weights_of(w4a8)[0]["block_sizes"]["-1"] == size
    assert "block_sizes" not in weights_of(w4a8)[1]


def test_the_migration_strength_is_the_users() -> None:
    config = preset_config(QuantizationConfig("int8_sq", sq_alpha=0.8), "llama")
    assert config["algorithm"] == {"method": "smoothquant", "alpha": 0.8}


@pytest.mark.parametrize(
    ("algorithm", "decoder", "step"),
    [("int4_awq", "llama", 0.1), ("int4_awq", "gemma", 0.1), ("w4a8_awq", "llama", 0.1), ("w4a8_awq", "gemma", 1.0)],
)
def test_w4a8_on_gemma_tries_the_extremes_only(algorithm: str, decoder: str, step: float) -> None:
    quantization = QuantizationConfig(algorithm)
    assert preset_config(quantization, decoder)["algorithm"] == {"method": "awq_lite", "alpha_step": step}


@pytest.mark.parametrize(
    ("algorithm", "wanted", "decoder", "is_quantized"),
    [
        ("fp8", None, "llama", True),
        ("fp8", None, "gpt", False),
        ("int4_awq", None, "llama", False),
        ("int4_awq", True, "gpt", True),
        ("fp8", False, "llama", False),
    ],
)
def test_the_kv_cache_is_quantized_where_it_is_wanted(
    algorithm: str, wanted: bool | None, decoder: str, is_quantized: bool
) -> None:
    config = preset_config(QuantizationConfig(algorithm, enable_kv_cache=wanted), decoder)
    entries = [entry for entry in config["quant_cfg"] if "bmm_quantizer" in entry["quantizer_name"]]
    assert any(entry.get("enable", True) for entry in entries) == is_quantized
