# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""From sums over shards to figures of whole layers: pure functions over numbers.

Ranks report sums, never ratios: sums of squares and largest magnitudes can be put together in any order, so a figure is
the same at every tensor, pipeline and expert parallelism.
"""

import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from nemo_ptq.report.records import QUANTILES, ExpertTokens, Layer


@dataclass(frozen=True)
class Sums:
    """Of one tensor, or of a part of it.

    Attributes:
        count: Number of elements.
        signal: Sum of their squares.
        noise: Sum of squares of what quantization changed; None where nothing is quantized.
        amax: Largest magnitude.
    """

    count: int = 0
    signal: float = 0.0
    noise: float | None = None
    amax: float = 0.0

    def __add__(self, other: "Sums") -> "Sums":
        """The sums of both parts together."""
        noises = [noise for noise in (self.noise, other.noise) if noise is not None]
        return Sums(
            self.count + other.count,
            self.signal + other.signal,
            sum(noises) if noises else None,
            max(self.amax, other.amax),
        )

    @property
    def sqnr_db(self) -> float | None:
        """Signal to quantization noise in dB; None where nothing was quantized, or nothing was lost."""
        if not self.noise or not self.signal:
            return None
        return 10 * math.log10(self.signal / self.noise)

    @property
    def outlier_ratio(self) -> float | None:
        """Largest magnitude over the root mean square: 1 where all are equal, large where one stands out."""
        return self.amax / math.sqrt(self.signal / self.count) if self.signal else None


@dataclass(frozen=True)
class LinearSums:
    """One rank's shard of a linear layer.

    Attributes:
        scheme: TensorRT-LLM's name of how it is quantized, or None.
        row_parallel: Whether the ranks share its inputs; else they share its outputs.
        weight: Of this shard.
        inputs: Of the activations that enter this shard: other ranks' are others if row parallel, else the same.
        outputs: Of its outputs: the other way round.
        input_amax: The calibrated amax.
        pre_quant_scale: float32 (local in-features), or None.
    """

    scheme: str | None
    row_parallel: bool
    weight: Sums
    inputs: Sums = field(default_factory=Sums)
    outputs: Sums = field(default_factory=Sums)
    input_amax: float | None = None
    pre_quant_scale: np.ndarray | None = None


def as_json(sums: Mapping[str, LinearSums]) -> dict[str, Any]:
    """Returns sums, by name, in what JSON can hold; :func:`from_json` takes it back."""
    found = {name: asdict(linear) for name, linear in sums.items()}
    for linear in found.values():
        scale = linear["pre_quant_scale"]
        linear["pre_quant_scale"] = None if scale is None else scale.tolist()
    return found


def from_json(content: Mapping[str, Any]) -> dict[str, LinearSums]:
    """Returns what :func:`as_json` was called with."""
    return {name: _linear_sums(**linear) for name, linear in content.items()}


def _linear_sums(pre_quant_scale: list[float] | None, **fields: Any) -> LinearSums:
    weight, inputs, outputs = (Sums(**fields.pop(name)) for name in ("weight", "inputs", "outputs"))
    scale = None if pre_quant_scale is None else np.array(pre_quant_scale, dtype=np.float32)
    return LinearSums(weight=weight, inputs=inputs, outputs=outputs, pre_quant_scale=scale, **fields)


def join_shards(shards: Sequence[LinearSums]) -> LinearSums:
    """Puts the shards of a layer together, given in tensor-parallel order."""
    first = shards[0]
    scale = first.pre_quant_scale
    if first.row_parallel and scale is not None:
        scale = np.concatenate([shard.pre_quant_scale for shard in shards if shard.pre_quant_scale is not None])
    return LinearSums(
        first.scheme,
        first.row_parallel,
        sum((shard.weight for shard in shards), Sums()),
        sum((shard.inputs for shard in shards), Sums()) if first.row_parallel else first.inputs,
        first.outputs if first.row_parallel else sum((shard.outputs for shard in shards), Sums()),
        first.input_amax,
        scale,
    )


def join_experts(experts: Sequence[LinearSums]) -> LinearSums:
    """Takes the same linear layer of several experts for one."""
    amaxes = [expert.input_amax for expert in experts if expert.input_amax is not None]
    scales = [expert.pre_quant_scale for expert in experts if expert.pre_quant_scale is not None]
    return LinearSums(
        next((expert.scheme for expert in experts if expert.scheme), None),
        experts[0].row_parallel,
        sum((expert.weight for expert in experts), Sums()),
        sum((expert.inputs for expert in experts), Sums()),
        sum((expert.outputs for expert in experts), Sums()),
        max(amaxes, default=None),
        np.concatenate(scales) if scales else None,
    )


_NAME = re.compile(
    r"decoder\.layers\.(\d+)\..*?(local_experts\.\d+\.)?(?:linear_|mixer\.)(in_proj|out_proj|qkv|proj|fc1|fc2)"
)
_ORDER = ("in_proj", "out_proj", "qkv", "proj", "fc1", "fc2", "experts.fc1", "experts.fc2")


def layer_records(
    of_ranks: Sequence[Mapping[str, LinearSums]], owners: Mapping[str, Sequence[int]]
) -> tuple[Layer, ...]:
    """Makes the records of all layers.

    Args:
        of_ranks: For each rank its linear layers by Megatron's names, counted through the whole model.
        owners: For each name the ranks that together hold the layer once, in tensor-parallel order.
    """
    grouped: dict[tuple[int, str], list[LinearSums]] = defaultdict(list)
    for name in sorted({name for sums in of_ranks for name in sums}):
        if match := _NAME.fullmatch(name):
            kind = f"experts.{match[3]}" if match[2] else match[3]
            grouped[int(match[1]), kind].append(join_shards([of_ranks[rank][name] for rank in owners[name]]))
    keys = sorted(grouped, key=lambda key: (key[0], _ORDER.index(key[1])))
    return tuple(_layer(*key, join_experts(grouped[key])) for key in keys)


def _layer(layer: int, kind: str, sums: LinearSums) -> Layer:
    return Layer(
        layer=layer,
        kind=kind,
        scheme=sums.scheme,
        weight_sqnr_db=sums.weight.sqnr_db,
        input_sqnr_db=sums.inputs.sqnr_db,
        output_sqnr_db=sums.outputs.sqnr_db,
        weight_amax=sums.weight.amax,
        weight_outlier_ratio=sums.weight.outlier_ratio,
        input_amax=sums.input_amax,
        input_outlier_ratio=sums.inputs.outlier_ratio,
        pre_quant_scale=None if sums.pre_quant_scale is None else quantiles(sums.pre_quant_scale),
    )


def with_rounding(layers: Iterable[Layer], by_data: bool, nearest: Collection[int] | None) -> tuple[Layer, ...]:
    """Says of each quantized layer how its weights are rounded.

    Args:
        layers: The records.
        by_data: Whether the job rounds by what the calibration data shows.
        nearest: Transformer layers that it has rounded to nearest all the same; None where that is not known.
    """

    def rounding(layer: Layer) -> str | None:
        if layer.scheme is None or (by_data and nearest is None):
            return None
        return "gptq" if by_data and layer.layer not in (nearest or ()) else "nearest"

    return tuple(replace(layer, rounding=rounding(layer)) for layer in layers)


def quantiles(values: np.ndarray) -> tuple[float, ...]:
    """The values at :data:`~nemo_ptq.report.records.QUANTILES` of their distribution."""
    return tuple(np.quantile(values.astype(np.float64), QUANTILES).tolist())


def expert_records(counts: Mapping[tuple[int, int], int]) -> tuple[ExpertTokens, ...]:
    """Sorts token counts, given by (layer, expert), into layers."""
    by_layer: dict[int, list[int]] = defaultdict(list)
    for layer, expert in sorted(counts):
        by_layer[layer].append(counts[layer, expert])
    return tuple(ExpertTokens(layer, tuple(tokens)) for layer, tokens in by_layer.items())


def finite(values: Iterable[float | None]) -> list[float]:
    """Leaves out what is None."""
    return [value for value in values if value is not None]
