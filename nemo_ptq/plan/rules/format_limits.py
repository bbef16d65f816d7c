# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The formats of the export: each can hold what is asked of it."""

from collections.abc import Sequence
from typing import Any

from nemo_ptq.config import DTYPES, FP8_CACHE, NO_QUANT, QuantizationConfig
from nemo_ptq.export.formats import FORMATS
from nemo_ptq.export.servers import LOADS, REFUSED, SERVERS, Export, answer
from nemo_ptq.models.registry import Family
from nemo_ptq.models.spec import ModelSpec
from nemo_ptq.quantization.algorithms import algorithm_of, kv_cache_is_quantized

# Elements of a head that share a scale in an NVFP4 KV cache.
_NVFP4_BLOCK = 16


def family_has_class(model: ModelSpec, family: Family, formats: Sequence[str]) -> str | None:
    """A format that is a Hugging Face directory is for a family that transformers has a class for."""
    asked = _hugging_face(formats)
    if asked and family.without_hugging_face:
        return (
            f"export_config.export_format={asked[0]}: {family.without_hugging_face} "
            f"({model.config_class.rpartition('.')[2]}); use export_format=trtllm"
        )
    return None


def formats_know_model(model: ModelSpec, formats: Sequence[str]) -> str | None:
    """Every format asked for can describe the model."""
    for name in formats:
        if model.state_space is None and (reason := FORMATS[name].obstacle(model)):
            return f"export_config.export_format={name}: {reason}; use another format"
    return None


def kv_cache_has_layers(
    family: Family,
    decoder: str,
    formats: Sequence[str],
    algorithm: str | None,
    enable_kv_cache: bool | None,
    kv_cache_only: bool = False,
) -> str | None:
    """A quantized KV cache in a Hugging Face directory needs layers k_proj and v_proj for its scales."""
    asked = _hugging_face(formats)
    wanted = QuantizationConfig(algorithm, enable_kv_cache=enable_kv_cache, kv_cache_only=kv_cache_only)
    quantizes = kv_cache_is_quantized(wanted, decoder)
    if asked and quantizes and family.hugging_face and not family.hugging_face.splits_qkv:
        way_out = "leave out kv_cache_only" if kv_cache_only else "set quantization_config.enable_kv_cache=false"
        return (
            f"the KV cache is quantized with export_format={asked[0]}: {family.name} has one layer for queries, keys "
            f"and values, and the format no place for its scales; {way_out}, or use export_format=trtllm"
        )
    return None


def kv_cache_has_a_format(
    kv_cache_qformat: str,
    formats: Sequence[str],
    algorithm: str | None,
    decoder: str,
    model: ModelSpec,
    enable_kv_cache: bool | None,
    kv_cache_only: bool = False,
) -> str | None:
    """Few servers have a KV cache in NVFP4, which takes its blocks from the heads."""
    wanted = QuantizationConfig(algorithm, enable_kv_cache=enable_kv_cache, kv_cache_only=kv_cache_only)
    option = f"quantization_config.kv_cache_qformat={kv_cache_qformat}"
    if kv_cache_qformat == FP8_CACHE:
        return None
    if not kv_cache_is_quantized(wanted, decoder):
        return f"{option}, and the KV cache is not quantized: set quantization_config.enable_kv_cache=true"
    for name in formats:
        if kv_cache_qformat not in FORMATS[name].cache_formats:
            return (
                f"{option} does not go into export_format={name}, whose readers have FP8 KV caches alone; "
                "use export_format=hf, or kv_cache_qformat=fp8"
            )
    if model.head_size % _NVFP4_BLOCK:
        return (
            f"{option} has blocks of {_NVFP4_BLOCK} of the elements of a head, of which the model has "
            f"{model.head_size}; use kv_cache_qformat=fp8"
        )
    return None


def experts_have_a_format(
    algorithm: str | None, formats: Sequence[str], model: ModelSpec, unquantized: frozenset[str] = frozenset()
) -> str | None:
    """Few formats describe quantized experts in more than FP8; pre-quantization scales none of them has for experts."""
    scheme = algorithm_of(QuantizationConfig(algorithm)).scheme
    if unquantized and not any(
        f"decoder.layers.{layer}.{module.name}" not in unquantized
        for layer, spec in enumerate(model.layers)
        for module in spec.modules
        if module.expert is not None
    ):
        return None
    for format in map(FORMATS.__getitem__, formats):
        known = [name for name in (*format.experts, NO_QUANT) if name not in format.refused]
        if model.num_experts is not None and scheme is not None and scheme not in format.experts:
            return (
                f"quantization_config.algorithm={algorithm} cannot be exported for a mixture of experts: the readers "
                f"of export_format={format.name} take quantized experts in {' or '.join(format.experts)} only; "
                f"use {' or '.join(known)}, or leave the experts out with quantization_config.exclude=[*experts*]"
            )
    return None


def formats_carry_algorithm(algorithm: str | None, formats: Sequence[str]) -> str | None:
    """Every export format can hold what the algorithm makes."""
    scheme = algorithm_of(QuantizationConfig(algorithm)).scheme
    for format in formats:
        if reason := FORMATS[format].refused.get(scheme or NO_QUANT):
            return f"quantization_config.algorithm={algorithm} does not go into export_format={format}: {reason}"
    return None


def server_loads_it(
    server: str | None,
    formats: Sequence[str],
    algorithm: str | None,
    model: ModelSpec,
    family: Family,
    decoder: str,
    enable_kv_cache: bool | None,
    kv_cache_qformat: str = FP8_CACHE,
) -> str | None:
    """The server that the export is for loads it, in its newest version that something is known of."""
    if server is None:
        return None
    quantization, asked = QuantizationConfig(algorithm, enable_kv_cache=enable_kv_cache), SERVERS[server]
    kv_cache = kv_cache_is_quantized(quantization, decoder)
    for format in formats:
        export = Export(
            format, quantization.algorithm_name, family.name, kv_cache, model.tied_embeddings, kv_cache_qformat
        )
        found = answer(asked, asked.versions[-1], export)
        if found.outcome != LOADS:
            why = f"refuses it: {found.note}" if found.outcome == REFUSED else "is not known to load it"
            return (
                f"export_config.server={server} with export_format={format}, algorithm={algorithm} and {family.name}: "
                f"{found.label} {why}; choose another format or algorithm, or leave server out"
            )
    return None


def nemo_is_stored_in_bfloat16(formats: Sequence[str], dtype: Any) -> str | None:
    """Format nemo holds the model in bfloat16, as it was calibrated."""
    for name in formats:
        if FORMATS[name].only_dtype not in (None, DTYPES[str(dtype)]):
            return (
                f"export_config.dtype={dtype} is not for export_format={name}, which holds the calibrated model: "
                "use bf16"
            )
    return None


def compressed_tensors_folds_again(formats: Sequence[str], model: ModelSpec) -> str | None:
    """compressed_tensors folds pre-quantization scales into weights that have none in them yet."""
    for name in formats:
        if model.is_quantized and FORMATS[name].adapts_state:
            return (
                f"export_config.export_format={name} is not for a checkpoint that is quantized already: give the "
                "unquantized one, and this one as calibration_state, or use another format"
            )
    return None


def formats_have_parallelism(formats: Sequence[str], inference_tp: int, inference_pp: int) -> str | None:
    """inference_tp and inference_pp are for a format whose files are cut for them."""
    if any(FORMATS[format].has_parallelism for format in formats):
        return None
    given = {"inference_tp": inference_tp, "inference_pp": inference_pp}
    wrong = [f"export_config.{name}={value}" for name, value in given.items() if value > 1]
    if wrong:
        return (
            f"{' and '.join(wrong)}: the files of export_format={','.join(formats)} have no parallelism, servers cut "
            "them as they load them; leave it out, and tell the server"
        )
    return None


def _hugging_face(formats: Sequence[str]) -> list[str]:
    return [name for name in formats if FORMATS[name].is_hugging_face]
