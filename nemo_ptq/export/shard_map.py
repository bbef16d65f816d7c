# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Which rank holds which module of the model."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from nemo_ptq.quantization.schemes import Scheme


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
