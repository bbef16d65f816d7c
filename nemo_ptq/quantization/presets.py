# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Each of our algorithms in ModelOpt's terms, as data: ModelOpt itself takes many seconds to import.

``modelopt_presets.json`` holds ModelOpt's presets (``modelopt.torch.quantization.FP8_DEFAULT_CFG`` and the others); a
test compares it with the installed ModelOpt.
"""

import json
from functools import cache
from importlib.resources import files
from typing import Any

from nemo_ptq.config import QuantizationConfig
from nemo_ptq.quantization.algorithms import algorithm_of, kv_cache_is_quantized


@cache
def _presets() -> str:
    return files("nemo_ptq.quantization").joinpath("modelopt_presets.json").read_text(encoding="utf-8")


def preset_config(quantization: QuantizationConfig, decoder: str) -> dict[str, Any]:
    """Returns ModelOpt's configuration of one of our algorithms, as JSON has it and free to be changed.

    It is empty where ModelOpt has no equivalent preset.

    Args:
        quantization: The user's configuration.
        decoder: Decoder type of the model, e.g. "llama".
    """
    presets, algorithm = json.loads(_presets()), algorithm_of(quantization)
    if algorithm.preset is None:
        return {}
    preset = presets["algorithms"][algorithm.preset]
    config = {"quant_cfg": preset["quantizers"] + presets["left_alone"], "algorithm": preset["method"]}
    if algorithm.takes_block_size:
        _set_block_size(config, quantization.awq_block_size)
    if algorithm.preset_method is not None:
        config["algorithm"] = algorithm.preset_method(quantization, decoder)
    if kv_cache_is_quantized(quantization, decoder):
        config["quant_cfg"] += kv_cache_config(quantization.kv_cache_qformat)
    return config


@cache
def preset_patterns() -> frozenset[str]:
    """Returns the patterns of quantizers in all presets, some of which match nothing in most models."""
    presets = json.loads(_presets())
    lists = [preset["quantizers"] for preset in presets["algorithms"].values()]
    lists += [presets["left_alone"], *presets["kv_cache"].values()]
    return frozenset(entry["quantizer_name"] for entries in lists for entry in entries)


def kv_cache_config(qformat: str) -> list[dict[str, Any]]:
    """Returns the entries of ``quant_cfg`` that quantize a KV cache."""
    return json.loads(_presets())["kv_cache"][qformat]


def _set_block_size(config: dict[str, Any], block_size: int) -> None:
    for entry in config["quant_cfg"]:
        if entry["quantizer_name"] == "*weight_quantizer":
            stages = entry["cfg"] if isinstance(entry["cfg"], list) else [entry["cfg"]]
            stages[0]["block_sizes"]["-1"] = block_size
