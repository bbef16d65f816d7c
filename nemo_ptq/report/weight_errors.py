# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What the stored weights alone say of a model's layers, for a job that runs no model."""

from collections.abc import Callable

import torch

from nemo_ptq.export.layers import Layers, Linear
from nemo_ptq.export.packing import all_rows, pack_linear
from nemo_ptq.export.shard_map import ShardMap
from nemo_ptq.report.metrics import LinearSums, layer_records
from nemo_ptq.report.records import Layer
from nemo_ptq.report.sums import sums_of
from nemo_ptq.verify import dequantize as dq

_DEQUANTIZE: dict[str, Callable[..., torch.Tensor]] = {
    "FP8": dq.dequantize_fp8,
    "W8A8_SQ_PER_CHANNEL": dq.dequantize_int8,
    "W4A16_AWQ": dq.dequantize_int4,
    "W4A8_AWQ": dq.dequantize_w4a8,
    "NVFP4": dq.dequantize_nvfp4,
}
_SCALES = ("weights_scaling_factor", "weights_scaling_factor_2")


def rounded_weight(linear: Linear) -> torch.Tensor:
    """Returns the weight that a server multiplies with: float32 (out, in)."""
    packed = pack_linear(linear, all_rows, torch.bfloat16)
    scales = [packed["", name] for name in _SCALES if ("", name) in packed]
    return _DEQUANTIZE[str(linear.scheme.quant_algo)](packed["", "weight"], *scales)


def weight_sums(name: str, linear: Linear) -> LinearSums:
    """Measures a whole linear layer, by Megatron's name of it."""
    scale = linear.pre_quant_scale
    return LinearSums(
        linear.scheme.quant_algo,
        name.endswith(("linear_proj", "linear_fc2")),
        sums_of(linear.weight, None if linear.weight_amax is None else rounded_weight(linear)),
        input_amax=None if linear.input_amax is None else float(linear.input_amax),
        pre_quant_scale=None if scale is None else scale.float().numpy(),
    )


def measure_weights(layers: Layers, shard_map: ShardMap) -> tuple[Layer, ...]:
    """Returns the records of all linear layers of a model that rank 0 has all of, one layer in memory at a time."""
    names = [name for name in shard_map.owners if ".linear_" in name]
    return layer_records([{name: weight_sums(name, layers.linear(name)) for name in names}], shard_map.owners)
