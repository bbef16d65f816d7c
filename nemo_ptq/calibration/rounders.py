# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""How each algorithm's layers are rounded by the data: qualities "balanced" and "max"."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from nemo_ptq.calibration import gptq
from nemo_ptq.calibration.gptq import InverseFactor, Rounded
from nemo_ptq.calibration.methods import Entries, LinearShard, Max
from nemo_ptq.calibration.search import ALPHAS, choose_smoothing, group_scales, smoothing_scale
from nemo_ptq.calibration.statistics import HeldOutChannels, Statistic
from nemo_ptq.config import QuantizationConfig
from nemo_ptq.parallel.ranks import ALONE, Ranks
from nemo_ptq.plugins import locate
from nemo_ptq.quantization.algorithms import algorithm_of, quantization_of_layer
from nemo_ptq.quantization.grids import FP4, FP8, INT8
from nemo_ptq.quantization.rounding import scale_of

# Gives, for a layer's best pre-quantization scale, one that every format can hold.
Constrain = Callable[[torch.Tensor], torch.Tensor]


class Rounder(Protocol):
    """How the layers of one algorithm are rounded.

    Attributes:
        sorts: Whether the columns may be rounded in any order.
    """

    sorts: bool

    def statistic(self, linear: LinearShard) -> Statistic | None:
        """Returns the empty statistic of the input that :meth:`decide` needs; None where it needs none."""

    def decide(self, linear: LinearShard, statistic: Any, constrain: Constrain) -> Entries:
        """Returns the calibration state of the whole layer; every rank that shares the layer calls it.

        Args:
            linear: The layer.
            statistic: What :meth:`statistic` has gathered of the quantized model's inputs, merged over the ranks.
            constrain: See :data:`Constrain`.
        """

    def round(self, weight: torch.Tensor, factor: InverseFactor, ranks: Ranks) -> Rounded:
        """Chooses the weight's scales and rounds it.

        Args:
            weight: float32 (rows, in-features), smoothed where the layer has a pre-quantization scale.
            factor: The factor of the Gram matrix of the inputs as the layer multiplies them.
            ranks: The ranks that have the other rows.
        """


@dataclass(frozen=True)
class Fp8:
    """FP8 weights and activations, a scale each.

    Attributes:
        floor: Lower limit of an activation amax.
    """

    floor: float | None = None
    sorts = True

    def statistic(self, linear: LinearShard) -> Statistic | None:
        """See :meth:`Rounder.statistic`."""
        return Max(self.floor).statistic(linear)

    def decide(self, linear: LinearShard, statistic: Any, constrain: Constrain) -> Entries:
        """See :meth:`Rounder.decide`."""
        return Max(self.floor).decide(linear, statistic)

    def round(self, weight: torch.Tensor, factor: InverseFactor, ranks: Ranks) -> Rounded:
        """See :meth:`Rounder.round`."""
        return gptq.round_fp8(weight, factor, _scale_of_all(weight, FP8.largest, ranks))


@dataclass(frozen=True)
class Int8:
    """INT8 weights with a scale for each row, INT8 activations with one, smoothed as suits held-out samples best.

    Attributes:
        alpha: SmoothQuant's migration strength; None chooses it for each layer.
        floor: Lower limit of an activation amax.
    """

    alpha: float | None = None
    floor: float | None = None
    sorts = True

    def statistic(self, linear: LinearShard) -> Statistic | None:
        """See :meth:`Rounder.statistic`."""
        local, dtype, device = linear.weight.shape[1], linear.weight.dtype, linear.weight.device
        return HeldOutChannels(local, local * linear.input_ranks.size, dtype, device)

    def decide(self, linear: LinearShard, statistic: Any, constrain: Constrain) -> Entries:
        """See :meth:`Rounder.decide`."""
        amax, held_out = (linear.input_ranks.gather(v).float() for v in (statistic.value, statistic.held_out))
        weight = linear.input_ranks.gather(linear.weight)
        weight = linear.output_ranks.gather(weight.T.contiguous()).T
        dtype = linear.weight.dtype

        def stored(scale: torch.Tensor) -> torch.Tensor:
            # Inputs are multiplied with the scale in their own data type: the weight is divided by just that.
            return constrain(scale).to(dtype).float()

        alphas = ALPHAS if self.alpha is None else (self.alpha,)
        chosen = choose_smoothing(weight, statistic.sample, amax, held_out, alphas, stored)
        # A user's text may exceed the samples as far as the held-out batches exceeded the others: that much room is
        # left.
        headroom = (chosen.input_amax / (amax * chosen.pre_quant_scale).amax()).nan_to_num(1.0)
        channel_amax = torch.maximum(amax, held_out)
        scale = stored(smoothing_scale(channel_amax, weight.float().abs().amax(0), chosen.alpha))
        limit = (channel_amax * scale).amax() * headroom
        return {
            "pre_quant_scale": scale,
            "channel_amax": channel_amax,
            "amax": limit if self.floor is None else limit.clamp(min=self.floor),
        }

    def round(self, weight: torch.Tensor, factor: InverseFactor, ranks: Ranks) -> Rounded:
        """See :meth:`Rounder.round`."""
        return gptq.round_int8(weight, factor, scale_of(weight.abs().amax(1), INT8.largest))


@dataclass(frozen=True)
class Int8Dynamic:
    """INT8 weights with a scale for each row; a server takes the scale of each token from its own activations."""

    sorts = True

    def statistic(self, linear: LinearShard) -> Statistic | None:
        """See :meth:`Rounder.statistic`."""
        return None

    def decide(self, linear: LinearShard, statistic: Any, constrain: Constrain) -> Entries:
        """See :meth:`Rounder.decide`."""
        return {}

    def round(self, weight: torch.Tensor, factor: InverseFactor, ranks: Ranks) -> Rounded:
        """See :meth:`Rounder.round`."""
        return gptq.round_int8(weight, factor, scale_of(weight.abs().amax(1), INT8.largest))


@dataclass(frozen=True)
class Int4:
    """INT4 weights with a scale for each group of inputs.

    There are no AWQ scales of input channels: they would gain nothing over this rounding.

    Attributes:
        group_size: Consecutive in-features that share a scale.
        rounds_inputs: Whether activations, and the weight once more, are rounded to FP8.
    """

    group_size: int
    rounds_inputs: bool = False
    sorts = True

    def statistic(self, linear: LinearShard) -> Statistic | None:
        """See :meth:`Rounder.statistic`."""
        return Max().statistic(linear) if self.rounds_inputs else None

    def decide(self, linear: LinearShard, statistic: Any, constrain: Constrain) -> Entries:
        """See :meth:`Rounder.decide`."""
        return Max().decide(linear, statistic) if self.rounds_inputs else {}

    def round(self, weight: torch.Tensor, factor: InverseFactor, ranks: Ranks) -> Rounded:
        """See :meth:`Rounder.round`."""
        scale = group_scales(weight, factor.importance, self.group_size)
        # The largest code is -8.
        fp8_scale = _scale_of_all(8 * scale, FP8.largest, ranks) if self.rounds_inputs else None
        return gptq.round_int4(weight, factor, scale, fp8_scale)


@dataclass(frozen=True)
class Nvfp4:
    """FP4 weights with an FP8 scale for each block of inputs, activations likewise."""

    sorts = False

    def statistic(self, linear: LinearShard) -> Statistic | None:
        """See :meth:`Rounder.statistic`."""
        return Max().statistic(linear)

    def decide(self, linear: LinearShard, statistic: Any, constrain: Constrain) -> Entries:
        """See :meth:`Rounder.decide`."""
        return Max().decide(linear, statistic)

    def round(self, weight: torch.Tensor, factor: InverseFactor, ranks: Ranks) -> Rounded:
        """See :meth:`Rounder.round`."""
        return gptq.round_nvfp4(weight, factor, _scale_of_all(weight, FP4.largest * FP8.largest, ranks))


def _scale_of_all(values: torch.Tensor, largest: float, ranks: Ranks) -> torch.Tensor:
    """The scale, float32 (1), of a tensor that is sharded over ranks."""
    return scale_of(ranks.max(values.abs().amax()), largest).reshape(1)


def rounder_for(quantization: QuantizationConfig, decoder: str) -> Rounder:
    """Returns the rounder of an algorithm that has quality "balanced".

    Args:
        quantization: The user's configuration.
        decoder: Decoder type of the model, e.g. "llama".
    """
    algorithm = algorithm_of(quantization)
    assert algorithm.rounder is not None, algorithm.name
    return locate(algorithm.rounder)(**algorithm.rounder_settings(quantization, decoder))


@contextmanager
def warming_up(device: torch.device, quantization: QuantizationConfig, decoder: str) -> Iterator[None]:
    """Has a GPU round a small weight in a thread of its own, while a ``with`` block runs.

    The first time, Triton builds kernels and torch loads libraries: seconds that the model's first layer need not wait.

    Args:
        device: Where layers will be rounded.
        quantization: The user's configuration.
        decoder: Decoder type of the model, e.g. "llama".
    """
    if device.type != "cuda" or not quantization.is_balanced:
        yield
        return
    options = [quantization_of_layer(quantization, name) for name in algorithm_of(quantization).candidates]
    with ThreadPoolExecutor(1) as thread:
        # An error here comes again with the first layer, which reports it.
        thread.submit(_round_once, device, [rounder_for(each, decoder) for each in options or [quantization]])
        yield


def _round_once(device: torch.device, rounders: list[Rounder]) -> None:
    with torch.cuda.device(device):
        weight, gram = torch.ones(128, 1024, device=device), torch.eye(1024, device=device)
        for rounder in rounders:
            rounder.round(weight, gptq.inverse_factor(gram, rounder.sorts), ALONE)
