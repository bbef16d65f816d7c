# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's tensors in the parts that layers own, and how a rank reads its shards of them."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.models.gpt import GPTModel

from nemo_ptq.errors import PtqError

# NeMo wraps Megatron's model in a LightningModule, whose attribute `module` it is.
PREFIX = "module."


@dataclass(frozen=True)
class WeightsSize:
    """How much a model's weights are.

    Attributes:
        parameters: Of the whole model, each once.
        num_bytes: What they take in the checkpoint.
    """

    parameters: int
    num_bytes: int

    @classmethod
    def of(cls, tensors: Iterable[tuple[Sequence[int], torch.dtype]]) -> "WeightsSize":
        """Adds up tensors, given by shape and data type."""
        sizes = [(math.prod(shape), dtype.itemsize) for shape, dtype in tensors]
        return cls(sum(count for count, _ in sizes), sum(count * itemsize for count, itemsize in sizes))


@dataclass(frozen=True)
class TensorPart:
    """The part of a stored tensor that one layer (or one expert of a layer) owns, read when it is written.

    Megatron stacks what its layers have in common: for 32 layers `decoder.layers.mlp.linear_fc2.weight` is stored as
    one tensor of shape (32, hidden, ffn), and each layer is a part of shape (hidden, ffn).

    Attributes:
        key: Name in the checkpoint, without the "module." prefix and without layer or expert numbers.
        shape: Shape of the part, without the stacked axes.
        dtype: Data type as stored.
        read: Gives the part; called once, right before the part is written.
        position: (index, size) along each stacked axis: () for an embedding, ((3, 32),) for layer 3 of 32,
            ((3, 32), (5, 8)) for its expert 5 of 8.
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]
    position: tuple[tuple[int, int], ...] = ()


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
