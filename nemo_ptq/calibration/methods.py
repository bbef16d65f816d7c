# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The calibration methods: which statistic of a linear layer's input each one gathers, and what it decides from it.

A method's decision is the layer's part of the calibration state (:mod:`nemo_ptq.quantization.state`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from nemo_ptq.calibration.awq import search_scale
from nemo_ptq.calibration.smoothquant import smoothed_amax, smoothing_scale
from nemo_ptq.calibration.statistics import Amax, ChannelAmax, Moments
from nemo_ptq.config import QuantizationConfig
from nemo_ptq.parallel.ranks import ALONE, Ranks
from nemo_ptq.plugins import locate
from nemo_ptq.quantization.algorithms import algorithm_of

# The entries of one layer in a calibration state: "amax", "pre_quant_scale", "channel_amax".
Entries = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class LinearShard:
    """This rank's shard of a linear layer that is calibrated.

    Attributes:
        name: Megatron's name in the whole model.
        weight: (local out-features, local in-features), as the checkpoint has it.
        shares_inputs: Whether the ranks share its input channels (row-parallel), else its outputs.
        ranks: The tensor-parallel ranks that share it.
    """

    name: str
    weight: torch.Tensor
    shares_inputs: bool = False
    ranks: Ranks = ALONE

    @property
    def input_ranks(self) -> Ranks:
        """The ranks that share the input channels."""
        return self.ranks if self.shares_inputs else ALONE

    @property
    def output_ranks(self) -> Ranks:
        """The ranks that share the output rows, and see the same input."""
        return ALONE if self.shares_inputs else self.ranks


class Method(Protocol):
    """A calibration method."""

    def statistic(self, linear: LinearShard) -> Any:
        """Returns the empty statistic that the method needs of a layer's input."""

    def decide(self, linear: LinearShard, statistic: Any) -> Entries:
        """Returns the calibration state of the whole layer; every rank that shares the layer calls it.

        Args:
            linear: The layer.
            statistic: What :meth:`statistic` has gathered, merged over the ranks; it may be used up.
        """


def _floored(amax: torch.Tensor, floor: float | None) -> torch.Tensor:
    return amax if floor is None else amax.clamp(min=floor)


@dataclass(frozen=True)
class Max:
    """Static activation scales from the largest magnitude; the weight's scale follows from the weight.

    Attributes:
        floor: Lower limit of an activation amax.
    """

    floor: float | None = None

    def statistic(self, linear: LinearShard) -> Amax:
        """See :meth:`Method.statistic`."""
        return Amax(linear.weight.dtype, linear.weight.device)

    def decide(self, linear: LinearShard, statistic: Amax) -> Entries:
        """See :meth:`Method.decide`."""
        return {"amax": _floored(statistic.value, self.floor).reshape(1)}


@dataclass(frozen=True)
class SmoothQuant:
    """Moves outliers of activation channels into the weight, then takes static scales from the largest magnitude.

    Attributes:
        alpha: Migration strength.
        floor: Lower limit of an activation amax.
    """

    alpha: float
    floor: float | None = None

    def statistic(self, linear: LinearShard) -> ChannelAmax:
        """See :meth:`Method.statistic`."""
        return ChannelAmax(linear.weight.shape[1], linear.weight.dtype, linear.weight.device)

    def decide(self, linear: LinearShard, statistic: ChannelAmax) -> Entries:
        """See :meth:`Method.decide`."""
        channel_amax = statistic.value.float()
        weight_amax = linear.output_ranks.max(linear.weight.abs().amax(0))
        scale = smoothing_scale(channel_amax, weight_amax, self.alpha)
        amax = linear.input_ranks.max(smoothed_amax(channel_amax, scale, linear.weight.dtype))
        return {
            "pre_quant_scale": linear.input_ranks.gather(scale),
            "channel_amax": linear.input_ranks.gather(channel_amax),
            "amax": _floored(amax, self.floor).reshape(1),
        }


@dataclass(frozen=True)
class Awq:
    """Scales input channels so that rounding the weight to INT4 changes the layer's output least.

    Attributes:
        block_size: Weights that share one INT4 scale.
        exponent_step: Distance between the exponents tried.
        rounds_inputs: Whether activations are quantized too.
    """

    block_size: int
    exponent_step: float = 0.1
    rounds_inputs: bool = False

    def statistic(self, linear: LinearShard) -> Moments:
        """See :meth:`Method.statistic`."""
        local = linear.weight.shape[1]
        return Moments(local, local * linear.input_ranks.size, linear.weight.device)

    def decide(self, linear: LinearShard, statistic: Moments) -> Entries:
        """See :meth:`Method.decide`."""
        weight_scale = search_scale(
            linear.weight, statistic, self.block_size, self.exponent_step, linear.ranks, linear.shares_inputs
        )
        scale = 1 / weight_scale
        entries = {"pre_quant_scale": linear.input_ranks.gather(scale)}
        if self.rounds_inputs:
            amax = linear.ranks.max(smoothed_amax(statistic.amax, scale, linear.weight.dtype))
            entries |= {"channel_amax": linear.input_ranks.gather(statistic.amax), "amax": amax.reshape(1)}
        return entries


def method_for(quantization: QuantizationConfig, decoder: str) -> Method:
    """Returns the calibration method of one of our algorithms that quantizes.

    Args:
        quantization: The user's configuration.
        decoder: Decoder type of the model, e.g. "llama".
    """
    algorithm = algorithm_of(quantization)
    assert algorithm.method is not None, algorithm.name
    return locate(algorithm.method)(**algorithm.settings(quantization, decoder))
