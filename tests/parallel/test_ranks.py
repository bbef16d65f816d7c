# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Ranks that share something agree; a rank that is alone needs no process group."""

import torch

from nemo_ptq.parallel.ranks import ALONE, Ranks
from tests.ranks import run_ranks

VALUES = torch.tensor([[1.0, 5.0, -3.0, 2.0], [4.0, 2.0, -7.0, 2.0]])


def test_alone_everything_stays_as_it_is() -> None:
    value = VALUES.clone()
    for change in (ALONE.max, ALONE.sum, ALONE.gather, ALONE.shard):
        assert change(value) is value
    assert torch.equal(value, VALUES)


def together() -> dict[str, torch.Tensor]:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    ranks, own = Ranks(rank, 2, dist.group.WORLD), VALUES[rank]
    return {
        "max": ranks.max(own.clone()),
        "sum": ranks.sum(own.clone()),
        "gather": ranks.gather(own),
        "rows": ranks.gather(VALUES[:, rank::2]),
        "shard": ranks.shard(VALUES),
        "first": ranks.shard(VALUES, 0),
    }


def test_together_they_have_one_result() -> None:
    for rank, found in enumerate(run_ranks(together, 2)):
        assert torch.equal(found["max"], VALUES.amax(0))
        assert torch.equal(found["sum"], VALUES.sum(0))
        assert torch.equal(found["gather"], VALUES.flatten())
        # The last dimension is joined, whatever the memory looks like.
        assert torch.equal(found["rows"], torch.cat([VALUES[:, ::2], VALUES[:, 1::2]], dim=1))
        assert torch.equal(found["shard"], VALUES[:, 2 * rank : 2 * rank + 2])
        assert torch.equal(found["first"], VALUES[rank : rank + 1])


def place(tp: int, pp: int, ep: int) -> tuple[tuple[int, int], ...]:
    """This rank's place and their number in each group, and the stages around it."""
    from nemo_ptq.parallel.environment import read_launch
    from nemo_ptq.parallel.process_groups import process_groups
    from nemo_ptq.parallel.ranks import this_rank

    sizes = {"tensor_parallel": tp, "pipeline_parallel": pp, "expert_parallel": ep}
    with process_groups(read_launch(), torch.device("cpu"), **sizes):
        found = this_rank()
        groups = (found.tensor, found.expert_tensor, found.expert, found.data, found.expert_data)
        return *((ranks.rank, ranks.size) for ranks in groups), (found.stage, found.stages)


def test_the_place_is_megatrons() -> None:
    one = (0, 1)
    assert run_ranks(place, 4, 2, 2, 1) == [
        ((rank % 2, 2), (rank % 2, 2), one, one, one, (rank // 2, 2)) for rank in range(4)
    ]
    # Ranks that share experts hold the same dense layers, and other experts.
    assert run_ranks(place, 4, 1, 1, 2) == [
        (one, one, (rank % 2, 2), (rank, 4), (rank // 2, 2), one) for rank in range(4)
    ]
