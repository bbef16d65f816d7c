# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The format of the compressed-tensors library: a Hugging Face directory that transformers and vLLM load.

Format: https://github.com/vllm-project/compressed-tensors. It knows no pre-quantization scales, so the model's are
folded (:mod:`nemo_ptq.export.folding`).
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nemo_ptq.errors import PtqError
from nemo_ptq.export.folding import norm_factor, refuse_scaled_experts, row_factor
from nemo_ptq.export.huggingface.hf_documents import (
    hugging_face_class,
    model_config,
    stored_vocab_size,
    write_model_documents,
)
from nemo_ptq.export.huggingface.hf_layout import HuggingFaceLayout
from nemo_ptq.export.packing import Packed, RowGroups, all_rows, kv_cache_scales, pack_linear, pack_plain, row_splitter
from nemo_ptq.export.source import PackedExport, Source
from nemo_ptq.quantization.schemes import Field, Scheme, the_scheme

_INPUT_SCALE = Field("input_scale", torch.float32, lambda o, i, g: (1,), None, None)
_FP8 = (
    Field("weight", torch.float8_e4m3fn, lambda o, i, g: (o, i), 0, 1),
    Field("weight_scale", torch.float32, lambda o, i, g: (1,), None, None),
    _INPUT_SCALE,
)
_INT8 = (
    Field("weight", torch.int8, lambda o, i, g: (o, i), 0, 1),
    Field("weight_scale", torch.float32, lambda o, i, g: (o, 1), 0, None),
    _INPUT_SCALE,
)
_INT4 = (
    Field("weight_packed", torch.int32, lambda o, i, g: (o, i // 8), 0, 1),
    Field("weight_scale", torch.float32, lambda o, i, g: (o, i // g), 0, 1),
    Field("weight_shape", torch.int64, lambda o, i, g: (2,), None, None, each_group=True),
)
FIELDS: dict[str | None, tuple[Field, ...]] = {
    None: (Field("weight", None, lambda o, i, g: (o, i), 0, 1),),
    "FP8": _FP8,
    "W8A8_SQ_PER_CHANNEL": _INT8,
    "W4A16_AWQ": _INT4,
}
KV_FIELDS = {rows: Field(f"{rows}_scale", torch.float32, lambda o, i, g: (1,), None, None) for rows in ("k", "v")}
_RENAMED = {"weights_scaling_factor": "weight_scale", "activation_scaling_factor": "input_scale"}
_FORMATS = {"FP8": "float-quantized", "W8A8_SQ_PER_CHANNEL": "int-quantized", "W4A16_AWQ": "pack-quantized"}


def _fields(module: str, rows: str, scheme: Scheme) -> Sequence[Field]:
    if scheme.quant_algo not in FIELDS:
        raise PtqError(f"the compressed-tensors writer has no {scheme.quant_algo}: use another export_format")
    refuse_scaled_experts(module, scheme)
    return FIELDS[scheme.quant_algo]


def pack_int4(packed: torch.Tensor) -> torch.Tensor:
    """Packs INT4 weights as the format has them: eight consecutive inputs in one number, each with 8 added.

    Args:
        packed: uint8 or int8 (out / 2, in), as ModelOpt packs them: two's complement, an even row in the low half of a
            byte and the next row in the high half.

    Returns:
        int32 (out, in / 8), the first input in the lowest bits.
    """
    both = packed.view(torch.uint8)
    rows = torch.stack([both & 0xF, both >> 4], dim=1).flatten(0, 1)
    shifted = rows ^ 0x8  # adds 8 to a two's complement of four bits
    return (shifted[:, ::2] | (shifted[:, 1::2] << 4)).contiguous().view(torch.int32)


def pack_module(source: Source, name: str, layout: HuggingFaceLayout) -> Packed:
    """Packs this rank's shard of a module, with the pre-quantization scales of others folded into it.

    Args:
        source: The model, whose scales can all be folded.
        name: The module's name in the whole model.
        layout: The files that it goes to.
    """
    if name.endswith("core_attention"):
        scales = zip(KV_FIELDS.values(), kv_cache_scales(*source.layers.kv_cache(name), clamp=False), strict=True)
        return {("", field.suffix): scale.cpu() for field, scale in scales}
    if ".linear_" not in name:
        return pack_plain(source.layers.plain(name), source.dtype, norm_factor(name, source.layers.state, source.shape))
    is_whole = len(layout.row_groups(name)) == 1
    split = all_rows if is_whole else row_splitter(name, source.shape, source.tensor_rank)
    # In float32 as long as something may be multiplied.
    packed = pack_linear(source.layers.linear(name), split, torch.float32)
    factor = row_factor(name, source.layers.state, source.shape, source.tensor_rank, source.tensor_ranks)
    factors: RowGroups = {} if factor is None else split(factor)
    scheme = layout.schemes.get(name)
    stored: Packed = {}
    for (rows, field), tensor in packed.items():
        if rows in factors and field in _multiplied(scheme):
            tensor = tensor * factors[rows].reshape(-1, *[1] * (tensor.dim() - 1))
        if field == "weight" and scheme and scheme.quant_algo == "W4A16_AWQ":
            stored[rows, "weight_packed"] = pack_int4(tensor)
        elif field == "weights_scaling_factor" and scheme and scheme.quant_algo == "W8A8_SQ_PER_CHANNEL":
            stored[rows, "weight_scale"] = tensor[:, None]
        else:
            stored[rows, _RENAMED.get(field, field)] = tensor.to(source.dtype) if field == "bias" else tensor
    if scheme is None:
        return {key: tensor.to(source.dtype) for key, tensor in stored.items()}
    module = source.shape.module(name)
    for rows in layout.row_groups(name):
        size = [module.outputs(rows), module.inputs]
        stored[rows, "weight_shape"] = torch.tensor(size, dtype=torch.int64)
    return stored


def _multiplied(scheme: Scheme | None) -> tuple[str, str]:
    """What is multiplied where the rows of a layer are: its scales, or an unquantized weight, and its bias."""
    return ("weight" if scheme is None else "weights_scaling_factor"), "bias"


def quantization_config(layout: HuggingFaceLayout) -> dict[str, Any] | None:
    """Returns what config.json says about the quantization, or None for an unquantized model.

    Raises:
        PtqError: If the model is quantized in several ways.
    """
    scheme = the_scheme(layout.schemes.values())
    eight = {"num_bits": 8, "symmetric": True, "dynamic": False, "strategy": "tensor"}
    if scheme.quant_algo is None:
        return _cache_alone({**eight, "type": "float"}) if layout.kv_cache else None
    activations: dict[str, Any] | None
    if scheme.quant_algo == "FP8":
        weights = activations = {**eight, "type": "float"}
    elif scheme.quant_algo == "W8A8_SQ_PER_CHANNEL":
        weights, activations = {**eight, "type": "int", "strategy": "channel"}, {**eight, "type": "int"}
    else:
        group = {"num_bits": 4, "strategy": "group", "group_size": scheme.block_size}
        weights, activations = {**eight, "type": "int", **group}, None
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": _FORMATS[scheme.quant_algo],
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}},
        "ignore": layout.unquantized(embeddings=False),
    }
    if layout.kv_cache:
        config["kv_cache_scheme"] = {**eight, "type": "float"}
    return config


def _cache_alone(scheme: dict[str, Any]) -> dict[str, Any]:
    """What config.json says where the KV cache is quantized, and no weight."""
    return {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "quantization_status": "compressed",
        "config_groups": {},
        "ignore": [],
        "kv_cache_scheme": scheme,
    }


def compressed_tensors_export(source: Source) -> PackedExport:
    """Prepares a directory of this format.

    Args:
        source: The calibrated model, whose scales can all be folded: see :func:`nemo_ptq.export.folding.foldable`.

    Raises:
        PtqError: If the format cannot represent how the model is quantized.
    """
    hf_class = hugging_face_class(source.family)
    shard_map = source.shard_map
    layout = HuggingFaceLayout(
        source.shape,
        hf_class.module_names(),
        shard_map.schemes,
        _fields,
        KV_FIELDS,
        lambda layer, scale: f"{layer.rpartition('.')[0]}.{scale}",
        shard_map.kv_cache,
        source.dtype,
        stored_vocab_size(source),
    )
    quantization = quantization_config(layout)

    def write_documents(directory: Path) -> None:
        config = model_config(source, hf_class)
        if quantization is not None:
            config["quantization_config"] = quantization
        write_model_documents(source, layout, directory, config)

    return PackedExport(layout, partial(pack_module, source, layout=layout), write_documents)
