# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Measures how much each way of quantizing each layer changes the model, before one of them is chosen.

The calibration batches walk through the unquantized model once. For each block:

1. All batches run through it. For each linear layer, the Gram matrix of its inputs is accumulated, and the statistics
   that its activation scales need.
2. Each layer is rounded in each way, as quality "balanced" does but without correcting for earlier layers. Some tokens
   then run through the block with this layer alone quantized as on a server, its activations rounded too.

The error is the change of the block's output, relative to that output: the mean over the tokens of |change|^2 /
|output|^2. It is measured on the hidden states between blocks, so that errors in an attention and in an MLP, before and
after a nonlinearity, are comparable, and a layer counts by its effect on these states. An error relative to each token
keeps the few tokens with massive activations from hiding all others.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch

from nemo_ptq.calibration.gptq import InverseFactor, coarse_products, inverse_factor
from nemo_ptq.calibration.methods import LinearShard
from nemo_ptq.calibration.observing import BlockStatistics, TokenCounts, linear_shards
from nemo_ptq.calibration.rounded_shards import shard_of_rows, share_among_experts
from nemo_ptq.calibration.rounders import Rounder
from nemo_ptq.calibration.statistics import Moments, Several
from nemo_ptq.calibration.streams import BlockRunner, Stream
from nemo_ptq.checkpoint.blocks import Block
from nemo_ptq.parallel.ranks import Parallelism
from nemo_ptq.quantization.activations import rounded_activation
from nemo_ptq.quantization.schemes import Scheme

# Tokens of this data-parallel rank that run through a block for each way of each of its layers.
_TOKENS = 2048


@dataclass(frozen=True)
class Way:
    """One way to quantize a layer.

    Attributes:
        rounder: How it is rounded; never with pre-quantization scales.
        scheme: How it is stored.
    """

    rounder: Rounder
    scheme: Scheme


# The ways to quantize each of some linear layers that are quantized alike, by their names.
Ways = Mapping[tuple[str, ...], Mapping[str, Way]]


@dataclass
class ErrorLearner:
    """Measures errors, block by block: a :class:`~nemo_ptq.calibration.pipeline.Learner` that calibrates nothing.

    Attributes:
        runner: Computes blocks.
        parallelism: This rank's place.
        stream: The calibration batches of this data-parallel rank.
        ways: What to measure. Layers of other blocks are left alone.
        counts: See :class:`~nemo_ptq.calibration.pipeline.Learner`.
        errors: The errors measured so far, by the first of the layers and the way.
    """

    runner: BlockRunner
    parallelism: Parallelism
    stream: Stream
    ways: Ways
    counts: TokenCounts = field(default_factory=Counter)
    errors: dict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))

    @property
    def streams(self) -> Mapping[str, Stream]:
        """See :attr:`~nemo_ptq.calibration.pipeline.Learner.streams`."""
        return {"calibration": self.stream}

    @torch.no_grad()
    def learn(self, block: Block, is_head: bool) -> dict[str, torch.Tensor]:
        """See :meth:`~nemo_ptq.calibration.pipeline.Learner.learn`."""
        if is_head:
            return {}
        shards = linear_shards(block, self.parallelism)
        mine = {names: ways for names, ways in self.ways.items() if names[0] in shards}
        layers = {name: _Layer(shards[name], ways) for names, ways in mine.items() for name in names}
        entering = self._sample()
        found = BlockStatistics(
            block,
            {name: layer.linear for name, layer in layers.items()},
            lambda linear: layers[linear.name].statistic,
            False,
            self.parallelism,
            self.runner.dtype,
            self.runner.device,
        )
        with found.observing():
            self.runner.advance(block, self.stream)
        found.merge()
        exact = [self.runner.layer(block, states) for states in entering] if mine else []
        for names, ways in mine.items():
            self._share_among_experts([layers[name] for name in names])
            for way in ways:
                with ExitStack() as stack:
                    for name in names:
                        stack.enter_context(layers[name].quantized(block.modules[name], way))
                    changed = [self.runner.layer(block, states) for states in entering]
                self.errors[names[0]][way] = self._error(changed, exact)
            for name in names:  # Gram matrices are large
                del layers[name], found.linears[name]
        return {}

    def _sample(self) -> list[torch.Tensor]:
        """The hidden states of some whole sequences at the stream's current place."""
        sample, left = [], _TOKENS
        for states in self.stream.hidden:
            if left > 0:
                sample.append(states[:, : max(1, left // len(states))])
                left -= sample[-1].shape[0] * sample[-1].shape[1]
        return sample

    def _share_among_experts(self, layers: Sequence["_Layer"]) -> None:
        for kind in ("linear_fc1", "linear_fc2"):
            name = f".{kind}"
            experts = [layer for layer in layers if ".local_experts." in layer.name and layer.name.endswith(name)]
            if experts:
                share_among_experts([layer.moments for layer in experts], self.parallelism.expert_tensor)

    def _error(self, changed: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
        """The mean relative squared change of a token's hidden states."""
        total = torch.zeros(2, device=self.runner.device)  # a rank may have no batch
        for now, before in zip(changed, exact, strict=True):
            errors = _squared(now - before) / _squared(before)
            total += torch.stack([errors.sum(), torch.ones_like(errors).sum()])
        error, tokens = self.parallelism.data.sum(total).tolist()
        return error / tokens


def _squared(states: torch.Tensor) -> torch.Tensor:
    """The squared norm of each token's hidden states, float32 (tokens); never 0."""
    return states.float().square().sum(-1).flatten().clamp(min=torch.finfo(torch.float32).tiny)


class _Layer:
    """A linear layer whose inputs are observed, and which is then quantized in each way in turn.

    Args:
        linear: This rank's shard of it.
        ways: Those ways.

    Attributes:
        linear: As given.
        moments: Sums over its inputs, which all ways need.
        statistic: The moments together with what the ways need for their activations.
    """

    def __init__(self, linear: LinearShard, ways: Mapping[str, Way]) -> None:
        self.linear, self._ways = linear, ways
        local = linear.weight.shape[1]
        self.moments = Moments(local, local * linear.input_ranks.size, linear.weight.device)
        needed = {way: its.rounder.statistic(linear) for way, its in ways.items()}
        self._of_inputs = {way: statistic for way, statistic in needed.items() if statistic is not None}
        self.statistic = Several([self.moments, *self._of_inputs.values()])
        self._factors: dict[bool, InverseFactor] = {}

    @property
    def name(self) -> str:
        """Megatron's name in the whole model."""
        return self.linear.name

    @contextmanager
    def quantized(self, module: torch.nn.Module, way: str) -> Iterator[None]:
        """Has the layer compute as on a server that quantizes it in one way, within a ``with`` block."""
        scheme, amax = self._ways[way].scheme, self._amax(way)

        def enter(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            rounds = amax is not None or scheme.dynamic_inputs
            return (rounded_activation(args[0], amax, scheme), *args[1:]) if rounds else args

        original = module.get_parameter("weight")
        weight = self._rounded(self._ways[way].rounder).to(original.dtype)
        module.register_parameter("weight", torch.nn.Parameter(weight, requires_grad=False))
        handle = module.register_forward_pre_hook(enter)
        try:
            yield
        finally:
            handle.remove()
            module.register_parameter("weight", original)

    def _amax(self, way: str) -> torch.Tensor | None:
        """The scales of the activations."""
        if way not in self._of_inputs:
            return None
        entries = self._ways[way].rounder.decide(self.linear, self._of_inputs[way], lambda scale: scale)
        assert entries.keys() == {"amax"}, way
        return entries["amax"]

    def _rounded(self, rounder: Rounder) -> torch.Tensor:
        """This rank's shard of the weight as it is rounded, float32."""
        ranks = self.linear.input_ranks
        if rounder.sorts not in self._factors:
            gram = ranks.gather(self.moments.gram.T)  # symmetric
            self._factors[rounder.sorts] = inverse_factor(gram, rounder.sorts)
        rows = ranks.shard(ranks.gather(self.linear.weight.float()), 0)
        with coarse_products(rows.device):
            rounded = rounder.round(rows, self._factors[rounder.sorts], self.linear.ranks)
        return shard_of_rows(rounded, self.linear).weight
