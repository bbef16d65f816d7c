# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Hooks on a block that gather statistics of its layers' inputs, and round the contents of its KV cache."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from nemo_ptq.calibration.methods import LinearShard
from nemo_ptq.calibration.statistics import Amax
from nemo_ptq.checkpoint.blocks import Block
from nemo_ptq.checkpoint.parts import is_linear, shares_inputs
from nemo_ptq.parallel.ranks import Parallelism, Ranks
from nemo_ptq.quantization.activations import cache_scale, rounded_cache

# Tokens by (layer, expert), both counted through the whole model.
TokenCounts = Counter[tuple[int, int]]
# Entries of the calibration state, by name.
State = Mapping[str, torch.Tensor]


def linear_shards(block: Block, parallelism: Parallelism, unquantized: Collection[str] = ()) -> dict[str, LinearShard]:
    """Returns this rank's shards of a block's linear layers, by name, but for those that stay unquantized."""
    return {
        name: LinearShard(
            name,
            module.get_parameter("weight"),
            shares_inputs(name),
            parallelism.sharing(name),
        )
        for name, module in block.modules.items()
        if is_linear(name) and name not in unquantized
    }


class BlockStatistics:
    """The statistics gathered from one block while batches run through it.

    Args:
        block: The block.
        linears: This rank's shards of its linear layers.
        statistic: Makes the empty statistic of a linear layer's input.
        quantizes_kv_cache: Whether keys and values are looked at as well.
        parallelism: This rank's place.
        dtype: The activations' data type.
        device: Where they are.

    Attributes:
        linears: The statistic of each linear layer.
    """

    def __init__(
        self,
        block: Block,
        linears: Mapping[str, LinearShard],
        statistic: Callable[[LinearShard], Any],
        quantizes_kv_cache: bool,
        parallelism: Parallelism,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._block, self._shards, self._parallelism = block, linears, parallelism
        self.linears = {name: statistic(linear) for name, linear in linears.items()}
        caches = [name for name in block.modules if name.endswith("core_attention")] if quantizes_kv_cache else []
        self._caches = {name: (Amax(dtype, device), Amax(dtype, device)) for name in caches}

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Gathers within a ``with`` block."""
        with ExitStack() as hooks:
            for name, linear in self._shards.items():
                hooks.enter_context(_observing(self._block.modules[name], linear, self.linears[name]))
            for name, amaxes in self._caches.items():
                hooks.enter_context(_observing_cache(self._block.modules[name], amaxes))
            yield

    def count(self, counts: TokenCounts) -> None:
        """Counts the tokens that each expert of this rank has seen."""
        for name, statistic in self.linears.items():
            if expert := expert_of(name):
                counts[expert] += statistic.tokens

    def merge(self) -> None:
        """Merges the ranks' statistics; every rank that has the block calls it."""
        for name, linear in self._shards.items():
            self.linears[name].merge(linear.ranks, self._parallelism.holding(name), linear.shares_inputs)
        _share_among_experts(self.linears, self._parallelism.expert)
        for amaxes in self._caches.values():
            for amax in amaxes:
                amax.merge(self._parallelism.tensor, self._parallelism.data, shares_inputs=False)

    def cache_entries(self) -> dict[str, torch.Tensor]:
        """Returns the KV cache's entries of the calibration state, on the CPU."""
        return {
            f"{name}.{kind}_bmm_quantizer.amax": amax.value.reshape(1).cpu()
            for name, amaxes in self._caches.items()
            for kind, amax in zip("kv", amaxes, strict=True)
        }


def is_of_expert(name: str) -> bool:
    """Whether a linear layer, by Megatron's name, is one of an expert."""
    return ".local_experts." in name


def expert_of(name: str) -> tuple[int, int] | None:
    """Returns layer and expert from Megatron's name of an expert's first linear layer; None for any other layer."""
    parts = name.split(".")
    if parts[-1] != "linear_fc1" or "local_experts" not in parts:
        return None
    return int(parts[2]), int(parts[parts.index("local_experts") + 1])


def _share_among_experts(statistics: Mapping[str, Any], ranks: Ranks) -> None:
    """Gives all experts of a layer the largest amax of any: servers have one input scale for them all.

    An expert that saw no token then has a sound scale too: it covers every token that could have reached it.
    """
    for kind in ("linear_fc1", "linear_fc2"):
        of_experts = [s for name, s in statistics.items() if ".local_experts." in name and name.endswith(kind)]
        if of_experts and isinstance(of_experts[0], Amax):
            largest = ranks.max(torch.stack([statistic.value for statistic in of_experts]).amax())
            for statistic in of_experts:
                statistic.value = largest.clone()  # the journal's file takes no tensors that share memory


@contextmanager
def _observing(module: torch.nn.Module, linear: LinearShard, statistic: Any) -> Iterator[None]:
    """Gathers a statistic of a linear layer's input within a ``with`` block."""

    def observe(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        local = args[0].reshape(-1, args[0].shape[-1])
        statistic.observe(local, linear.input_ranks.gather(local) if statistic.needs_whole else local)

    handle = module.register_forward_pre_hook(observe)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _observing_cache(module: torch.nn.Module, amaxes: tuple[Amax, Amax]) -> Iterator[None]:
    """Gathers the largest magnitudes of the keys and values that enter an attention within a ``with`` block."""

    def observe(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        for amax, values in zip(amaxes, args[1:3], strict=True):
            amax.observe(values, values)

    handle = module.register_forward_pre_hook(observe)
    try:
        yield
    finally:
        handle.remove()


def has_cache(name: str, state: State) -> bool:
    """Whether a module is an attention whose KV cache a calibration state quantizes."""
    return f"{name}.k_bmm_quantizer.amax" in state


def round_cache(module: torch.nn.Module, name: str, state: State, qformat: str, device: torch.device) -> Any:
    """Has an attention on a device compute with keys and values as a quantized cache returns them.

    Returns:
        The hook's handle.
    """
    key_scale, value_scale = (cache_scale(state[f"{name}.{kind}_bmm_quantizer.amax"]).to(device) for kind in "kv")

    def round_them(_: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        query, key, value, *rest = args
        return query, rounded_cache(key, key_scale, qformat), rounded_cache(value, value_scale, qformat), *rest

    return module.register_forward_pre_hook(round_them)
