# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A calibrated Megatron model, spread over ranks, as exports see it."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from modelopt.torch.export.quant_utils import get_quantization_format, get_weight_block_size
from modelopt.torch.quantization.nn import SequentialQuantizer

from nemo_ptq.console.reporter import Reporter
from nemo_ptq.export.layers import Linear, Plain
from nemo_ptq.export.shard_map import ShardMap
from nemo_ptq.export.source import Source
from nemo_ptq.job import Job
from nemo_ptq.models.registry import family_of
from nemo_ptq.models.spec import shape_of
from nemo_ptq.quantization.schemes import UNQUANTIZED, Scheme, scheme_for

if TYPE_CHECKING:  # it calibrates with what is here
    from nemo_ptq.checkpoint.loading import LoadedModel

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


def scheme_of(linear: Any) -> Scheme:
    """Returns the scheme in which ModelOpt calibrated a linear layer.

    Raises:
        PtqError: If it is quantized in a way that cannot be exported.
    """
    modelopt_format = get_quantization_format(linear)
    return scheme_for(modelopt_format, get_weight_block_size(linear)) if modelopt_format else UNQUANTIZED


def linear_of(linear: Any) -> Linear:
    """Describes a linear layer of Megatron's, quantized by ModelOpt or not.

    Raises:
        PtqError: If it is quantized in a way that cannot be exported.
    """
    scheme, bias = scheme_of(linear), getattr(linear, "bias", None)
    if scheme is UNQUANTIZED:
        return Linear(linear.weight, bias)
    quantizer, inputs = linear.weight_quantizer, linear.input_quantizer
    first, second = quantizer if isinstance(quantizer, SequentialQuantizer) else (quantizer, None)
    return Linear(
        linear.weight,
        bias,
        scheme,
        first.export_amax(),
        None if second is None else second.export_amax(),
        inputs.export_amax() if inputs.is_enabled else None,
        _pre_quant_scale(linear),
    )


def _pre_quant_scale(linear: Any) -> torch.Tensor | None:
    scale = getattr(getattr(linear, "input_quantizer", None), "_pre_quant_scale", None)
    return None if scale is None else scale.squeeze()


def plain_of(module: Any) -> Plain:
    """Describes a norm, an embedding or a router of Megatron's."""
    offset = 1.0 if getattr(module, "zero_centered_gamma", False) else 0.0
    return Plain(module.weight, getattr(module, "bias", None), offset)


def quantizes_kv_cache(core_attention: Any) -> bool:
    """Whether ModelOpt quantizes the keys and values that this attention caches."""
    quantizer = getattr(core_attention, "k_bmm_quantizer", None)
    return quantizer is not None and quantizer.is_enabled


def kv_cache_of(core_attention: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the largest magnitudes of the keys and the values that an attention caches, one element each."""
    return core_attention.k_bmm_quantizer.export_amax(), core_attention.v_bmm_quantizer.export_amax()


@dataclass(frozen=True)
class MegatronLayers:
    """This rank's layers of a Megatron model: see :class:`~nemo_ptq.export.layers.Layers`.

    Attributes:
        module: This rank's part of the model.
        modules: What exports are made of, from :func:`global_modules`.
    """

    module: GPTModel
    modules: Mapping[str, Any]

    def linear(self, name: str) -> Linear:
        """See :meth:`Layers.linear`."""
        return linear_of(self.modules[name])

    def plain(self, name: str) -> Plain:
        """See :meth:`Layers.plain`."""
        return plain_of(self.modules[name])

    def kv_cache(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`Layers.kv_cache`."""
        return kv_cache_of(self.modules[name])

    def pre_quant_scale(self, name: str) -> torch.Tensor | None:
        """See :meth:`Layers.pre_quant_scale`."""
        return _pre_quant_scale(self.modules.get(name))


@dataclass(frozen=True)
class _Holding:
    """What one rank tells the others about itself; schemes as their ModelOpt format and block size."""

    tensor_rank: int
    modules: tuple[str, ...]
    schemes: dict[str, tuple[str, int]]
    kv_cache: frozenset[str]


def _choose_owners(holdings: Iterable[_Holding]) -> dict[str, list[int]]:
    """Takes the lowest rank for each tensor-parallel shard of a module; data-parallel copies are left out."""
    shards: dict[str, dict[int, int]] = defaultdict(dict)
    for rank, holding in enumerate(holdings):
        for name in holding.modules:
            shards[name].setdefault(holding.tensor_rank, rank)
    return {name: [ranks[shard] for shard in sorted(ranks)] for name, ranks in shards.items()}


def gather_shard_map(modules: Mapping[str, torch.nn.Module]) -> ShardMap:
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
    return ShardMap(
        _choose_owners(holdings),
        {name: scheme_for(*scheme) for holding in holdings for name, scheme in holding.schemes.items()},
        frozenset().union(*(holding.kv_cache for holding in holdings)),
    )


def source_of(model: "LoadedModel", job: Job, reporter: Reporter) -> Source:
    """Describes a calibrated model; every rank calls it.

    Raises:
        PtqError: If a layer is quantized in a way that cannot be exported.
    """
    modules = global_modules(model.module)
    return Source(
        layers=MegatronLayers(model.module, modules),
        rank=dist.get_rank(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_ranks=parallel_state.get_tensor_model_parallel_world_size(),
        shard_map=gather_shard_map(modules),
        shape=shape_of(model.config, model.vocab_size),
        family=family_of(type(model.config).__name__, job.export.decoder_type),
        config=model.config,
        has_vocab_size=model.has_vocab_size,
        tokenizer=model.tokenizer,
        tokenizer_is_replaced=job.tokenizer_path is not None,
        calibration=model.calibration,
        checkpoint=job.checkpoint,
        settings=job.export,
        reporter=reporter,
    )
