# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""From the shards that ranks hold to the pieces that files want: interval arithmetic, without any tensor."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from nemo_ptq.export.layout import FileTensor, Part
from nemo_ptq.quantization.schemes import Shape


@dataclass(frozen=True)
class Shard:
    """A slice of a part that a rank holds.

    Attributes:
        rank: The rank.
        start: First index, along the axis that the part is sharded on.
        stop: Index after the last.
    """

    rank: int
    start: int
    stop: int


@dataclass(frozen=True)
class Transfer:
    """A slice that one rank cuts from its shard and another puts into a file's tensor.

    Attributes:
        rank: Who holds it.
        part: The part that it is cut from.
        axis: Dimension of the cut.
        start: First index, counted from the beginning of the rank's own shard.
        stop: Index after the last.
        tensor: The file's tensor that it becomes part of.
        target: Where it begins in that tensor, one offset for each dimension.
    """

    rank: int
    part: Part
    axis: int
    start: int
    stop: int
    tensor: FileTensor
    target: Shape

    @property
    def shape(self) -> Shape:
        """Shape of the slice, as it is cut."""
        shape = self.part.shape
        return (*shape[: self.axis], self.stop - self.start, *shape[self.axis + 1 :]) if shape else ()

    @property
    def num_bytes(self) -> int:
        """Size of the slice."""
        count = self.tensor.dtype.itemsize
        for size in self.shape:
            count *= size
        return count


def equal_shards(extent: int, ranks: Sequence[int]) -> list[Shard]:
    """Shards an axis equally over ranks, in their order; the last one gets less where it does not divide.

    Example:
        >>> equal_shards(8, [4, 5])
        [Shard(rank=4, start=0, stop=4), Shard(rank=5, start=4, stop=8)]
    """
    size = -(-extent // len(ranks))
    return [Shard(rank, min(index * size, extent), min((index + 1) * size, extent)) for index, rank in enumerate(ranks)]


def qkv_shards(
    rows: str, extent: int, ranks: Sequence[int], num_heads: int, num_kv_heads: int, head_size: int
) -> list[Shard]:
    """Shards the queries, keys or values of a projection whose interleaved rows are sharded equally over ranks.

    Each query group has its heads, its key and its value, in this order; a shard may begin within a group.

    Args:
        rows: "q", "k" or "v".
        extent: Size of the axis: the number of such rows, or half of it where a byte holds two of them.
        ranks: The ranks, in the order of their shards.
        num_heads: Query heads.
        num_kv_heads: Query groups.
        head_size: Rows of one head.

    Example:
        >>> qkv_shards("q", 4, [6, 7], num_heads=4, num_kv_heads=1, head_size=1)
        [Shard(rank=6, start=0, stop=3), Shard(rank=7, start=3, stop=4)]
    """
    per_group = num_heads // num_kv_heads
    # Where in a group such rows begin, and how many there are.
    place, count = {"q": (0, per_group), "k": (per_group, 1), "v": (per_group + 1, 1)}[rows]

    def before(row: int) -> int:
        groups, rest = divmod(row, (per_group + 2) * head_size)
        of_kind = groups * count * head_size + min(max(rest - place * head_size, 0), count * head_size)
        return of_kind * extent // (num_kv_heads * count * head_size)

    shard = (num_heads + 2 * num_kv_heads) * head_size // len(ranks)
    return [Shard(rank, before(index * shard), before((index + 1) * shard)) for index, rank in enumerate(ranks)]


def transfers(tensor: FileTensor, holders: Callable[[Part], list[Shard]]) -> Iterator[Transfer]:
    """Yields the slices that together make a file's tensor.

    Args:
        tensor: The tensor.
        holders: Gives the shards of a part, disjoint and in ascending order; a part that is not sharded has one.

    Raises:
        ValueError: If the shards do not cover what the tensor needs.
    """
    for placement in tensor.placements:
        covered = placement.start
        for shard in holders(placement.part):
            start, stop = max(shard.start, placement.start), min(shard.stop, placement.stop)
            if start >= stop:
                continue
            if start != covered:
                break
            covered = stop
            # The part's axis becomes the axis of the tensor that is as far from the end: experts add one in front.
            offset = placement.axis + len(placement.target) - max(len(placement.part.shape), 1)
            target = list(placement.target)
            if target:
                target[offset] += start - placement.start
            yield Transfer(
                shard.rank,
                placement.part,
                placement.axis,
                start - shard.start,
                stop - shard.start,
                tensor,
                tuple(target),
            )
        if covered != placement.stop:
            raise ValueError(f"no rank holds {placement.part} from index {covered} on, which {tensor.name} needs")
