# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The format of the compressed-tensors library: a Hugging Face directory that transformers and vLLM load.

Format: https://github.com/vllm-project/compressed-tensors. It knows no pre-quantization scales, so the model's are
folded (:mod:`nemo_ptq.export.folding`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nemo_ptq.errors import PtqError
from nemo_ptq.export.folding import norm_factor, row_factor
from nemo_ptq.export.huggingface.hf_documents import (
    hugging_face_class,
    model_config,
    stored_vocab_size,
    write_model_documents,
)
from nemo_ptq.export.huggingface.hf_layout import HuggingFaceLayout
from nemo_ptq.export.huggingface.hf_modules import pack_unquantized
from nemo_ptq.export.packing import Packed, RowGroups, all_rows, kv_cache_scales, pack_linear, row_splitter
from nemo_ptq.export.source import PackedExport, Source
from nemo_ptq.models.mapping import is_linear
from nemo_ptq.quantization.schemes import Field, Scheme

_FP8_WEIGHT = Field("weight", torch.float8_e4m3fn, lambda o, i, g: (o, i), 0, 1)
_INT8_WEIGHT = Field("weight", torch.int8, lambda o, i, g: (o, i), 0, 1)
_ROW_SCALES = Field("weight_scale", torch.float32, lambda o, i, g: (o, 1), 0, None)
_INPUT_SCALE = Field("input_scale", torch.float32, lambda o, i, g: (1,), None, None)
_FP8 = (_FP8_WEIGHT, Field("weight_scale", torch.float32, lambda o, i, g: (1,), None, None), _INPUT_SCALE)
_INT4 = (
    Field("weight_packed", torch.int32, lambda o, i, g: (o, i // 8), 0, 1),
    Field("weight_scale", None, lambda o, i, g: (o, i // g), 0, 1),
    Field("weight_shape", torch.int64, lambda o, i, g: (2,), None, None, each_group=True),
)
_NVFP4_WEIGHT = (
    Field("weight_packed", torch.uint8, lambda o, i, g: (o, i // 2), 0, 1),
    Field("weight_scale", torch.float8_e4m3fn, lambda o, i, g: (o, i // g), 0, 1),
    Field("weight_global_scale", torch.float32, lambda o, i, g: (1,), None, None),
)
_NVFP4_INPUT = Field("input_global_scale", torch.float32, lambda o, i, g: (1,), None, None)
KV_FIELDS = {rows: Field(f"{rows}_scale", torch.float32, lambda o, i, g: (1,), None, None) for rows in ("k", "v")}
_RENAMED = {"weights_scaling_factor": "weight_scale", "activation_scaling_factor": "input_scale"}
# Block scales are divided by this format's global scales, where ModelOpt's are multiplied with.
_DIVISORS = {"weights_scaling_factor_2": "weight_global_scale", "activation_scaling_factor": "input_global_scale"}

_EIGHT_BITS = {"num_bits": 8, "symmetric": True, "dynamic": False, "strategy": "tensor"}
_ROWS, _TOKENS = {"strategy": "channel"}, {"strategy": "token", "dynamic": True}
_FLOAT8, _INTEGER8 = {**_EIGHT_BITS, "type": "float"}, {**_EIGHT_BITS, "type": "int"}
_INTEGER4 = {**_EIGHT_BITS, "type": "int", "num_bits": 4, "strategy": "group"}
_FLOAT4 = {
    **{**_EIGHT_BITS, "type": "float", "num_bits": 4, "strategy": "tensor_group"},
    **dict.fromkeys(("scale_dtype", "zp_dtype"), "torch.float8_e4m3fn"),
}


@dataclass(frozen=True)
class _Stored:
    """How the format stores a scheme.

    Attributes:
        format: The library's name of it.
        fields: The tensors of a linear layer.
        weights: Description of weights in config.json, without the group size.
        inputs: The same of activations; None where they stay as they are.
        is_named: Whether the group of layers names the format: the library would take it for another one.
    """

    format: str
    fields: tuple[Field, ...]
    weights: Mapping[str, Any]
    inputs: Mapping[str, Any] | None = None
    is_named: bool = False


_STORED: Mapping[str | None, _Stored] = {
    "FP8": _Stored("float-quantized", _FP8, _FLOAT8, _FLOAT8),
    "FP8_PER_CHANNEL_PER_TOKEN": _Stored(
        "float-quantized", (_FP8_WEIGHT, _ROW_SCALES), {**_FLOAT8, **_ROWS}, {**_FLOAT8, **_TOKENS}
    ),
    "W8A8_SQ_PER_CHANNEL": _Stored(
        "int-quantized", (_INT8_WEIGHT, _ROW_SCALES, _INPUT_SCALE), {**_INTEGER8, **_ROWS}, _INTEGER8
    ),
    "INT8_PER_CHANNEL_PER_TOKEN": _Stored(
        "int-quantized", (_INT8_WEIGHT, _ROW_SCALES), {**_INTEGER8, **_ROWS}, {**_INTEGER8, **_TOKENS}
    ),
    "W4A16_AWQ": _Stored("pack-quantized", _INT4, _INTEGER4),
    # Readers round each token by its own largest magnitude: the calibrated amax is not stored.
    "W4A8_AWQ": _Stored("pack-quantized", _INT4, _INTEGER4, {**_FLOAT8, **_TOKENS}, is_named=True),
    "NVFP4": _Stored("nvfp4-pack-quantized", (*_NVFP4_WEIGHT, _NVFP4_INPUT), _FLOAT4, {**_FLOAT4, "dynamic": "local"}),
    "W4A16_NVFP4": _Stored("nvfp4-pack-quantized", _NVFP4_WEIGHT, _FLOAT4),
}
_UNQUANTIZED = (Field("weight", None, lambda o, i, g: (o, i), 0, 1),)


def _fields(module: str, rows: str, scheme: Scheme) -> Sequence[Field]:
    if scheme.quant_algo is None:
        return _UNQUANTIZED
    if scheme.quant_algo not in _STORED:
        raise PtqError(f"the compressed-tensors writer has no {scheme.quant_algo}: use another export_format")
    return _STORED[scheme.quant_algo].fields


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
    if not is_linear(name):
        return pack_unquantized(source, name, norm_factor(name, source.layers.state, source.shape))
    split = row_splitter(name, source.shape, source.tensor_rank) if layout.splits_rows(name) else all_rows
    scheme = layout.schemes.get(name)
    factor = row_factor(name, source.layers.state, source.shape, source.tensor_rank, source.tensor_ranks)
    # Readers have the scales of INT4 in the model's type, and round others to it.
    rounded = partial(_rounded_scales, factor=factor, dtype=source.dtype)
    is_int4 = scheme is not None and scheme.codes == "int4"
    as_stored: Callable[[torch.Tensor], torch.Tensor] = rounded if is_int4 else _unchanged
    # In float32 as long as something may be multiplied.
    packed = pack_linear(source.layers.linear(name), split, torch.float32, as_stored=as_stored)
    factors: RowGroups = {} if factor is None else split(factor)
    stored: Packed = {}
    for (rows, field), tensor in packed.items():
        if rows in factors and field in _multiplied(scheme):
            tensor = tensor * factors[rows].reshape(-1, *[1] * (tensor.dim() - 1))
        if scheme is None or field == "bias":
            stored[rows, field] = tensor.to(source.dtype)
        else:
            own = _as_the_format(field, tensor, scheme, source.dtype)
            stored |= {(rows, its_name): its_tensor for its_name, its_tensor in own}
    if scheme is None:
        return stored
    module = source.shape.module(name)
    for rows in layout.row_groups(name):
        size = [module.outputs(rows), module.inputs]
        stored[rows, "weight_shape"] = torch.tensor(size, dtype=torch.int64)
    return stored


def _unchanged(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _rounded_scales(scale: torch.Tensor, factor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Scales (rows, groups) of which the products with the rows' factor, which are stored, are of the model's type."""
    factors = torch.ones(1, device=scale.device) if factor is None else factor.to(scale.device)[:, None]
    return (scale * factors).to(dtype).clamp(min=torch.finfo(dtype).tiny).float() / factors


def _as_the_format(
    field: str, tensor: torch.Tensor, scheme: Scheme, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields what the format has of a packed tensor, with its name there, if it has anything."""
    if field == "weight":
        pack = {"int4": pack_int4, "fp4": _unchanged}.get(scheme.codes)
        yield ("weight", tensor) if pack is None else ("weight_packed", pack(tensor))
    elif field == "weights_scaling_factor" and scheme.amaxes != "tensor":
        yield "weight_scale", tensor[:, None] if scheme.amaxes == "rows" else tensor.to(dtype)
    elif scheme.codes == "fp4" and field in _DIVISORS:
        yield _DIVISORS[field], tensor.reshape(1).reciprocal()
    elif field in _RENAMED:
        yield _RENAMED[field], tensor


def _multiplied(scheme: Scheme | None) -> tuple[str, str]:
    """What is multiplied where the rows of a layer are: its scales, or an unquantized weight, and its bias."""
    return ("weight" if scheme is None else "weights_scaling_factor"), "bias"


def quantization_config(layout: HuggingFaceLayout) -> dict[str, Any] | None:
    """Returns what config.json says about the quantization, or None for an unquantized model.

    Where layers are quantized in several ways, each way is a group that lists its layers.
    """
    layers = layout.quantized()
    ways = list(dict.fromkeys(layers.values()))
    if not ways:
        return _cache_alone(dict(_FLOAT8)) if layout.kv_cache else None
    if len(ways) == 1:
        groups = [_group(ways[0], ["Linear"], _STORED[ways[0].quant_algo].is_named)]
    else:
        groups = [_group(way, [name for name, its in layers.items() if its == way], is_named=True) for way in ways]
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": _STORED[ways[0].quant_algo].format if len(ways) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{index}": group for index, group in enumerate(groups)},
        "ignore": layout.unquantized(embeddings=False),
    }
    if layout.kv_cache:
        config["kv_cache_scheme"] = dict(_FLOAT8)
    return config


def _group(scheme: Scheme, targets: list[str], is_named: bool) -> dict[str, Any]:
    """Entry of config.json for layers of one scheme."""
    stored = _STORED[scheme.quant_algo]
    size = {"group_size": scheme.block_size} if scheme.block_size else {}
    inputs = stored.inputs and {**stored.inputs, **(size if stored.inputs["strategy"] == "tensor_group" else {})}
    return {
        "targets": targets,
        "weights": {**stored.weights, **size},
        "input_activations": inputs,
        **({"format": stored.format} if is_named else {}),
    }


def _cache_alone(scheme: dict[str, Any]) -> dict[str, Any]:
    """Entry of config.json if only the KV cache is quantized."""
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
