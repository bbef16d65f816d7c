# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A model's fingerprint, gathered while it walks by block by block."""

import torch.distributed as dist

from nemo_ptq.calibration.observing import State
from nemo_ptq.checkpoint.blocks import Block
from nemo_ptq.quantization.state import fingerprint_of, is_fingerprinted, sum_of_bits


class Fingerprint:
    """Sums up the weights of each block: see :class:`~nemo_ptq.calibration.pipeline.BlockVisitor`.

    Args:
        tensor_rank: This rank's place among those that share layers.
    """

    def __init__(self, tensor_rank: int) -> None:
        self._tensor_rank = tensor_rank
        self.sums: dict[str, int] = {}

    def visit(self, index: int, block: Block | None, state: State) -> None:
        """See :meth:`BlockVisitor.visit`."""
        for name, module in (block.modules if block else {}).items():
            if is_fingerprinted(name):
                self.sums[name] = sum_of_bits(module.get_parameter("weight"))

    def whole(self) -> str:
        """Returns the fingerprint of the whole model, see :func:`~nemo_ptq.quantization.state.fingerprint_of`.

        Every rank calls it, once the walk has ended.
        """
        mine = {(name, self._tensor_rank): value for name, value in self.sums.items()}
        everyones = [mine] * dist.get_world_size()
        dist.all_gather_object(everyones, mine)
        total: dict[str, int] = {}
        # Data-parallel ranks hold equal values under equal keys.
        for (name, _), value in {key: value for part in everyones for key, value in part.items()}.items():
            total[name] = total.get(name, 0) + value
        return fingerprint_of(total)
