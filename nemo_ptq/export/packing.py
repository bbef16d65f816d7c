# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""One Megatron module on one rank -> the tensors that a file stores of it.

Scales and rounding are ModelOpt's public functions; what is here is the order of rows.
"""

from collections.abc import Callable
from typing import Any

import torch
from modelopt.torch.export.quant_utils import (
    get_activation_scaling_factor,
    get_kv_cache_scaling_factor,
    get_prequant_scaling_factor,
    get_quantization_format,
    get_weight_block_size,
    get_weight_scaling_factor,
    get_weight_scaling_factor_2,
    to_quantized_weight,
)

from nemo_ptq.export.schemes import UNQUANTIZED, Scheme, scheme_for
from nemo_ptq.export.shape import ModelShape

# Rows of a tensor by the name of their group, as layout.Part.rows names them.
RowGroups = dict[str, torch.Tensor]
# The tensors of a module, by (group of rows, field).
Packed = dict[tuple[str, str], torch.Tensor]


def all_rows(tensor: torch.Tensor) -> RowGroups:
    """Leaves the rows of a tensor together."""
    return {"": tensor}


def split_gated(tensor: torch.Tensor) -> RowGroups:
    """Splits Megatron's fused first MLP layer: the activated half comes first.

    Args:
        tensor: (2 * inner size, ...), the rows of a weight, a bias or a scale.
    """
    gate, up = tensor.chunk(2)
    return {"gate": gate, "up": up}


def split_qkv(tensor: torch.Tensor, heads_per_group: int, head_size: int, first_row: int = 0) -> RowGroups:
    """Undoes Megatron's interleaving of queries, keys and values.

    Args:
        tensor: (rows, ...), some consecutive rows of the whole projection, which has for each query group the rows of
            its heads, its key and its value.
        heads_per_group: Query heads that share a key and a value.
        head_size: Rows of one head.
        first_row: Which row of the whole projection they begin with: where tensor-parallel ranks outnumber the query
            groups, a shard may begin anywhere.

    Returns:
        The rows that are of queries, "q", of keys, "k", and of values, "v", in their order; there may be none.
    """
    head = torch.arange(first_row, first_row + len(tensor), device=tensor.device) // head_size % (heads_per_group + 2)
    return {
        "q": tensor[head < heads_per_group],
        "k": tensor[head == heads_per_group],
        "v": tensor[head == heads_per_group + 1],
    }


def row_splitter(module_name: str, shape: ModelShape, tensor_rank: int = 0) -> Callable[[torch.Tensor], RowGroups]:
    """Returns the function that splits the output rows of a linear layer.

    Args:
        module_name: Megatron's name of the layer.
        shape: The model.
        tensor_rank: Which tensor-parallel shard the rows are.
    """
    if module_name.endswith("linear_qkv"):
        heads_per_group = shape.num_heads // shape.num_kv_heads
        return lambda rows: split_qkv(rows, heads_per_group, shape.head_size, tensor_rank * len(rows))
    if module_name.endswith("linear_fc1") and shape.gated:
        return split_gated
    return all_rows


def scheme_of(linear: Any) -> Scheme:
    """Returns the scheme in which ModelOpt calibrated a linear layer."""
    modelopt_format = get_quantization_format(linear)
    return scheme_for(modelopt_format, get_weight_block_size(linear)) if modelopt_format else UNQUANTIZED


def pack_linear(
    linear: Any, split: Callable[[torch.Tensor], RowGroups], dtype: torch.dtype, scalar_scales: bool = False
) -> Packed:
    """Packs this rank's shard of a linear layer.

    Args:
        linear: A Megatron linear layer, quantized by ModelOpt or not.
        split: Groups its output rows.
        dtype: Data type of what is not quantized.
        scalar_scales: Divide weights by a scale without dimensions, as ModelOpt's exporter of Hugging Face models does:
            the quotient then has the weight's data type before it is rounded, and ties fall elsewhere.

    Returns:
        On the CPU: the weight and everything that has a value for each output row, for each group of rows; the other
        tensors once, under the group "".
    """
    scheme = scheme_of(linear)
    packed: Packed = {}
    if getattr(linear, "bias", None) is not None:
        packed |= {(rows, "bias"): bias.to(dtype) for rows, bias in split(linear.bias).items()}
    if scheme is UNQUANTIZED:
        packed |= {(rows, "weight"): weight.to(dtype) for rows, weight in split(linear.weight).items()}
        return _on_cpu(packed)

    scale, scale_2 = get_weight_scaling_factor(linear), get_weight_scaling_factor_2(linear)
    per_row = scale.numel() > 1
    scales = split(scale) if per_row else {"": scale.reshape(() if scalar_scales else 1)}
    for rows, weight in split(linear.weight).items():
        if not len(weight):
            continue
        rounded = to_quantized_weight(
            weight, scales[rows if per_row else ""], scheme.modelopt_format, scale_2, scheme.block_size or None
        )
        packed[rows, "weight"] = rounded.view(torch.int8) if scheme.quant_algo in _INT4_AS_INT8 else rounded
    packed |= {(rows, "weights_scaling_factor"): value for rows, value in scales.items()}
    others = {
        "weights_scaling_factor_2": scale_2,
        "activation_scaling_factor": get_activation_scaling_factor(linear),
        "prequant_scaling_factor": get_prequant_scaling_factor(linear),
    }
    fields = {field.suffix: field for field in scheme.fields}
    for suffix, value in others.items():
        if suffix not in fields:
            continue
        if suffix == "prequant_scaling_factor":
            # Readers of the AWQ schemes want one also where weights were rounded without a search for it.
            packed["", suffix] = torch.ones(linear.weight.shape[1], dtype=dtype) if value is None else value.to(dtype)
        else:
            packed["", suffix] = value.reshape(fields[suffix].shape(0, 0, 1))
    return _on_cpu(packed)


# ModelOpt packs two INT4 values into a uint8; TensorRT-LLM's tensor is declared as int8.
_INT4_AS_INT8 = ("W4A16_AWQ", "W4A8_AWQ")


def pack_parameters(module: Any, dtype: torch.dtype) -> Packed:
    """Packs the weight, and the bias if there is one, of a norm, an embedding or a router.

    A gain that Megatron stores minus one is stored whole.
    """
    weight = module.weight
    if getattr(module, "zero_centered_gamma", False):
        weight = weight.float() + 1.0
    packed = {("", "weight"): weight.to(dtype)}
    if getattr(module, "bias", None) is not None:
        packed["", "bias"] = module.bias.to(dtype)
    return _on_cpu(packed)


def pack_plain(module: Any, dtype: torch.dtype, factor: torch.Tensor | None = None) -> Packed:
    """Packs the weight, and the bias if there is one, of a norm, an embedding or a router as Megatron keeps them.

    Args:
        module: The module; the gain of a norm may be kept minus one.
        dtype: Data type to store.
        factor: (size), what a norm's output is to be multiplied with.
    """
    tensors = {"weight": module.weight, "bias": getattr(module, "bias", None)}
    found = {field: tensor for field, tensor in tensors.items() if tensor is not None}
    if factor is not None:
        offset = 1.0 if getattr(module, "zero_centered_gamma", False) else 0.0
        factor = factor.to(module.weight.device, torch.float32)
        found["weight"] = (found["weight"].float() + offset) * factor - offset
        if "bias" in found:
            found["bias"] = found["bias"].float() * factor
    return _on_cpu({("", field): tensor.to(dtype) for field, tensor in found.items()})


def quantizes_kv_cache(core_attention: Any) -> bool:
    """Whether ModelOpt quantizes the keys and values that this attention caches."""
    quantizer = getattr(core_attention, "k_bmm_quantizer", None)
    return quantizer is not None and quantizer.is_enabled


def kv_cache_scales(core_attention: Any, clamp: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the dequantization scales of the keys and values that an attention caches, float32 (1,) each.

    Args:
        core_attention: Megatron's module, with a quantized KV cache.
        clamp: Whether scales of FP8 are at least 1.
    """
    key, value = get_kv_cache_scaling_factor(core_attention, clamp_fp8_scales=clamp)
    return key.reshape(1), value.reshape(1)


def pack_kv_cache(core_attention: Any) -> Packed:
    """Returns the dequantization scales of a quantized KV cache, float32 (1,) each.

    ModelOpt does not let FP8 scales fall below 1: E4M3 covers the usual range of keys and values unscaled.
    """
    key, value = kv_cache_scales(core_attention, clamp=True)
    return _on_cpu(
        {
            ("", "k_cache_scaling_factor"): key,
            ("", "v_cache_scaling_factor"): value,
            ("", "kv_cache_scaling_factor"): torch.maximum(key, value),
        }
    )


def _on_cpu(packed: Packed) -> Packed:
    """Copies what is on a GPU through page-locked memory, all of it in flight at once; torch reuses that memory."""
    on_gpu = any(tensor.is_cuda for tensor in packed.values())
    copies = {
        key: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu).copy_(tensor.detach(), non_blocking=True)
        for key, tensor in packed.items()
    }
    if on_gpu:
        torch.cuda.current_stream().synchronize()
    return copies
