# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Calibration state as a file: what the data has taught, whatever the parallelism it was learned at.

Kept are the activations' ranges, the pre-quantization scales and the KV cache's ranges: everything that another export
needs beside the checkpoint. Ranges of weights follow from the checkpoint.
"""

from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from modelopt.torch.quantization.nn import TensorQuantizer
from safetensors.torch import save

from nemo_ptq.export.ownership import Ownership


def _quantizer_state(quantizer: TensorQuantizer) -> dict[str, torch.Tensor]:
    """What the data has taught one quantizer. AWQ leaves the scale in an input quantizer that does not quantize."""
    state = {"pre_quant_scale": getattr(quantizer, "_pre_quant_scale", None)}
    if quantizer.is_enabled:
        state["amax"] = getattr(quantizer, "_amax", None)
    return {key: value.detach().cpu().contiguous() for key, value in state.items() if value is not None}


def _local_state(modules: dict[str, torch.nn.Module]) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{child_name}.{key}": value
        for name, module in modules.items()
        for child_name, child in module.named_children()
        if isinstance(child, TensorQuantizer) and child_name != "weight_quantizer"
        for key, value in _quantizer_state(child).items()
    }


def save_calibration_state(path: Path, modules: dict[str, torch.nn.Module], ownership: Ownership) -> None:
    """Gathers the calibration state of the whole model on rank 0 and writes it there; every rank calls it.

    Args:
        path: The safetensors file to make.
        modules: This rank's modules, by name.
        ownership: Who holds what.
    """
    rank = dist.get_rank()
    owned = {name: module for name, module in modules.items() if rank in ownership.owners[name]}
    mine = (parallel_state.get_tensor_model_parallel_rank(), _local_state(owned))
    gathered: list[tuple[int, dict[str, torch.Tensor]]] | None = [mine] * dist.get_world_size() if rank == 0 else None
    dist.gather_object(mine, gathered)
    if gathered is None:
        return
    shards: dict[str, dict[int, torch.Tensor]] = {}
    for tensor_rank, state in gathered:
        for key, value in state.items():
            shards.setdefault(key, {})[tensor_rank] = value
    whole = {}
    for key, by_rank in shards.items():
        values = [by_rank[tensor_rank] for tensor_rank in sorted(by_rank)]
        # Only the inputs of a row-parallel layer differ between ranks, and so do their channels' scales.
        sharded = key.endswith("pre_quant_scale") and ("linear_proj" in key or "linear_fc2" in key)
        whole[key] = torch.cat(values) if sharded else values[0].reshape(-1) if values[0].dim() == 0 else values[0]
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(save(whole))
