# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The block pipeline: a model is loaded, calibrated and handed on block by block.

For each block (embedding, each layer, head): load its weights, run the calibration batches through it, gather
activation statistics, decide scales, and give the block to whoever packs, writes or measures it. The decisions for a
block are final when the walk leaves it, so its weights can then be dropped: a model larger than memory is calibrated
with one block of weights at a time.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist

from nemo_ptq.calibration.methods import Method
from nemo_ptq.calibration.observing import BlockStatistics, State, TokenCounts, linear_shards
from nemo_ptq.calibration.streams import BlockRunner, Stream
from nemo_ptq.checkpoint.blocks import Block
from nemo_ptq.console.reporter import Reporter
from nemo_ptq.parallel.ranks import Parallelism

if TYPE_CHECKING:  # builds Megatron's models, which the decisions here do not need
    from nemo_ptq.checkpoint.loading import LoadedModel


class BlockVisitor(Protocol):
    """Uses each block while its weights are in memory."""

    def visit(self, index: int, block: Block | None, state: State) -> None:
        """Called for every block of the whole model, in order, on every rank.

        Args:
            index: The block's place in the model.
            block: The block; None where another pipeline stage holds it.
            state: The decisions for it, for whole layers.
        """


class Learner(Protocol):
    """Calibrates one block after the other.

    Attributes:
        counts: Tokens that each expert of this rank has seen.
    """

    counts: TokenCounts

    @property
    def streams(self) -> Mapping[str, Stream]:
        """This data-parallel rank's calibration batches, on their way through the model, by name in the journal."""

    def learn(self, block: Block, is_head: bool) -> dict[str, torch.Tensor]:
        """Runs the calibration batches through a block, and returns its calibration state, on the CPU."""


@dataclass
class ScaleLearner:
    """Decides scales from statistics of the unquantized model: quality "fast".

    Attributes:
        runner: Computes blocks.
        parallelism: This rank's place.
        stream: The calibration batches of this data-parallel rank.
        method: Gathers statistics of linear layers, and decides their scales.
        quantizes_kv_cache: Whether keys and values are calibrated as well.
        unquantized: Linear layers that are left alone.
        counts: See :class:`Learner`.
    """

    runner: BlockRunner
    parallelism: Parallelism
    stream: Stream
    method: Method
    quantizes_kv_cache: bool
    unquantized: Collection[str] = ()
    counts: TokenCounts = field(default_factory=Counter)

    @property
    def streams(self) -> Mapping[str, Stream]:
        """See :attr:`Learner.streams`."""
        return {"calibration": self.stream}

    @torch.no_grad()
    def learn(self, block: Block, is_head: bool) -> dict[str, torch.Tensor]:
        """See :meth:`Learner.learn`."""
        if is_head:
            return {}
        linears = linear_shards(block, self.parallelism, self.unquantized)
        found = BlockStatistics(
            block,
            linears,
            self.method.statistic,
            self.quantizes_kv_cache,
            self.parallelism,
            self.runner.dtype,
            self.runner.device,
        )
        with found.observing():
            self.runner.advance(block, self.stream)
        found.count(self.counts)
        found.merge()
        state = {
            f"{name}.input_quantizer.{entry}": value.cpu()
            for name, linear in linears.items()
            for entry, value in self.method.decide(linear, found.linears.pop(name)).items()
        }
        return state | found.cache_entries()


def gather_counts(counts: TokenCounts, parallelism: Parallelism) -> TokenCounts:
    """Adds up what all ranks have counted, each token once; every rank calls it."""
    everyones: list[TokenCounts] = [counts] * dist.get_world_size()
    dist.all_gather_object(everyones, counts)
    total: TokenCounts = Counter()
    for part in everyones:
        total.update(part)
    # Ranks that share a layer or its experts read the same tokens, and exchange them all; all shards of an expert count
    # the same.
    copies = parallelism.expert.size * parallelism.tensor.size**2
    return Counter({expert: tokens // copies for expert, tokens in total.items()})


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
                if not drop and index + 1 in mine:
                    model.loader.load_ahead(mine[index + 1])
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
