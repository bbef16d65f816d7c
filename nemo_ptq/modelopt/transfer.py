# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""From a calibrated Megatron model, spread over ranks, to its calibration state, and back into such a model."""

from collections.abc import Collection, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from modelopt.torch.quantization.nn import TensorQuantizer

from nemo_ptq.modelopt.megatron_layers import global_modules
from nemo_ptq.modelopt.quantizers import compute_weight_amax, insert_quantizers, leave_alone
from nemo_ptq.modelopt.smoothing import exact_pre_quant_scale, smooth
from nemo_ptq.quantization.state import CalibrationState, fingerprint_of, is_fingerprinted, sum_of_bits
from nemo_ptq.quantization.state_header import StateHeader

# What ModelOpt takes where a configuration says `use_constant_amax`: FP8's largest value, so that the scale is 1.
_CAST_AMAX = torch.tensor(448.0)
# The layers whose inputs tensor parallelism shards, and their channels' amaxes and scales with them.
_ROW_PARALLEL = ("linear_proj", "linear_fc2")


def fingerprint(module: GPTModel) -> str:
    """Returns a model's fingerprint, see :func:`~nemo_ptq.quantization.state.fingerprint_of`; every rank calls it.

    Args:
        module: This rank's part of the model, unquantized, in a 16-bit data type.
    """
    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    sums = {
        (name, tensor_rank): sum_of_bits(child.get_parameter("weight"))
        for name, child in global_modules(module).items()
        if is_fingerprinted(name)
    }
    total: dict[str, int] = {}
    for (name, _), value in _merged(sums).items():
        total[name] = total.get(name, 0) + value
    return fingerprint_of(total)


def _merged(mine: dict[Any, Any]) -> dict[Any, Any]:
    """What all ranks have; data-parallel ranks have the same under the same key."""
    everyones: list[dict[Any, Any]] = [mine] * dist.get_world_size()
    dist.all_gather_object(everyones, mine)
    return {key: value for part in everyones for key, value in part.items()}


def _activation_quantizers(module: GPTModel) -> Iterator[tuple[str, Any, TensorQuantizer]]:
    """Yields the name of each quantizer in the whole model, the layer that it belongs to, and the quantizer."""
    for name, parent in global_modules(module).items():
        for child_name, child in parent.named_children():
            if isinstance(child, TensorQuantizer) and child_name != "weight_quantizer":
                yield f"{name}.{child_name}", parent, child


def _quantizer_state(parent: Any, quantizer: TensorQuantizer) -> dict[str, torch.Tensor]:
    """The calibration state of one quantizer. AWQ leaves the scale in an input quantizer that does not quantize."""
    found: dict[str, torch.Tensor | None] = {"pre_quant_scale": None, "channel_amax": None, "amax": None}
    if getattr(quantizer, "pre_quant_scale", None) is not None:
        # A quantizer that was restored from a checkpoint has it in the weight's data type only.
        exact = exact_pre_quant_scale(parent)
        found["pre_quant_scale"] = quantizer.pre_quant_scale.float().flatten() if exact is None else exact
        found["channel_amax"] = getattr(quantizer, "_amax_for_smoothing", None)
    if quantizer.is_enabled:
        found["amax"] = (
            _CAST_AMAX if getattr(quantizer, "_use_constant_amax", False) else getattr(quantizer, "_amax", None)
        )
    state = {key: value.detach().cpu() for key, value in found.items() if value is not None}
    return {key: value.float().flatten() if key == "channel_amax" else value for key, value in state.items()}


def _is_sharded(name: str, value: torch.Tensor) -> bool:
    """Whether the last dimension of a tensor of this name is cut by tensor parallelism."""
    return value.numel() > 1 and any(f"{linear}." in name for linear in _ROW_PARALLEL)


def gather_state(module: GPTModel, header: StateHeader) -> CalibrationState:
    """Gathers the calibration state of the whole model on every rank; every rank calls it.

    Args:
        module: This rank's part of the model, calibrated.
        header: Header of the state.
    """
    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    mine = {
        (f"{name}.{key}", tensor_rank): value
        for name, parent, quantizer in _activation_quantizers(module)
        for key, value in _quantizer_state(parent, quantizer).items()
    }
    shards: dict[str, list[torch.Tensor]] = {}
    for (name, _), value in sorted(_merged(mine).items(), key=lambda item: item[0]):
        shards.setdefault(name, []).append(value)
    whole = {
        name: torch.cat(values, dim=-1) if _is_sharded(name, values[0]) else torch.atleast_1d(values[0])
        for name, values in shards.items()
    }
    return CalibrationState(header, {name: value.contiguous() for name, value in whole.items()})


@torch.no_grad()
def apply_state(module: GPTModel, state: CalibrationState, unquantized: Collection[str] = ()) -> None:
    """Quantizes a model as its calibration did, without any data.

    Weights are smoothed and their amaxes computed as they were then, bit for bit, whatever the parallelism was and is.
    That holds for algorithms whose state ``is_repeatable``; others compute weight amaxes from the data.

    Args:
        module: This rank's part of the model, unquantized; quantizers are inserted and its weights smoothed in place.
        state: Calibration state of the same model.
        unquantized: Linear layers that are left alone.
    """
    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    tensor_ranks = parallel_state.get_tensor_model_parallel_world_size()

    def local(name: str, device: torch.device) -> torch.Tensor | None:
        value = state.tensors.get(name)
        if value is not None and _is_sharded(name, value):
            value = value.chunk(tensor_ranks, dim=-1)[tensor_rank]
        return None if value is None else value.to(device)

    insert_quantizers(module, state.header.modelopt_config)
    leave_alone(module, unquantized)
    device = next(module.parameters()).device
    for name, parent, quantizer in _activation_quantizers(module):
        scale = local(f"{name}.pre_quant_scale", device)
        if scale is not None:
            smooth(parent, scale)
        channel_amax = local(f"{name}.channel_amax", torch.device("cpu"))
        if channel_amax is not None:
            quantizer._amax_for_smoothing = channel_amax
    compute_weight_amax(module, state.header.modelopt_config)
    for name, _, quantizer in _activation_quantizers(module):
        amax = local(f"{name}.amax", device)
        if amax is not None:
            quantizer.amax = amax.reshape(()) if amax.numel() == 1 else amax
