# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Which rank holds which module of the model."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch.distributed as dist

from nemo_ptq.quantization.schemes import Scheme, scheme_for


@dataclass(frozen=True)
class ShardMap:
    """The whole model, spread over ranks.

    Attributes:
        owners: For each module the ranks that together hold it once, in the order of their tensor-parallel shards.
        schemes: Scheme of each quantized linear layer.
        kv_cache: Core attention modules whose KV cache is quantized.
    """

    owners: Mapping[str, list[int]]
    schemes: Mapping[str, Scheme]
    kv_cache: frozenset[str]


def on_one_rank(names: Iterable[str], schemes: Mapping[str, Scheme], kv_cache: frozenset[str]) -> ShardMap:
    """Returns the shard_map of a model that rank 0 has all of."""
    return ShardMap({name: [0] for name in names}, schemes, kv_cache)


def gather_shard_map(
    modules: Iterable[str], tensor_rank: int, schemes: Mapping[str, Scheme], kv_cache: Iterable[str]
) -> ShardMap:
    """Exchanges with all ranks which modules each one holds; every rank calls it.

    Args:
        modules: This rank's, by Megatron's names in the whole model.
        tensor_rank: This rank's place among those that share them.
        schemes: Scheme of this rank's quantized linear layers.
        kv_cache: This rank's core attention modules whose KV cache is quantized.
    """
    # Schemes hold functions, which do not travel: their names do.
    named = {name: (scheme.modelopt_format, scheme.block_size) for name, scheme in schemes.items()}
    mine = (tuple(modules), tensor_rank, named, frozenset(kv_cache))
    everyones = [mine] * dist.get_world_size()
    dist.all_gather_object(everyones, mine)
    owners: dict[str, dict[int, int]] = defaultdict(dict)
    for rank, (names, place, _, _) in enumerate(everyones):
        for name in names:
            # The lowest rank of each shard; data-parallel copies are left out.
            owners[name].setdefault(place, rank)
    return ShardMap(
        {name: [ranks[place] for place in sorted(ranks)] for name, ranks in owners.items()},
        {name: scheme_for(*scheme) for _, _, theirs, _ in everyones for name, scheme in theirs.items()},
        frozenset().union(*(theirs for _, _, _, theirs in everyones)),
    )
