# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The ranks of a job as one of them sees the others: who shares a layer, the data, the experts.

Statistics and scales are decided together by ranks that share something. Code that decides takes a :class:`Ranks`, so
that it also runs in one process without any process group.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """Ranks that share something, in their order.

    Attributes:
        rank: This one's place among them.
        size: Number of ranks.
        group: Their process group; None if this rank is alone.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    def max(self, value: torch.Tensor) -> torch.Tensor:
        """Returns the elementwise maximum over the ranks, in ``value``'s own memory."""
        if self.size > 1:
            dist.all_reduce(value, dist.ReduceOp.MAX, group=self.group)
        return value

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Returns the sum over the ranks, in ``value``'s own memory."""
        if self.size > 1:
            dist.all_reduce(value, group=self.group)
        return value

    def gather(self, value: torch.Tensor) -> torch.Tensor:
        """Joins the last dimension of tensors of equal shape, in the order of the ranks."""
        if self.size == 1:
            return value
        shards = [torch.empty_like(value) for _ in range(self.size)]
        dist.all_gather(shards, value.contiguous(), group=self.group)
        return torch.cat(shards, dim=-1)

    def shard(self, value: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Returns this rank's share of a tensor that is cut equally along a dimension."""
        return value.chunk(self.size, dim)[self.rank] if self.size > 1 else value


ALONE = Ranks()


@dataclass(frozen=True)
class Parallelism:
    """The groups that this rank belongs to.

    Attributes:
        tensor: Ranks that share each layer.
        expert_tensor: Ranks that share each expert.
        expert: Ranks that share the experts of a layer.
        data: Ranks that hold the same dense layers; those of ``expert`` are among them, and read the same samples.
        expert_data: Ranks that hold the same experts, and read other samples.
        stage: This rank's pipeline stage.
        stages: Number of pipeline stages.
        previous: Global rank of the stage before, that has the same place in it.
        following: Global rank of the stage after.
    """

    tensor: Ranks = field(default_factory=Ranks)
    expert_tensor: Ranks = field(default_factory=Ranks)
    expert: Ranks = field(default_factory=Ranks)
    data: Ranks = field(default_factory=Ranks)
    expert_data: Ranks = field(default_factory=Ranks)
    stage: int = 0
    stages: int = 1
    previous: int = 0
    following: int = 0

    def sharing(self, name: str) -> Ranks:
        """Returns the ranks that share a layer, by Megatron's name of it or of its weight."""
        return self.expert_tensor if ".local_experts." in name else self.tensor

    def holding(self, name: str) -> Ranks:
        """Returns the ranks that hold the same shard of a layer, by Megatron's name of it or of its weight."""
        return self.expert_data if ".local_experts." in name else self.data


def this_rank() -> Parallelism:
    """Returns this rank's place in Megatron's groups, which are open."""
    from nemo_ptq.parallel.megatron import parallel_state as state

    def ranks(group: Any) -> Ranks:
        return Ranks(dist.get_rank(group), dist.get_world_size(group), group)

    return Parallelism(
        ranks(state.get_tensor_model_parallel_group()),
        ranks(state.get_expert_tensor_parallel_group()),
        ranks(state.get_expert_model_parallel_group()),
        ranks(state.get_data_parallel_group()),
        ranks(state.get_expert_data_parallel_group()),
        state.get_pipeline_model_parallel_rank(),
        state.get_pipeline_model_parallel_world_size(),
        state.get_pipeline_model_parallel_prev_rank(),
        state.get_pipeline_model_parallel_next_rank(),
    )
