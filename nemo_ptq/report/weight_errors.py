# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What the stored weights alone say of a model's layers, for a job that runs no model."""

import torch

from nemo_ptq.checkpoint.parts import is_linear, shares_inputs
from nemo_ptq.export.calibrated import CalibratedLayers
from nemo_ptq.export.module_tensors import Linear
from nemo_ptq.export.shard_map import ShardMap
from nemo_ptq.export.simulation import rounded_weight
from nemo_ptq.report.metrics import LinearSums, layer_records
from nemo_ptq.report.records import Layer
from nemo_ptq.report.sums import sums_of


def weight_sums(name: str, linear: Linear, rounded: torch.Tensor | None) -> LinearSums:
    """Measures the weight of a linear layer, or of one rank's shard of it.

    Args:
        name: Megatron's name.
        linear: The layer.
        rounded: float32 (out, in): the weight that a server multiplies with; None where it is not quantized.
    """
    scale = linear.pre_quant_scale
    return LinearSums(
        linear.scheme.quant_algo,
        shares_inputs(name),
        sums_of(linear.weight, rounded),
        input_amax=None if linear.input_amax is None else float(linear.input_amax),
        pre_quant_scale=None if scale is None else scale.float().cpu().numpy(),
    )


def measure_weights(layers: CalibratedLayers, shard_map: ShardMap) -> tuple[Layer, ...]:
    """Returns the records of all linear layers of a model that rank 0 has all of, one layer in memory at a time."""
    names = [name for name in shard_map.owners if is_linear(name)]
    return layer_records([{name: _sums(name, layers.linear(name)) for name in names}], shard_map.owners)


def _sums(name: str, linear: Linear) -> LinearSums:
    return weight_sums(name, linear, rounded_weight(linear) if linear.is_quantized else None)
