# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""How a rank reads its shards of a checkpoint's tensors into a Megatron model."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.models.gpt import GPTModel

from nemo_ptq.checkpoint.parts import PREFIX, TensorPart
from nemo_ptq.errors import PtqError


@torch.no_grad()
def read_parts(module: GPTModel, parts: Sequence[TensorPart]) -> None:
    """Reads this rank's shards into a model, one part in memory at a time.

    Which shards these are is Megatron's to say, as it does when it reads a checkpoint. Rows that a shard has beyond
    the part, which only this tensor parallelism pads, are left as they are.

    Args:
        module: This rank's part of the model. Values take the data type that it has.
        parts: Every part of every tensor.

    Raises:
        PtqError: If a tensor of the model is in no part.
    """
    by_place = {(PREFIX + part.key, tuple(index for index, _ in part.position)): part for part in parts}
    wanted: dict[tuple[str, tuple[int, ...]], list[ShardedTensor]] = {}
    for shard in _shards(module):
        place = shard.key, shard.global_offset[: shard.prepend_axis_num]
        if place not in by_place:
            raise PtqError(f"the weights hold nothing for {shard.key} at {place[1]}, which the model has")
        wanted.setdefault(place, []).append(shard)
    for place, shards in wanted.items():
        whole = by_place[place].read()
        for shard in shards:
            offsets = shard.global_offset[shard.prepend_axis_num :]
            piece = whole[
                tuple(slice(offset, offset + size) for offset, size in zip(offsets, shard.local_shape, strict=True))
            ]
            shard.data[tuple(slice(size) for size in piece.shape)].copy_(piece)


def _shards(module: GPTModel) -> Iterator[ShardedTensor]:
    """The model's parameters as Megatron shards them, each piece a view of its parameter."""
    state: dict[str, Any] = module.sharded_state_dict(prefix=PREFIX)
    apply_factories(state)
    for entry in state.values():
        for piece in entry if isinstance(entry, list) else [entry]:
            # Transformer Engine's extra states are none of the weights.
            if isinstance(piece, ShardedTensor):
                yield piece
