# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""ModelOpt's unified checkpoint: a Hugging Face directory that vLLM, SGLang and TensorRT-LLM's PyTorch backend load.

The format is what ``modelopt.torch.export.export_hf_checkpoint`` writes; the rules of its readers are in
docs/formats.md. Pre-quantization scales of layers that follow a norm are folded into it, the others are stored.
"""

from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from nemo_ptq.errors import PtqError
from nemo_ptq.export.folding import follower_of, refuse_scaled_experts
from nemo_ptq.export.huggingface.hf_documents import (
    hugging_face_class,
    model_config,
    stored_vocab_size,
    write_json,
    write_model_documents,
)
from nemo_ptq.export.huggingface.hf_layout import HuggingFaceLayout
from nemo_ptq.export.huggingface.hf_modules import pack_unquantized
from nemo_ptq.export.packing import Packed, all_rows, kv_cache_scales, pack_linear, row_splitter
from nemo_ptq.export.source import PackedExport, Source
from nemo_ptq.models.mapping import is_linear
from nemo_ptq.quantization.schemes import Field, Scheme

_WEIGHT = Field("weight", None, lambda o, i, g: (o, i), 0, 1)
_INT4_WEIGHT = Field("weight", torch.uint8, lambda o, i, g: (o // 2, i), 0, 1)
_BLOCK_SCALES = Field("weight_scale", torch.float32, lambda o, i, g: (o, i // g), 0, 1)
_INPUT_SCALE = Field("input_scale", torch.float32, lambda o, i, g: (), None, None)
_WEIGHT_SCALE_2 = Field("weight_scale_2", torch.float32, lambda o, i, g: (), None, None)
_PRE_QUANT_SCALE = Field("pre_quant_scale", None, lambda o, i, g: (i,), None, 0)
_NVFP4_WEIGHT = (
    Field("weight", torch.uint8, lambda o, i, g: (o, i // 2), 0, 1),
    Field("weight_scale", torch.float8_e4m3fn, lambda o, i, g: (o, i // g), 0, 1),
    _WEIGHT_SCALE_2,
)
FIELDS: dict[str | None, tuple[Field, ...]] = {
    None: (_WEIGHT,),
    "FP8": (
        Field("weight", torch.float8_e4m3fn, lambda o, i, g: (o, i), 0, 1),
        Field("weight_scale", torch.float32, lambda o, i, g: (), None, None),
        _INPUT_SCALE,
    ),
    "W4A16_AWQ": (_INT4_WEIGHT, _BLOCK_SCALES, _PRE_QUANT_SCALE),
    "W4A8_AWQ": (_INT4_WEIGHT, _BLOCK_SCALES, _PRE_QUANT_SCALE, _INPUT_SCALE, _WEIGHT_SCALE_2),
    "NVFP4": (*_NVFP4_WEIGHT, _INPUT_SCALE),
    "FP8_PER_CHANNEL_PER_TOKEN": (
        Field("weight", torch.float8_e4m3fn, lambda o, i, g: (o, i), 0, 1),
        Field("weight_scale", torch.float32, lambda o, i, g: (o,), 0, None),
    ),
    "W4A16_NVFP4": _NVFP4_WEIGHT,
}
MIXED_PRECISION = "MIXED_PRECISION"
"""The format's name of several algorithms in one model."""
KV_FIELDS = {rows: Field(f"{rows}_scale", torch.float32, lambda o, i, g: (), None, None) for rows in ("k", "v")}
_FP8_SCHEME = {"dynamic": False, "num_bits": 8, "type": "float"}
# The format's name of what the packing calls otherwise.
_RENAMED = {
    "weights_scaling_factor": "weight_scale",
    "weights_scaling_factor_2": "weight_scale_2",
    "activation_scaling_factor": "input_scale",
    "prequant_scaling_factor": "pre_quant_scale",
}


def _fields(module: str, rows: str, scheme: Scheme) -> Sequence[Field]:
    if scheme.quant_algo not in FIELDS:
        raise PtqError(f"ModelOpt's unified checkpoint has no {scheme.quant_algo}: use another export_format")
    refuse_scaled_experts(module, scheme)
    # As in ModelOpt's exporter: the scale that several layers share is folded, that of a single one is stored.
    return [field for field in FIELDS[scheme.quant_algo] if field is not _PRE_QUANT_SCALE or not rows]


def _norm_factor(source: Source, norm: str, layout: HuggingFaceLayout) -> torch.Tensor | None:
    """The pre-quantization scale of the layers that a norm's output enters, if it is to be folded into it."""
    name = follower_of(norm, source.shape)
    return source.layers.pre_quant_scale(name) if name and len(layout.row_groups(name)) > 1 else None


def pack_module(source: Source, name: str, layout: HuggingFaceLayout) -> Packed:
    """Packs this rank's shard of a module.

    Args:
        source: The model.
        name: The module's name in the whole model.
        layout: The files that it goes to.
    """
    if name.endswith("core_attention"):
        scales = zip(KV_FIELDS.values(), kv_cache_scales(*source.layers.kv_cache(name), clamp=False), strict=True)
        return {("", field.suffix): scale.reshape(()).cpu() for field, scale in scales}
    if not is_linear(name):
        return pack_unquantized(source, name, _norm_factor(source, name, layout))
    split = row_splitter(name, source.shape, source.tensor_rank) if layout.splits_rows(name) else all_rows
    packed = pack_linear(source.layers.linear(name), split, source.dtype, scalar_scales=True)
    return {(rows, _RENAMED.get(field, field)): _as_stored(tensor) for (rows, field), tensor in packed.items()}


def _as_stored(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype == torch.int8:
        return tensor.view(torch.uint8)
    return tensor.reshape(()) if tensor.numel() == 1 else tensor


def quantization_config(layout: HuggingFaceLayout, cache_format: str) -> dict[str, Any] | None:
    """Returns hf_quant_config.json, or None for an unquantized model.

    Its producer is ModelOpt, whose format it is and whose arithmetic made the numbers: readers look for that name.
    Layers that are quantized in several ways are listed, each with its own.

    Args:
        layout: The files.
        cache_format: Format of a quantized KV cache.
    """
    layers = layout.quantized()
    if not layers:
        return None
    first = next(iter(layers.values()))
    each = {name: {"quant_algo": scheme.quant_algo, **scheme.quantization_keys} for name, scheme in layers.items()}
    is_mixed = len(set(layers.values())) > 1
    return {
        "producer": {"name": "modelopt", "version": version("nvidia-modelopt")},
        "quantization": {
            "quant_algo": MIXED_PRECISION if is_mixed else first.quant_algo,
            "kv_cache_quant_algo": cache_format.upper() if layout.kv_cache else None,
            **({"quantized_layers": each} if is_mixed else first.quantization_keys),
            "exclude_modules": layout.unquantized(embeddings=True),
        },
    }


def in_config_json(quantization: dict[str, Any]) -> dict[str, Any]:
    """Returns what config.json says, in compressed-tensors' terms, of what hf_quant_config.json says."""
    details = quantization["quantization"]
    is_nvfp4 = details["quant_algo"] in ("NVFP4", "W4A16_NVFP4")
    bits = {"dynamic": False, "num_bits": 4 if is_nvfp4 else 8, "type": "float"}
    if is_nvfp4:
        bits["group_size"] = details["group_size"]
    found: dict[str, Any] = {}
    if details["quant_algo"] in ("FP8", "NVFP4"):
        found["config_groups"] = {
            "group_0": {"input_activations": bits, "weights": dict(bits), "targets": ["Linear"]},
        }
    elif details["quant_algo"] == "W4A16_NVFP4":
        found["config_groups"] = {"group_0": {"weights": bits, "targets": ["Linear"]}}
    elif details["quant_algo"] == MIXED_PRECISION:
        found["quantized_layers"] = details["quantized_layers"]
    found |= {"ignore": details["exclude_modules"], "quant_algo": details["quant_algo"]}
    if cache := details["kv_cache_quant_algo"]:
        found["kv_cache_scheme"] = _FP8_SCHEME if cache == "FP8" else cache
    return {**found, "producer": quantization["producer"], "quant_method": "modelopt"}


def unified_export(source: Source) -> PackedExport:
    """Prepares a unified checkpoint of a calibrated model.

    Raises:
        PtqError: If the format cannot represent how the model is quantized.
    """
    hf_class = hugging_face_class(source.family)
    names = hf_class.module_names()
    shard_map = source.shard_map
    layout = HuggingFaceLayout(
        source.shape,
        names,
        shard_map.schemes,
        _fields,
        KV_FIELDS,
        lambda layer, scale: f"{layer}.{scale}",
        shard_map.kv_cache,
        source.dtype,
        stored_vocab_size(source),
    )
    quantization = quantization_config(layout, source.cache_format)

    def write_documents(directory: Path) -> None:
        config = model_config(source, hf_class)
        if quantization is not None:
            write_json(directory / "hf_quant_config.json", quantization)
            config["quantization_config"] = in_config_json(quantization)
        write_model_documents(source, layout, directory, config)

    return PackedExport(layout, partial(pack_module, source, layout=layout), write_documents)
