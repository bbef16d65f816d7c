# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Linear layers of a Megatron model with ModelOpt's quantizers, as exports see them."""

import re
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from modelopt.torch.export.quant_utils import get_quantization_format, get_weight_block_size
from modelopt.torch.quantization.nn import SequentialQuantizer

from nemo_ptq.export.module_tensors import Linear
from nemo_ptq.quantization.schemes import UNQUANTIZED, Scheme, scheme_for

_EXPORTED = re.compile(
    r"embedding\.(word|position)_embeddings|output_layer|.*(layernorm|linear_qkv|linear_proj|linear_fc[12]|router|core_attention)"
)


def global_modules(module: GPTModel) -> dict[str, torch.nn.Module]:
    """Returns this rank's modules that exports are made of, by name.

    Layers and experts are counted through the whole model, wherever pipeline and expert parallelism have put them.
    """
    first_expert = 0
    named = {}
    for name, child in module.named_modules():
        if hasattr(child, "local_expert_indices"):
            first_expert = child.local_expert_indices[0]
        if not _EXPORTED.fullmatch(name):
            continue
        if match := re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", name):
            layer = module.decoder.layers[int(match[1])]
            name = f"decoder.layers.{layer.layer_number - 1}.{match[2]}"
        if match := re.fullmatch(r"(.*local_experts\.)(\d+)(.*)", name):
            name = f"{match[1]}{int(match[2]) + first_expert}{match[3]}"
        named[name] = child
    return named


def scheme_of(linear: Any) -> Scheme:
    """Returns the scheme in which ModelOpt calibrated a linear layer.

    Raises:
        PtqError: If it is quantized in a way that cannot be exported.
    """
    modelopt_format = get_quantization_format(linear)
    return scheme_for(modelopt_format, get_weight_block_size(linear)) if modelopt_format else UNQUANTIZED


def linear_of(linear: Any) -> Linear:
    """Describes a linear layer of Megatron's, quantized by ModelOpt or not.

    Raises:
        PtqError: If it is quantized in a way that cannot be exported.
    """
    scheme, bias = scheme_of(linear), getattr(linear, "bias", None)
    if scheme is UNQUANTIZED:
        return Linear(linear.weight, bias)
    quantizer, inputs = linear.weight_quantizer, linear.input_quantizer
    first, second = quantizer if isinstance(quantizer, SequentialQuantizer) else (quantizer, None)
    return Linear(
        linear.weight,
        bias,
        scheme,
        first.export_amax(),
        None if second is None else second.export_amax(),
        inputs.export_amax() if inputs.is_enabled else None,
        _pre_quant_scale(linear),
    )


def _pre_quant_scale(linear: Any) -> torch.Tensor | None:
    scale = getattr(getattr(linear, "input_quantizer", None), "_pre_quant_scale", None)
    return None if scale is None else scale.squeeze()
