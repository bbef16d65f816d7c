# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Calibration state as a file: what the data has taught, whatever the parallelism it was learned at.

Kept are the activations' ranges, the pre-quantization scales and the KV cache's ranges: everything that another export
needs beside the checkpoint. Ranges of weights follow from the checkpoint.

For each quantizer of an activation, by the name of its module in the whole model:

    ....input_quantizer.amax               (1,), the activations' data type: largest magnitude
    ....input_quantizer.pre_quant_scale    float32 (in-features): what the input is multiplied with and the weight
                                           divided by
    ....input_quantizer.channel_amax       float32 (in-features): largest magnitude of each channel before that, where
                                           the algorithm has measured it (int8_sq, w4a8_awq)
    ....core_attention.k_bmm_quantizer.amax, v_bmm_quantizer.amax    (1,)
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from modelopt.torch.quantization.nn import TensorQuantizer
from safetensors.torch import load_file, save

from nemo_ptq.calibration.algorithms import insert_quantizers, range_weights
from nemo_ptq.calibration.smoothing import exact_pre_quant_scale, smooth
from nemo_ptq.calibration.state_header import StateHeader, read_header
from nemo_ptq.errors import PtqError
from nemo_ptq.export.ownership import global_modules

# The layers whose inputs tensor parallelism shards, and their channels' ranges and scales with them.
_ROW_PARALLEL = ("linear_proj", "linear_fc2")
_SUMMED_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class CalibrationState:
    """What a calibration has found, of the whole model.

    Attributes:
        header: How it was made.
        tensors: By name, on the CPU.
    """

    header: StateHeader
    tensors: Mapping[str, torch.Tensor]


def fingerprint(module: GPTModel) -> str:
    """Returns a fingerprint of a model's unquantized weights that parallelism does not show in; every rank calls it.

    It is made of exact sums of the bits of each linear layer's weight and of the embedding: no shard, order or padding
    with zeros changes it, and another training does.

    Args:
        module: This rank's part of the model, in a 16-bit data type.
    """
    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    weights = {
        name: child.get_parameter("weight")
        for name, child in global_modules(module).items()
        if ".linear_" in name or name == "embedding.word_embeddings"
    }
    sums = {(name, tensor_rank): _sum_of_bits(weight) for name, weight in weights.items()}
    total: dict[str, int] = {}
    for (name, _), value in sorted(_merged(sums).items()):
        total[name] = total.get(name, 0) + value
    return hashlib.sha256(repr(total).encode()).hexdigest()


def _sum_of_bits(weight: torch.Tensor) -> int:
    # In pieces: on a CPU torch makes an int64 copy of what it sums.
    pieces = weight.view(torch.int16).reshape(-1).split(_SUMMED_AT_ONCE)
    return sum(int(piece.sum(dtype=torch.int64)) for piece in pieces)


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
    """What the data has taught one quantizer. AWQ leaves the scale in an input quantizer that does not quantize."""
    found: dict[str, torch.Tensor | None] = {"pre_quant_scale": None, "channel_amax": None, "amax": None}
    if getattr(quantizer, "pre_quant_scale", None) is not None:
        found["pre_quant_scale"] = exact_pre_quant_scale(parent)
        found["channel_amax"] = getattr(quantizer, "_amax_for_smoothing", None)
    if quantizer.is_enabled:
        found["amax"] = getattr(quantizer, "_amax", None)
    state = {key: value.detach().cpu() for key, value in found.items() if value is not None}
    return {key: value.float().flatten() if key == "channel_amax" else value for key, value in state.items()}


def _is_sharded(name: str, value: torch.Tensor) -> bool:
    """Whether the last dimension of a tensor of this name is cut by tensor parallelism."""
    return value.numel() > 1 and any(f"{linear}." in name for linear in _ROW_PARALLEL)


def gather_state(module: GPTModel, header: StateHeader) -> CalibrationState:
    """Gathers the calibration state of the whole model on every rank; every rank calls it.

    Args:
        module: This rank's part of the model, calibrated.
        header: How it was made.
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


def save_state(path: Path, state: CalibrationState) -> None:
    """Writes a calibration state as a safetensors file: the same state gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(save(dict(state.tensors), state.header.to_metadata()))


def load_state(path: Path) -> CalibrationState:
    """Reads a calibration state.

    Raises:
        ConfigError: If the file holds none.
    """
    return CalibrationState(read_header(path), load_file(path))


def check_fits(state: CalibrationState, weights: str) -> None:
    """Refuses a state that was learned from other weights.

    Args:
        state: The state.
        weights: The model's :func:`fingerprint`.

    Raises:
        PtqError: If they differ.
    """
    if weights != state.header.weights:
        raise PtqError(
            "the calibration state was made from other weights than these of the same shape: give the checkpoint that "
            f"was calibrated (then {state.header.checkpoint}), or calibrate this one"
        )


@torch.no_grad()
def apply_state(module: GPTModel, state: CalibrationState) -> None:
    """Quantizes a model as its calibration did, without any data.

    Weights are smoothed and ranged as they were then, bit for bit, whatever the parallelism was and is. That holds for
    algorithms whose state ``is_repeatable``; others range the weights on the data.

    Args:
        module: This rank's part of the model, unquantized; quantizers are inserted and its weights smoothed in place.
        state: Of the same model.

    """
    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    tensor_ranks = parallel_state.get_tensor_model_parallel_world_size()

    def local(name: str, device: torch.device) -> torch.Tensor | None:
        value = state.tensors.get(name)
        if value is not None and _is_sharded(name, value):
            value = value.chunk(tensor_ranks, dim=-1)[tensor_rank]
        return None if value is None else value.to(device)

    insert_quantizers(module, state.header.modelopt_config)
    device = next(module.parameters()).device
    for name, parent, quantizer in _activation_quantizers(module):
        scale = local(f"{name}.pre_quant_scale", device)
        if scale is not None:
            smooth(parent, scale)
        channel_amax = local(f"{name}.channel_amax", torch.device("cpu"))
        if channel_amax is not None:
            quantizer._amax_for_smoothing = channel_amax
    range_weights(module, state.header.modelopt_config)
    for name, _, quantizer in _activation_quantizers(module):
        amax = local(f"{name}.amax", device)
        if amax is not None:
            quantizer.amax = amax.reshape(()) if amax.numel() == 1 else amax
