# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Pre-quantization scales folded into the preceding module, for readers without such scales.

SmoothQuant and AWQ divide a weight by a scale of each input channel and multiply the input with it. A reader that only
multiplies quantized tensors gets the same where the layer before produces the scaled input itself:

    a norm, a gated norm            multiply its gain and its bias, exact for any scale
    up_proj of a gated MLP          multiply its rows: act(gate) * (s up) = s (act(gate) * up)
    fc1 before a squared ReLU       multiply its rows with the root: relu(sqrt(s) x)^2 = s relu(x)^2
    v_proj                          multiply its rows, where all query heads of a group share the scale of a channel

Elsewhere (an ungated MLP with GELU, values whose cache is quantized with a calibrated amax, the first layers of
experts) nothing can be folded, and the layer is not smoothed. Rows are multiplied in the scales of the quantized rows,
so no weight is rounded again; gains and biases are.
"""

from collections.abc import Mapping

import torch

from nemo_ptq.calibration.smoothquant import smoothed_amax
from nemo_ptq.errors import PtqError
from nemo_ptq.models.spec import ModelSpec
from nemo_ptq.quantization.schemes import Scheme

_SCALE = ".input_quantizer.pre_quant_scale"


def follower_of(module: str, shape: ModelSpec) -> str | None:
    """Returns Megatron's name of the linear layer that a norm's output enters, if it is the only one.

    Args:
        module: Megatron's name of a module that is no linear layer.
        shape: The model.

    Returns:
        None of what is no norm of a transformer layer, and where the output enters experts.
    """
    prefix, _, own = module.removeprefix("decoder.layers.").partition(".")
    if not prefix.isdigit():
        return None
    follower = shape.layers[int(prefix)].after(own)
    return None if follower is None else f"decoder.layers.{prefix}.{follower.name}"


def _is_of_expert(module: str) -> bool:
    return ".experts." in module


def refuse_scaled_experts(module: str, scheme: Scheme) -> None:
    """Refuses an expert with pre-quantization scales: one norm's output enters all experts and the router.

    Raises:
        PtqError: If the layer is one.
    """
    if _is_of_expert(module) and any(field.suffix == "prequant_scaling_factor" for field in scheme.fields):
        raise PtqError(
            f"{scheme.quant_algo} gives each expert scales of its own, which this format cannot hold: quantize the "
            "experts in FP8, or not at all"
        )


def foldable(
    state: Mapping[str, torch.Tensor], shape: ModelSpec, amax_floor: float | None
) -> Mapping[str, torch.Tensor]:
    """Returns the calibration state whose scales can all be folded, as close to a given one as there is.

    Query heads that share a value get the geometric mean of their scales; what can be folded nowhere becomes 1. The
    activation amaxes follow from those of the channels.

    Args:
        state: Entries of one or more whole layers.
        shape: The model.
        amax_floor: Lower bound of activation amaxes; None for none.
    """
    tensors = dict(state)
    for name, scale in state.items():
        if not name.endswith(_SCALE):
            continue
        module = name.removesuffix(_SCALE)
        has_cache = module.replace("linear_proj", "core_attention.v_bmm_quantizer.amax") in state
        folded = foldable_scale(module, scale, shape, has_cache)
        if torch.equal(folded, scale):
            continue
        tensors[name] = folded
        quantizer = f"{module}.input_quantizer."
        if f"{quantizer}amax" in tensors:
            amax = tensors[f"{quantizer}amax"]
            largest = smoothed_amax(tensors[f"{quantizer}channel_amax"], folded, amax.dtype)
            largest = largest if amax_floor is None else largest.clamp(min=amax_floor)
            tensors[f"{quantizer}amax"] = largest.reshape(amax.shape)
    return tensors


def foldable_scale(module: str, scale: torch.Tensor, shape: ModelSpec, quantizes_kv_cache: bool) -> torch.Tensor:
    """Returns the scale that can be folded, as close to a given one as there is.

    Args:
        module: Megatron's name of the linear layer.
        scale: float32 (in-features): its pre-quantization scale.
        shape: The model.
        quantizes_kv_cache: Whether the values of the layer's attention are cached with a calibrated amax.
    """
    if _is_of_expert(module) and module.endswith("linear_fc1"):
        return torch.ones_like(scale)  # the norm before it is that of all experts, and of the router
    if module.endswith("linear_fc2"):
        return scale if shape.gated_mlp or shape.activation == "squared-relu" else torch.ones_like(scale)
    if not module.endswith("linear_proj"):
        return scale
    if quantizes_kv_cache:
        return torch.ones_like(scale)
    if shape.num_attention_heads == shape.num_query_groups:
        return scale
    heads = scale.view(shape.num_query_groups, -1, shape.head_size)
    if torch.equal(heads, heads[:, :1].expand_as(heads)):
        return scale
    return heads.log().mean(1, keepdim=True).exp().expand_as(heads).reshape(-1)


def norm_factor(norm: str, state: Mapping[str, torch.Tensor], shape: ModelSpec) -> torch.Tensor | None:
    """Returns the factor that a norm's output is multiplied by: float32 (hidden size), or None.

    Args:
        norm: Megatron's name of it, or of any other module.
        state: The calibration state's entries.
        shape: The model.
    """
    return state.get(f"{follower_of(norm, shape)}{_SCALE}")


def row_factor(
    linear: str, state: Mapping[str, torch.Tensor], shape: ModelSpec, rank: int, ranks: int
) -> torch.Tensor | None:
    """Returns the factors that the output rows of this rank's shard of a linear layer are multiplied by.

    Args:
        linear: Megatron's name of the layer.
        state: Entries of a :func:`foldable` calibration.
        shape: The model.
        rank: This tensor-parallel rank.
        ranks: Number of tensor-parallel ranks.

    Returns:
        float32 (local out-features), in Megatron's order; None where nothing changes.
    """
    if linear.endswith("linear_qkv"):
        scale = state.get(linear.replace("linear_qkv", "linear_proj") + _SCALE)
        if scale is None:
            return None
        heads = scale.view(shape.num_query_groups, -1, shape.head_size)
        unchanged = torch.ones(heads.shape[0], heads.shape[1] + 1, shape.head_size, device=scale.device)
        return torch.cat([unchanged, heads[:, :1]], dim=1).flatten().chunk(ranks)[rank]
    if linear.endswith("linear_fc1"):
        scale = state.get(linear.replace("linear_fc1", "linear_fc2") + _SCALE)
        if scale is None:
            return None
        local = scale.chunk(ranks)[rank]
        if shape.gated_mlp:
            return torch.cat([torch.ones_like(local), local])
        return local.sqrt() if shape.activation == "squared-relu" else None
    return None
