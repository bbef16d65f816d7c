# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Any sharding of a part over ranks to any pieces in files: arrays come out as they went in."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nemo_ptq.export.layout import FileTensor, Part, Placement
from nemo_ptq.export.reshard import Shard, Transfer, equal_shards, qkv_shards, transfers


@dataclass(frozen=True)
class Sharded:
    """A part, its values, and the ranks that hold slices of it."""

    part: Part
    values: np.ndarray
    shards: list[Shard]

    def cut(self, transfer: Transfer) -> np.ndarray:
        """What the transfer's rank cuts from the slice that it holds, and from nothing else."""
        (shard,) = (shard for shard in self.shards if shard.rank == transfer.rank)
        held = self.values.take(range(shard.start, shard.stop), axis=transfer.axis)
        assert transfer.stop <= held.shape[transfer.axis]
        return held.take(range(transfer.start, transfer.stop), axis=transfer.axis)


def reassemble(tensor: FileTensor, sources: dict[Part, Sharded]) -> np.ndarray:
    whole = np.zeros(tensor.shape, dtype=np.int32)
    for transfer in transfers(tensor, lambda part: sources[part].shards):
        piece = sources[transfer.part].cut(transfer)
        assert transfer.shape == piece.shape
        assert transfer.num_bytes == piece.nbytes
        stacked = len(transfer.target) - piece.ndim
        index = transfer.target[:stacked] + tuple(
            slice(start, start + size) for start, size in zip(transfer.target[stacked:], piece.shape, strict=True)
        )
        whole[index] = piece
    return whole


def cuts(extent: int) -> st.SearchStrategy[list[int]]:
    """Where an axis is cut, its ends included."""
    return st.lists(st.integers(0, extent), max_size=5).map(lambda inner: [0, *sorted(inner), extent])


@st.composite
def sharded_parts(draw: st.DrawFn, name: str, shape: tuple[int, ...], axis: int) -> Sharded:
    """A part whose shards have any sizes, empty ones included, on ranks in any order."""
    values = draw(hnp.arrays(np.int32, shape, elements=st.integers(1, 9)))
    bounds = draw(cuts(shape[axis]))
    ranks = draw(st.permutations(range(len(bounds) - 1)))
    shards = [Shard(rank, *ends) for rank, ends in zip(ranks, pairwise(bounds), strict=True)]
    return Sharded(Part(name, "", "weight", shape, axis), values, shards)


@st.composite
def joined_tensors(draw: st.DrawFn) -> tuple[FileTensor, dict[Part, Sharded], np.ndarray]:
    """A tensor of pieces of several parts one after the other, perhaps stacked, and what it must become."""
    axis, experts = draw(st.sampled_from([0, 1])), draw(st.sampled_from([0, 2]))
    width = draw(st.integers(1, 4))
    placements: list[Placement] = []
    sources: dict[Part, Sharded] = {}
    extents = draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    pieces = [(extent, *sorted(draw(st.tuples(*[st.integers(0, extent)] * 2)))) for extent in extents]
    stack = []
    for expert in range(max(experts, 1)):
        offset, row = 0, []
        for number, (extent, start, stop) in enumerate(pieces):
            shape = (extent, width) if axis == 0 else (width, extent)
            source = draw(sharded_parts(f"{expert}.{number}", shape, axis))
            target = (offset, 0) if axis == 0 else (0, offset)
            placements.append(Placement(source.part, axis, start, stop, (expert, *target) if experts else target))
            sources[source.part] = source
            row.append(source.values.take(range(start, stop), axis=axis))
            offset += stop - start
        stack.append(np.concatenate(row, axis=axis))
    whole = np.stack(stack) if experts else stack[0]
    return FileTensor("tensor", torch.int32, whole.shape, tuple(placements)), sources, whole


@given(joined_tensors())
def test_any_sharding_reassembles(drawn: tuple[FileTensor, dict[Part, Sharded], np.ndarray]) -> None:
    tensor, sources, expected = drawn
    np.testing.assert_array_equal(reassemble(tensor, sources), expected)


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 6), st.sampled_from([0, 1]))
def test_any_tensor_parallelism_becomes_any_other(extent: int, source_tp: int, target_tp: int, axis: int) -> None:
    shape = (extent, 3) if axis == 0 else (3, extent)
    part = Part("linear", "", "weight", shape, axis)
    source = Sharded(part, np.arange(3 * extent, dtype=np.int32).reshape(shape), equal_shards(extent, range(source_tp)))
    pieces = []
    for rank in range(target_tp):
        start, stop = extent * rank // target_tp, extent * (rank + 1) // target_tp
        mine = (stop - start, 3) if axis == 0 else (3, stop - start)
        tensor = FileTensor("tensor", torch.int32, mine, (Placement(part, axis, start, stop, (0, 0)),))
        pieces.append(reassemble(tensor, {part: source}))
    np.testing.assert_array_equal(np.concatenate(pieces, axis=axis), source.values)


def test_scalar_comes_from_its_only_holder() -> None:
    part = Part("linear", "", "weights_scaling_factor_2", (), None)
    tensor = FileTensor("scale", torch.float32, (), (Placement(part, 0, 0, 1, ()),))
    (transfer,) = transfers(tensor, lambda _: [Shard(3, 0, 1)])
    assert (transfer.rank, transfer.shape, transfer.num_bytes) == (3, (), 4)


def test_equal_shards_leave_the_rest_to_the_last() -> None:
    assert equal_shards(10, [7, 8, 9, 2]) == [Shard(7, 0, 3), Shard(8, 3, 6), Shard(9, 6, 9), Shard(2, 9, 10)]


@pytest.mark.parametrize(
    "shards",
    [
        pytest.param([], id="none"),
        pytest.param([Shard(0, 0, 4)], id="the last"),
        pytest.param([Shard(1, 4, 8)], id="the first"),
        pytest.param([Shard(0, 0, 3), Shard(2, 5, 8)], id="one in between"),
    ],
)
def test_missing_shard_is_an_error(shards: list[Shard]) -> None:
    part = Part("linear", "", "weight", (8, 2), 0)
    tensor = FileTensor("tensor", torch.int32, (8, 2), (Placement(part, 0, 0, 8, (0, 0)),))
    holders: Callable[[Part], list[Shard]] = lambda _: shards  # noqa: E731
    with pytest.raises(ValueError, match=r"no rank holds .*linear.* which tensor needs"):
        list(transfers(tensor, holders))


@given(
    st.integers(1, 4),
    st.integers(1, 5),
    st.sampled_from([2, 4, 6]),
    st.integers(1, 12),
    st.sampled_from([1, 2]),
)
def test_interleaved_rows_are_found_wherever_a_shard_begins(
    groups: int, per_group: int, head_size: int, ranks: int, rows_in_one: int
) -> None:
    """Row by row: which rank holds it, and how many of its kind come before it."""
    heads, total = groups * per_group, groups * (per_group + 2) * head_size
    assume(total % (ranks * rows_in_one) == 0)
    count = {"q": 0, "k": 0, "v": 0}
    expected: dict[str, list[list[int]]] = {kind: [[] for _ in range(ranks)] for kind in count}
    for row in range(total):
        place = row // head_size % (per_group + 2) - per_group
        kind = "q" if place < 0 else "kv"[place]
        expected[kind][row // (total // ranks)].append(count[kind])
        count[kind] += 1
    for kind, of_ranks in expected.items():
        shards = qkv_shards(kind, count[kind] // rows_in_one, range(ranks), heads, groups, head_size)
        found = [list(range(shard.start * rows_in_one, shard.stop * rows_in_one)) for shard in shards]
        assert found == of_ranks
