# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Rounding to nearest with known scales: the fallback of quality "max"."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from nemo_ptq.calibration.observing import State, TokenCounts, linear_shards
from nemo_ptq.calibration.rounded_shards import round_shard
from nemo_ptq.calibration.rounders import Rounder
from nemo_ptq.calibration.streams import Stream
from nemo_ptq.checkpoint.blocks import Block
from nemo_ptq.parallel.ranks import Parallelism
from nemo_ptq.quantization.rounded_weight import RoundedWeight
from nemo_ptq.quantization.state import of_block


@dataclass
class NearestLearner:
    """Rounds each block to nearest: a :class:`~nemo_ptq.calibration.pipeline.Learner` that reads no data.

    Its weights are those of the model with which :class:`~nemo_ptq.calibration.rounding_learner.RoundingLearner`
    compares its own in the end.

    Attributes:
        parallelism: This rank's place.
        rounders: How each quantized layer is rounded, by its name.
        state: The calibration state of this rank's blocks, whose scales are kept.
        counts: See :class:`~nemo_ptq.calibration.pipeline.Learner`: counts of the walk that made the state.
        rounded: This rank's shards of the weights of the block that was learned last, by the layers' names.
        nearest: The blocks so far.
    """

    parallelism: Parallelism
    rounders: Mapping[str, Rounder]
    state: State
    counts: TokenCounts
    rounded: dict[str, RoundedWeight] = field(default_factory=dict)
    nearest: list[int] = field(default_factory=list)

    @property
    def streams(self) -> Mapping[str, Stream]:
        """See :attr:`~nemo_ptq.calibration.pipeline.Learner.streams`: there are none."""
        return {}

    @torch.no_grad()
    def learn(self, block: Block, is_head: bool) -> dict[str, torch.Tensor]:
        """See :meth:`~nemo_ptq.calibration.pipeline.Learner.learn`."""
        self.rounded.clear()
        if is_head or block.index == 0:
            return {}
        self.nearest.append(block.index)
        state = dict(of_block(self.state, block.index))
        for name, linear in linear_shards(block, self.parallelism).items():
            if name not in self.rounders:
                continue
            weight, scale = linear.weight.float(), state.get(f"{name}.input_quantizer.pre_quant_scale")
            if scale is not None:
                # Inputs are multiplied with the scale in their own data type.
                local = linear.input_ranks.shard(scale.to(linear.weight.device))
                weight = weight / local.to(linear.weight.dtype).float()
            rounded = round_shard(linear, weight, None, self.rounders[name])
            self.rounded[name] = RoundedWeight(rounded.codes, rounded.scale, rounded.scale_2)
        return state
