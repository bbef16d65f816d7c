# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""One layer, or a rank's shard of it -> the tensors that a file stores of it. Pure functions of tensors."""

from collections.abc import Callable, Mapping
from functools import partial

import torch

from nemo_ptq.export.module_tensors import Linear, Plain
from nemo_ptq.models.mapping import GATED, QKV
from nemo_ptq.models.spec import ModelSpec
from nemo_ptq.quantization.rounding import (
    block_scales,
    fp4_codes,
    int4_codes,
    pack_fp4,
    pack_int4,
    scale_of,
    to_fp8,
    to_int8,
)
from nemo_ptq.quantization.schemes import Scheme

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


def split_in_proportion(rows: Mapping[str, int], tensor: torch.Tensor) -> RowGroups:
    """Splits rows that are a rank's equal share of each of several groups, one after the other.

    Args:
        rows: Sizes of the groups over all ranks.
        tensor: (local rows, ...).
    """
    ranks = sum(rows.values()) // len(tensor)
    return dict(zip(rows, tensor.split([size // ranks for size in rows.values()]), strict=True))


def row_splitter(module_name: str, shape: ModelSpec, tensor_rank: int = 0) -> Callable[[torch.Tensor], RowGroups]:
    """Returns the function that splits the output rows of a linear layer.

    Args:
        module_name: Megatron's name of the layer in the whole model.
        shape: The model.
        tensor_rank: Which tensor-parallel shard the rows are.
    """
    groups = tuple(shape.module(module_name).rows)
    if groups == QKV:
        heads_per_group = shape.num_attention_heads // shape.num_query_groups
        return lambda rows: split_qkv(rows, heads_per_group, shape.head_size, tensor_rank * len(rows))
    if groups == GATED:
        return split_gated
    return partial(split_in_proportion, shape.module(module_name).rows) if len(groups) > 1 else all_rows


def pack_where_it_is(
    linear: Linear,
    split: Callable[[torch.Tensor], RowGroups],
    dtype: torch.dtype,
    scalar_scales: bool = False,
    as_stored: Callable[[torch.Tensor], torch.Tensor] = lambda scale: scale,
) -> Packed:
    """Packs a linear layer on the device of its weight.

    Args:
        linear: The layer, or this rank's shard of it.
        split: Groups its output rows.
        dtype: Data type of what is not quantized.
        scalar_scales: Divide weights by a scale without dimensions, as ModelOpt's exporter of Hugging Face models does:
            the quotient then has the weight's data type before it is rounded, and ties fall elsewhere.
        as_stored: Gives the weight's scales as a reader will have them, for those as they were computed, of all rows:
            weights are rounded with the former.

    Returns:
        The weight and everything that has a value for each output row, for each group of rows; the other
        tensors once, under the group "".
    """
    scheme = linear.scheme
    packed: Packed = {}
    if linear.bias is not None:
        packed |= {(rows, "bias"): bias.to(dtype) for rows, bias in split(linear.bias).items()}
    if not linear.is_quantized:
        packed |= {(rows, "weight"): weight.to(dtype) for rows, weight in split(linear.weight).items()}
        return packed

    scale, scale_2 = _weight_scales(linear)
    scale = as_stored(scale)
    per_row = scale.numel() > 1
    scales = split(scale) if per_row else {"": scale.reshape(() if scalar_scales else 1)}
    for rows, weight in split(linear.weight if linear.rounded is None else linear.rounded.codes).items():
        if len(weight):
            codes = weight if linear.rounded else _codes(weight, scheme, scales[rows if per_row else ""], scale_2)
            packed[rows, "weight"] = pack_codes(codes, scheme)
    packed |= {(rows, "weights_scaling_factor"): value for rows, value in scales.items()}
    others = {
        "weights_scaling_factor_2": scale_2,
        "activation_scaling_factor": _input_scale(linear),
        "prequant_scaling_factor": linear.pre_quant_scale,
    }
    fields = {field.suffix: field for field in scheme.fields}
    for suffix, value in others.items():
        if suffix not in fields:
            continue
        if suffix == "prequant_scaling_factor":
            # Readers of the AWQ schemes want one also where weights were rounded without a search for it.
            packed["", suffix] = torch.ones(linear.weight.shape[1], dtype=dtype) if value is None else value.to(dtype)
        else:
            assert value is not None
            packed["", suffix] = value.reshape(fields[suffix].shape(0, 0, 1))
    return packed


def pack_linear(
    linear: Linear,
    split: Callable[[torch.Tensor], RowGroups],
    dtype: torch.dtype,
    scalar_scales: bool = False,
    as_stored: Callable[[torch.Tensor], torch.Tensor] = lambda scale: scale,
) -> Packed:
    """Packs a linear layer as :func:`pack_where_it_is` does, onto the CPU."""
    return _on_cpu(pack_where_it_is(linear, split, dtype, scalar_scales, as_stored))


def _weight_scales(linear: Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    if linear.rounded is not None:
        return linear.rounded.scale, linear.rounded.scale_2
    scheme = linear.scheme
    assert linear.weight_amax is not None
    scale = scale_of(linear.weight_amax, scheme.largest_weight)
    if scheme.codes == "fp4":
        return block_scales(linear.weight, scale, scheme.block_size), scale
    return scale, None if linear.weight_amax_2 is None else scale_of(linear.weight_amax_2, scheme.largest_input)


def _input_scale(linear: Linear) -> torch.Tensor | None:
    return None if linear.input_amax is None else scale_of(linear.input_amax, linear.scheme.largest_input)


def _codes(weight: torch.Tensor, scheme: Scheme, scale: torch.Tensor, scale_2: torch.Tensor | None) -> torch.Tensor:
    """Rounds a weight to the nearest codes, (out, in)."""
    if scheme.codes == "fp4":
        assert scale_2 is not None
        return fp4_codes(weight, scale, scale_2)
    if scheme.codes == "fp8":
        return to_fp8(weight, scale[:, None] if scheme.amaxes == "rows" else scale)
    return {"int8": to_int8, "int4": int4_codes}[scheme.codes](weight, scale)


def pack_codes(codes: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Packs codes (out, in) as a scheme stores them."""
    return {"fp4": pack_fp4, "int4": pack_int4}.get(scheme.codes, _as_they_are)(codes)


def _as_they_are(codes: torch.Tensor) -> torch.Tensor:
    return codes


def pack_parameters(layer: Plain, dtype: torch.dtype) -> Packed:
    """Packs the weight, and the bias if there is one, of a norm, an embedding or a router.

    A gain that is kept minus one is stored whole.
    """
    weight = layer.weight.float() + layer.offset if layer.offset else layer.weight
    packed = {("", "weight"): weight.to(dtype)}
    if layer.bias is not None:
        packed["", "bias"] = layer.bias.to(dtype)
    return _on_cpu(packed)


def pack_plain(layer: Plain, dtype: torch.dtype, factor: torch.Tensor | None = None) -> Packed:
    """Packs the weight, and the bias if there is one, of a norm, an embedding or a router as Megatron keeps them.

    Args:
        layer: The layer; the gain of a norm may be kept minus one.
        dtype: Data type to store.
        factor: (size), what a norm's output is to be multiplied with.
    """
    weight, bias = layer.weight, layer.bias
    if factor is not None:
        factor = factor.to(weight.device, torch.float32)
        weight = (weight.float() + layer.offset) * factor - layer.offset
        bias = None if bias is None else bias.float() * factor
    found = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    return _on_cpu({("", field): tensor.to(dtype) for field, tensor in found.items()})


def pack_state_space(
    parameters: Mapping[str, torch.Tensor], split: Callable[[torch.Tensor], RowGroups], dtype: torch.dtype
) -> Packed:
    """Packs this rank's shard of what a state space has beside linear layers and norms.

    Args:
        parameters: Each (local rows, ...), by name.
        split: Groups their rows.
        dtype: Data type to store.
    """
    return _on_cpu(
        {
            (rows, name): group.to(dtype).contiguous()
            for name, parameter in parameters.items()
            for rows, group in split(parameter).items()
        }
    )


def kv_cache_scales(key: torch.Tensor, value: torch.Tensor, clamp: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the dequantization scales of an FP8 KV cache, and the global ones of an NVFP4 one, float32 (1,) each.

    Args:
        key: Largest magnitude of the keys, one element.
        value: Largest magnitude of the values, one element.
        clamp: Whether scales are at least 1.
    """
    keys, values = (scale_of(amax, 448.0).reshape(1) for amax in (key, value))
    return (keys.clamp(min=1.0), values.clamp(min=1.0)) if clamp else (keys, values)


def pack_kv_cache(key: torch.Tensor, value: torch.Tensor) -> Packed:
    """Returns the dequantization scales of a quantized KV cache, float32 (1,) each.

    ModelOpt does not let FP8 scales fall below 1: E4M3 covers the usual range of keys and values unscaled.

    Args:
        key: Largest magnitude of the keys, one element.
        value: Largest magnitude of the values, one element.
    """
    keys, values = kv_cache_scales(key, value, clamp=True)
    return _on_cpu(
        {
            ("", "k_cache_scaling_factor"): keys,
            ("", "v_cache_scaling_factor"): values,
            ("", "kv_cache_scaling_factor"): torch.maximum(keys, values),
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
