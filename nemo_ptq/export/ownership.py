# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Which rank holds which module of the model."""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from nemo_ptq.export.packing import quantizes_kv_cache, scheme_of
from nemo_ptq.export.schemes import Scheme, scheme_for

_EXPORTED = re.compile(
    r"embedding\.(word|position)_embeddings|output_layer|.*(layernorm|linear_qkv|linear_proj|linear_fc[12]|router|core_attention)"
)


def global_modules(module: GPTModel) -> dict[str, torch.nn.Module]:
    """Returns this rank's modules that exports are made of, by name.

    Layers and experts are counted through the whole model, wherever pipeline and expert parallelism have put them.
    """
    first_expert = 0
    named = {}
    for name, child in module.named_modules():
        if hasattr(child, "local_expert_indices"):
            first_expert = child.local_expert_indices[0]
        if not _EXPORTED.fullmatch(name):
            continue
        if match := re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", name):
            layer = module.decoder.layers[int(match[1])]
            name = f"decoder.layers.{layer.layer_number - 1}.{match[2]}"
        if match := re.fullmatch(r"(.*local_experts\.)(\d+)(.*)", name):
            name = f"{match[1]}{int(match[2]) + first_expert}{match[3]}"
        named[name] = child
    return named


@dataclass(frozen=True)
class _Holding:
    """What one rank tells the others about itself; schemes as their ModelOpt format and block size."""

    tensor_rank: int
    modules: tuple[str, ...]
    schemes: dict[str, tuple[str, int]]
    kv_cache: frozenset[str]


@dataclass(frozen=True)
class Ownership:
    """The whole model, spread over ranks.

    Attributes:
        owners: For each module the ranks that together hold it once, in the order of their tensor-parallel shards.
        schemes: Scheme of each quantized linear layer.
        kv_cache: Core attention modules whose KV cache is quantized.
    """

    owners: dict[str, list[int]]
    schemes: dict[str, Scheme]
    kv_cache: frozenset[str]


def _choose_owners(holdings: Iterable[_Holding]) -> dict[str, list[int]]:
    """Takes the lowest rank for each tensor-parallel shard of a module; data-parallel copies are left out."""
    shards: dict[str, dict[int, int]] = defaultdict(dict)
    for rank, holding in enumerate(holdings):
        for name in holding.modules:
            shards[name].setdefault(holding.tensor_rank, rank)
    return {name: [ranks[shard] for shard in sorted(ranks)] for name, ranks in shards.items()}


def gather_ownership(modules: dict[str, torch.nn.Module]) -> Ownership:
    """Exchanges with all ranks which modules each one holds.

    Args:
        modules: This rank's, from :func:`global_modules`.

    Raises:
        PtqError: If a layer is quantized in a way that cannot be exported.
    """
    schemes = {name: scheme_of(module) for name, module in modules.items() if ".linear_" in name}
    mine = _Holding(
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        modules=tuple(modules),
        schemes={
            name: (scheme.modelopt_format, scheme.block_size)
            for name, scheme in schemes.items()
            if scheme.modelopt_format
        },
        kv_cache=frozenset(
            name for name, module in modules.items() if name.endswith("core_attention") and quantizes_kv_cache(module)
        ),
    )
    holdings: list[_Holding] = [mine] * dist.get_world_size()
    dist.all_gather_object(holdings, mine)
    return Ownership(
        _choose_owners(holdings),
        {name: scheme_for(*scheme) for holding in holdings for name, scheme in holding.schemes.items()},
        frozenset().union(*(holding.kv_cache for holding in holdings)),
    )
