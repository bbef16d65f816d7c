# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The elements of a layout table: the tensors of a format's files, and where their rows come from.

Everything here is arithmetic on names and sizes. A :class:`Part` is a tensor of the whole model, as one Megatron module
yields it; a :class:`FileTensor` is made of pieces of parts, each of them a :class:`Placement`. Cutting along tensor and
pipeline parallelism, undoing Megatron's interleaving of queries, keys and values, repeating KV heads, padding the
vocabulary and stacking experts are all placements. Each format's table is a :class:`Layout`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from nemo_ptq.models.spec import ModelSpec
from nemo_ptq.quantization.schemes import Shape


@dataclass(frozen=True)
class Part:
    """A tensor of the whole model.

    Attributes:
        module: Megatron's name of the module that it comes from, layers counted through the whole model.
        rows: Which of the module's output rows: "" for all, "q", "k", "v", or "gate" and "up".
        field: "weight", "bias", "weights_scaling_factor", ...
        shape: Shape of the whole.
        axis: Dimension along which Megatron's tensor parallelism shards it, None where every rank has all of it.
    """

    module: str
    rows: str
    field: str
    shape: Shape
    axis: int | None


@dataclass(frozen=True)
class Placement:
    """A piece of a part, and its place in a tensor of a file.

    Attributes:
        part: The part that the piece is cut from.
        axis: Dimension of the part along which the piece is cut.
        start: First index along ``axis``.
        stop: Index after the last.
        target: Where the piece begins in the file's tensor, one offset for each dimension of that tensor.
    """

    part: Part
    axis: int
    start: int
    stop: int
    target: Shape


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a rank file. Elements that no placement covers are zero.

    Attributes:
        name: Name in the file.
        dtype: Data type.
        shape: Shape.
        placements: The pieces that it is made of.
    """

    name: str
    dtype: torch.dtype
    shape: Shape
    placements: tuple[Placement, ...]


# What belongs together: the tensors of one file that come from one transformer layer, from the embedding, or from what
# follows the last layer. A block is the unit in which the exporter streams.
Block = list[FileTensor]


def _with(shape: Shape, axis: int, size: int) -> Shape:
    return (*shape[:axis], size, *shape[axis + 1 :])


def whole(part: Part, name: str, dtype: torch.dtype) -> FileTensor:
    """A tensor that every rank file has all of."""
    extent = part.shape[0] if part.shape else 1
    offsets = (0,) * len(part.shape)
    return FileTensor(name, dtype, part.shape, (Placement(part, 0, 0, extent, offsets),))


def joined(name: str, dtype: torch.dtype, pieces: list[tuple[Part, int, int]], axis: int) -> FileTensor:
    """Pieces ``(part, start, stop)`` one after the other along ``axis``."""
    placements, offset = [], 0
    for part, start, stop in pieces:
        target = _with((0,) * len(part.shape), axis, offset)
        placements.append(Placement(part, axis, start, stop, target))
        offset += stop - start
    return FileTensor(name, dtype, _with(pieces[0][0].shape, axis, offset), tuple(placements))


def share(extent: int, rank: int, ranks: int) -> tuple[int, int]:
    """The ``rank``-th of ``ranks`` equal shares of ``extent``."""
    return extent * rank // ranks, extent * (rank + 1) // ranks


class Layout(Protocol):
    """The layout table of one format for one model."""

    @property
    def shape(self) -> ModelSpec:
        """The model."""

    @property
    def files(self) -> Sequence[str]:
        """Names of the files with tensors."""

    def metadata(self, file: int) -> Mapping[str, str]:
        """Free-form entries for a file's header."""

    def blocks(self, file: int) -> Iterator[Block]:
        """Yields the blocks of a file, empty ones included: embedding, every layer of the model, and the head."""
