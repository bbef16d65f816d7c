# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What is left out of the quantization: there is such a thing, and the files can say so."""

from collections.abc import Sequence
from typing import Any

from nemo_ptq.config import FAST, NO_QUANT, QuantizationConfig
from nemo_ptq.errors import PtqError
from nemo_ptq.export.formats import FORMATS
from nemo_ptq.export.trtllm.exclusions import exclude_modules
from nemo_ptq.models.spec import ModelSpec
from nemo_ptq.quantization.excluded import unquantized_layers


def excluded_layers_exist(exclude: Any, algorithm: str | None, model: ModelSpec) -> str | None:
    """Every pattern matches layers of the model, and something is left to be quantized."""
    quantization = QuantizationConfig(algorithm, exclude=exclude)
    if not quantization.exclusions:
        return None
    shown = ",".join(quantization.exclusions)
    if quantization.algorithm_name == NO_QUANT:
        return f"quantization_config.exclude={shown} with no_quant, which quantizes nothing: leave it out"
    if model.is_quantized:
        return f"quantization_config.exclude={shown} with a checkpoint that is quantized already: leave it out"
    try:
        unquantized_layers(quantization, model)
    except PtqError as error:
        return str(error)
    return None


def excluded_layers_can_be_named(
    exclude: Any, unquantized: frozenset[str], formats: Sequence[str], inference_pp: int, model: ModelSpec
) -> str | None:
    """The files can say which layers are not quantized."""
    if exclude is None or not any(FORMATS[name].is_tensorrt_llm for name in formats):
        return None
    try:
        exclude_modules(model, unquantized, inference_pp)
    except PtqError as error:
        return f"quantization_config.exclude: {error}, or export_format=hf"
    return None


def kv_cache_alone_is_possible(
    kv_cache_only: bool,
    algorithm: str | None,
    quality: str,
    exclude: Any,
    enable_kv_cache: bool | None,
    formats: Sequence[str],
    model: ModelSpec,
) -> str | None:
    """With the KV cache alone nothing else is asked for, and the format's readers take it."""
    if not kv_cache_only:
        return None
    option = "quantization_config.kv_cache_only=true"
    if model.is_quantized:
        return f"{option} with a checkpoint that is quantized already: leave it out"
    default = QuantizationConfig()
    others = {
        "algorithm": algorithm != default.algorithm,
        "quality": quality != FAST,
        "exclude": exclude is not None,
        "enable_kv_cache": enable_kv_cache is False,
    }
    for name, asked in others.items():
        if asked:
            return f"{option} leaves all weights in 16 bits: leave quantization_config.{name} out"
    for name in formats:
        if reason := FORMATS[name].without_kv_cache_alone:
            return f"{option} does not go into export_format={name}: {reason}"
    return None
