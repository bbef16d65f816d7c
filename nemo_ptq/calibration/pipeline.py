# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The block pipeline: a model is loaded, calibrated and handed on block by block.

For each block (embedding, each layer, head): load its weights, run the calibration batches through it, gather
activation statistics, decide scales, and give the block to whoever packs, writes or measures it. What is decided of a
block is final when the walk leaves it, so its weights can then be dropped: a model larger than memory is calibrated
with one block of weights at a time.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist

from nemo_ptq.calibration.methods import LinearShard, Method
from nemo_ptq.calibration.statistics import Amax
from nemo_ptq.calibration.streams import BlockRunner, Stream
from nemo_ptq.checkpoint.blocks import Block
from nemo_ptq.checkpoint.parts import is_linear, shares_inputs
from nemo_ptq.console.reporter import Reporter
from nemo_ptq.parallel.ranks import Parallelism, Ranks

if TYPE_CHECKING:  # builds Megatron's models, which the decisions here can do without
    from nemo_ptq.checkpoint.loading import LoadedModel

# Tokens by (layer, expert), both counted through the whole model.
TokenCounts = Counter[tuple[int, int]]
# Entries of the calibration state, by name.
State = Mapping[str, torch.Tensor]


class BlockVisitor(Protocol):
    """Uses each block while its weights are in memory."""

    def visit(self, index: int, block: Block | None, state: State) -> None:
        """Called for every block of the whole model, in order, on every rank.

        Args:
            index: The block's place in the model.
            block: The block; None where another pipeline stage holds it.
            state: What was decided of it, of whole layers.
        """


@dataclass
class Learner:
    """Calibrates one block after the other.

    Attributes:
        runner: Computes blocks.
        parallelism: This rank's place.
        stream: The calibration batches of this data-parallel rank.
        method: What is gathered and decided of linear layers.
        quantizes_kv_cache: Whether keys and values are calibrated as well.
        counts: Tokens that each expert of this rank has seen.
    """

    runner: BlockRunner
    parallelism: Parallelism
    stream: Stream
    method: Method
    quantizes_kv_cache: bool
    counts: TokenCounts = field(default_factory=Counter)

    @torch.no_grad()
    def learn(self, block: Block, is_head: bool) -> dict[str, torch.Tensor]:
        """Runs the calibration batches through a block, and returns its calibration state, on the CPU."""
        if is_head:
            return {}
        linears = self._linears(block)
        statistics = {name: self.method.statistic(linear) for name, linear in linears.items()}
        caches = {name: module for name, module in block.modules.items() if name.endswith("core_attention")}
        caches = caches if self.quantizes_kv_cache else {}
        kv = {name: (self._amax(), self._amax()) for name in caches}
        with ExitStack() as hooks:
            for name, linear in linears.items():
                hooks.enter_context(_observing(block.modules[name], linear, statistics[name]))
            for name, module in caches.items():
                hooks.enter_context(_observing_cache(module, kv[name]))
            self.runner.advance(block, self.stream)
        self._count(statistics)
        for name, linear in linears.items():
            statistics[name].merge(linear.ranks, self.parallelism.data, linear.shares_inputs)
        _share_among_experts(statistics, self.parallelism.expert)
        state = {
            f"{name}.input_quantizer.{entry}": value.cpu()
            for name, linear in linears.items()
            for entry, value in self.method.decide(linear, statistics.pop(name)).items()
        }
        for name, amaxes in kv.items():
            for kind, amax in zip("kv", amaxes, strict=True):
                amax.merge(self.parallelism.tensor, self.parallelism.data, shares_inputs=False)
                state[f"{name}.{kind}_bmm_quantizer.amax"] = amax.value.reshape(1).cpu()
        return state

    def _linears(self, block: Block) -> dict[str, LinearShard]:
        return {
            name: LinearShard(
                name,
                module.get_parameter("weight"),
                shares_inputs(name),
                self.parallelism.expert_tensor if ".local_experts." in name else self.parallelism.tensor,
            )
            for name, module in block.modules.items()
            if is_linear(name)
        }

    def _amax(self) -> Amax:
        return Amax(self.runner.module.config.params_dtype, self.runner.device)

    def _count(self, statistics: Mapping[str, Any]) -> None:
        for name, statistic in statistics.items():
            if expert := expert_of(name):
                self.counts[expert] += statistic.tokens


def expert_of(name: str) -> tuple[int, int] | None:
    """Returns layer and expert of an expert's first linear layer, by Megatron's name of it; None of any other."""
    parts = name.split(".")
    if parts[-1] != "linear_fc1" or "local_experts" not in parts:
        return None
    return int(parts[2]), int(parts[parts.index("local_experts") + 1])


def gather_counts(counts: TokenCounts, parallelism: Parallelism) -> TokenCounts:
    """Adds up what all ranks have counted, each token once; every rank calls it."""
    everyones: list[TokenCounts] = [counts] * dist.get_world_size()
    dist.all_gather_object(everyones, counts)
    total: TokenCounts = Counter()
    for part in everyones:
        total.update(part)
    # Ranks that share a layer or its experts read the same tokens, and exchange them all; a shard of an expert counts
    # what each of the others does.
    copies = parallelism.expert.size * parallelism.tensor.size**2
    return Counter({expert: tokens // copies for expert, tokens in total.items()})


def _share_among_experts(statistics: Mapping[str, Any], ranks: Ranks) -> None:
    """Gives all experts of a layer the largest amax of any: servers have one input scale for them all.

    An expert that saw no token then has a sound scale too, into which every token falls that could have reached it.
    """
    for kind in ("linear_fc1", "linear_fc2"):
        of_experts = [s for name, s in statistics.items() if ".local_experts." in name and name.endswith(kind)]
        if of_experts and isinstance(of_experts[0], Amax):
            largest = ranks.max(torch.stack([statistic.value for statistic in of_experts]).amax())
            for statistic in of_experts:
                statistic.value = largest.clone()  # the journal's file takes no tensors that share memory


@contextmanager
def _observing(module: torch.nn.Module, linear: LinearShard, statistic: Any) -> Iterator[None]:
    """Gathers a statistic of what enters a linear layer within a ``with`` block."""

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


def walk(
    model: "LoadedModel",
    runner: BlockRunner,
    learner: Learner | None,
    streams: Sequence[Stream],
    visitors: Sequence[BlockVisitor],
    *,
    drop: bool,
    reporter: Reporter,
    given: Callable[[int], State] | None = None,
    start: int = 0,
    finished: Callable[[int, State], None] | None = None,
) -> None:
    """Walks through the blocks of a model; every rank calls it.

    Args:
        model: This rank's part of the model.
        runner: Computes its blocks.
        learner: Calibrates them; None takes the calibration that is ``given``.
        streams: All batches that walk along: the learner's and the visitors'.
        visitors: Use each block while it is in memory, in this order.
        drop: Free the weights of a block when the walk leaves it.
        reporter: Follows the blocks.
        given: Returns the calibration state of a block, by its place, where there is one already.
        start: The first block that is not finished yet; the streams stand before it.
        finished: Called after each block with its place and its calibration state.
    """
    mine = {block.index: block for block in model.blocks}
    first, last, head = min(mine), max(mine), model.num_blocks - 1
    if model.is_tied and 0 in mine and start > 0:
        model.loader.load(mine[0])  # the head needs it again
    with reporter.progress("blocks", model.num_blocks - start, "blocks") as progress:
        for index in range(start, model.num_blocks):
            # At the beginning of a block, so that between two blocks every stream is in one place.
            if index == last + 1:
                for stream in streams:
                    runner.send(stream)
            if index == first and index > 0:
                for stream in streams:
                    runner.receive(stream)
            block = mine.get(index)
            state: State = {} if given is None else given(index)
            if block is not None:
                with reporter.part("load"):
                    model.loader.load(block)
                if learner is not None:
                    with reporter.part("calibrate"):
                        state = learner.learn(block, index == head)
            for visitor in visitors:
                visitor.visit(index, block, state)
            if block is not None and drop and not (index == 0 and model.is_tied):
                model.loader.drop(block)
            if finished is not None:
                finished(index, state)
            progress.advance(1)
