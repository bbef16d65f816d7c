# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Quality "balanced": each layer is rounded so that its output changes least, given the inputs that reach it.

The calibration batches walk through the model as quantized so far. Where weights are moved toward the unquantized
model's output (:attr:`nemo_ptq.quantization.algorithms.Algorithm.moves_weights`), they walk through that model too. For
each block:

1. The unquantized batches run through it, and X, the input of each linear layer whose weight is moved, is kept.
2. The quantized batches run as far as each linear layer in turn, through those before it as they have been rounded.
   With X_q the layer's inputs, X_q^T X_q is summed up, with what its activation scales need, and (X - X_q)^T X_q where
   its weight is moved. Then it is rounded by :mod:`nemo_ptq.calibration.gptq`.
3. The quantized batches run through the rounded block, activations rounded as a server does.

A batch does not begin anew for each layer: once the last layer of an attention or of an MLP is rounded, its input is
known, and the layers before it are skipped. The total is less than three forward passes over the calibration
data: a whole one in step 1, and about one and a half in steps 2 and 3.

Quality "max" also has the layers that write into the residual stream make up for its errors (residual.py), and rounds a
block to nearest where that is better on held-out batches (held_out.py). In the end the whole model is compared on these
batches with one that is rounded to nearest throughout, which the job takes if it is closer to the unquantized model
(nearest_learner.py).
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from nemo_ptq.calibration.gptq import Rounded
from nemo_ptq.calibration.held_out import HeldOutError, held_out_places, sample_errors
from nemo_ptq.calibration.observing import (
    BlockStatistics,
    TokenCounts,
    expert_of,
    has_cache,
    is_of_expert,
    linear_shards,
    round_cache,
)
from nemo_ptq.calibration.residual import residual_of
from nemo_ptq.calibration.rounded_layer import ELSEWHERE, EXACT, IDLE, RoundedLayer
from nemo_ptq.calibration.rounded_shards import round_shard, share_among_experts
from nemo_ptq.calibration.rounders import Rounder
from nemo_ptq.calibration.streams import BlockRunner, Stream
from nemo_ptq.checkpoint.blocks import Block
from nemo_ptq.config import FP8_CACHE
from nemo_ptq.parallel.ranks import Parallelism
from nemo_ptq.quantization.rounded_weight import RoundedWeight
from nemo_ptq.quantization.schemes import Scheme
from nemo_ptq.verify.evaluate import POSITIONS_AT_ONCE, kl_divergence

# Gives, for a layer's name and its best pre-quantization scale, one that every format can hold.
Foldable = Callable[[str, torch.Tensor], torch.Tensor]


@dataclass
class RoundingLearner:
    """Decides scales and rounds weights, block by block: a :class:`~nemo_ptq.calibration.pipeline.Learner`.

    Attributes:
        runner: Computes blocks.
        parallelism: This rank's place.
        quantized: The calibration batches of this data-parallel rank, on their way through the quantized model.
        reference: The same on their way through the unquantized one; None where nothing is compared with it.
        rounders: How each quantized layer is rounded, by its name.
        moved: Layers whose weight is moved toward the unquantized model's output before it is rounded.
        schemes: How each quantized layer is stored.
        foldable: Which pre-quantization scales there may be.
        quantizes_kv_cache: Whether keys and values are calibrated as well.
        is_max: Whether layers that write into the residual stream make up for what it lacks, and each block is compared
            with one that is rounded to nearest on batches that are held out: quality "max".
        cache_format: The format that calibrated keys and values are rounded to.
        counts: See :class:`~nemo_ptq.calibration.pipeline.Learner`.
        rounded: This rank's shards of the weights of the block that was learned last, by the layers' names.
        nearest: Blocks of this rank in which rounding to nearest was better on the batches that are held out.
        plain: With "max" the batches that are held out, on their way through the model rounded to nearest throughout.
        found: With "max", behind the head, and where any batch is held out: the error of the model, and of the one that
            is rounded to nearest throughout.
    """

    runner: BlockRunner
    parallelism: Parallelism
    quantized: Stream
    reference: Stream | None
    rounders: Mapping[str, Rounder]
    moved: Collection[str]
    schemes: Mapping[str, Scheme]
    foldable: Foldable
    quantizes_kv_cache: bool
    is_max: bool = False
    cache_format: str = FP8_CACHE
    counts: TokenCounts = field(default_factory=Counter)
    rounded: dict[str, RoundedWeight] = field(default_factory=dict)
    nearest: list[int] = field(default_factory=list)
    plain: Stream = field(init=False)
    found: tuple[HeldOutError, HeldOutError] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        """Tells which batches are held out."""
        self.plain = Stream([self.quantized.tokens[place] for place in self._held_out])

    @property
    def streams(self) -> Mapping[str, Stream]:
        """See :attr:`~nemo_ptq.calibration.pipeline.Learner.streams`."""
        found = {"calibration_quantized": self.quantized}
        if self.reference is not None:
            found["calibration"] = self.reference
        if self.is_max:
            found["calibration_nearest"] = self.plain
        return found

    @torch.no_grad()
    def learn(self, block: Block, is_head: bool) -> dict[str, torch.Tensor]:
        """See :meth:`~nemo_ptq.calibration.pipeline.Learner.learn`."""
        self.rounded.clear()
        if is_head:
            if self.is_max:
                self._compare_models()
            return {}
        if block.index == 0:
            self.runner.advance(block, self.quantized)
            if self.reference is not None:
                self.reference.hidden = list(self.quantized.hidden)
            self.plain.hidden = [self.quantized.hidden[place] for place in self._held_out]
            return {}
        linears = linear_shards(block, self.parallelism)
        linears = {name: linear for name, linear in linears.items() if name in self.schemes}
        state: dict[str, torch.Tensor] = {}
        with ExitStack() as stack:
            layers = {
                name: RoundedLayer(
                    block.modules[name],
                    linear,
                    self.runner,
                    name in self.moved,
                    residual_of(name, block.modules, self.runner) if self.is_max else None,
                    _ended_by(name, block.modules),
                )
                for name, linear in linears.items()
            }
            for layer in layers.values():
                stack.callback(layer.restore)
            if self.reference is not None:
                self._keep_exact(block, layers.values(), self.reference)
            for stage in _stages(layers):
                found = self._gather(block, stage, layers.values())
                state |= found
                for name, layer in stage.items():
                    if expert := expert_of(name):
                        self.counts[expert] += layer.moments.tokens
                    layer.serve(found, self.schemes[name])
                    self.rounded[name] = self._round(layer)
                for name, module in block.modules.items():
                    if has_cache(name, found):
                        stack.callback(round_cache(module, name, found, self.cache_format, self.runner.device).remove)
                        for layer in stage.values():  # these saw what follows from keys and values as they were
                            layer.forget(range(len(self.quantized.tokens)))
            if self.is_max:
                self._keep_better(block, layers)
            for place in _placing(range(len(self.quantized.hidden)), layers.values()):
                self.runner.advance_batch(block, self.quantized, place)
        return state

    @property
    def _held_out(self) -> list[int]:
        """The held-out batches: only the scales of activations are fitted to them, since they must cover them."""
        return sorted(held_out_places(len(self.quantized.tokens))) if self.is_max else []

    def _keep_better(self, block: Block, layers: Mapping[str, RoundedLayer]) -> None:
        """Rounds a block to nearest where that comes nearer to the unquantized one on batches that are held out."""
        found, learned = self._held_out_error(block, layers.values()), dict(self.rounded)
        weights = {name: layer.module.get_parameter("weight") for name, layer in layers.items()}
        for name, layer in layers.items():
            rounder = self.rounders[layer.linear.name]
            self.rounded[name] = self._serve(layer, round_shard(layer.linear, layer.smoothed(), None, rounder))
            layer.forget(self._held_out)
            layer.place = ELSEWHERE
        self.runner.advance(block, self.plain)
        if self._held_out_error(block, layers.values()).is_less(found):
            self.nearest.append(block.index)
            for layer in layers.values():
                layer.forget(range(len(self.quantized.tokens)))
            return
        self.rounded.update(learned)
        for name, layer in layers.items():
            layer.replace_weight(weights[name])
            layer.forget(self._held_out)

    def _held_out_error(self, block: Block, layers: Collection[RoundedLayer]) -> HeldOutError:
        assert self.reference is not None
        errors = [torch.zeros(0, device=self.runner.device)]
        for place in _placing(self._held_out, layers):
            found = self.runner.layer(block, self.quantized.hidden[place])
            errors.append(sample_errors(found, self.reference.hidden[place].to(found.device)))
        return HeldOutError.of(torch.cat(errors), self.parallelism)

    def _compare_models(self) -> None:
        """Compares the model with one that is rounded to nearest throughout, by their results on held-out batches."""
        assert self.reference is not None
        exact = [self.reference.hidden[place] for place in self._held_out]

        def error(hidden: Sequence[torch.Tensor]) -> HeldOutError:
            samples = [torch.zeros(0, device=self.runner.device)]
            for theirs, ours in zip(exact, hidden, strict=True):
                pairs = zip(ours.split(1, 1), theirs.split(1, 1), strict=True)
                samples += [self._divergence(*pair) for pair in pairs]
            return HeldOutError.of(torch.cat(samples), self.parallelism)

        errors = error([self.quantized.hidden[place] for place in self._held_out]), error(self.plain.hidden)
        self.found = errors if errors[1].worst else None

    def _divergence(self, found: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
        """The mean KL divergence of a sample, (1), from hidden states before the head, (sequence, 1, hidden size)."""
        parts = zip(exact.split(POSITIONS_AT_ONCE), found.split(POSITIONS_AT_ONCE), strict=True)
        return torch.cat([kl_divergence(*map(self._logits, part)) for part in parts], 1).mean(1)

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        return self.parallelism.tensor.gather(self.runner.logits(states))

    def _keep_exact(self, block: Block, layers: Collection[RoundedLayer], reference: Stream) -> None:
        """Moves the reference through the block, and keeps the inputs of its layers."""
        for layer in layers:
            layer.mode = EXACT
        for place in _placing(range(len(reference.hidden)), layers):
            self.runner.advance_batch(block, reference, place)
        for layer in layers:
            layer.mode = IDLE

    def _gather(
        self, block: Block, stage: Mapping[str, RoundedLayer], layers: Collection[RoundedLayer]
    ) -> dict[str, torch.Tensor]:
        """Runs the quantized batches through the block as far as the layers of a stage.

        Args:
            block: The block.
            stage: Those layers.
            layers: All layers of the block that are rounded.

        Returns:
            The scales of their inputs: their entries of the calibration state.
        """
        linears = {name: layer.linear for name, layer in stage.items()}
        statistics = {name: self.rounders[name].statistic(linear) for name, linear in linears.items()}
        observed = {name: linear for name, linear in linears.items() if statistics[name] is not None}
        found = BlockStatistics(
            block,
            observed,
            lambda linear: statistics[linear.name],
            self.quantizes_kv_cache and any(name.endswith("linear_proj") for name in stage),
            self.parallelism,
            self.runner.dtype,
            self.runner.device,
        )
        for layer in stage.values():
            layer.compare(self._held_out)
        with found.observing(), _stopping([layer.module for layer in stage.values()]):
            for place in _placing(range(len(self.quantized.hidden)), layers):
                with suppress(_Reached):
                    self.runner.layer(block, self.quantized.hidden[place])
        for layer in stage.values():
            layer.moments.merge(self.parallelism.data)
        experts = [layer.moments for name, layer in stage.items() if is_of_expert(name)]
        if experts:
            share_among_experts(experts, self.parallelism.expert_tensor)
        found.merge()
        state = found.cache_entries()
        for name, linear in observed.items():
            entries = self.rounders[name].decide(linear, found.linears.pop(name), partial(self.foldable, name))
            state |= {f"{name}.input_quantizer.{entry}": value.cpu() for entry, value in entries.items()}
        return state

    def _round(self, layer: RoundedLayer) -> RoundedWeight:
        """Rounds a layer, and has it compute with the rounded weight."""
        rounded = round_shard(layer.linear, layer.smoothed(), layer.moments, self.rounders[layer.linear.name])
        del layer.moments
        return self._serve(layer, rounded)

    @staticmethod
    def _serve(layer: RoundedLayer, rounded: Rounded) -> RoundedWeight:
        layer.replace_weight(rounded.weight)
        return RoundedWeight(rounded.codes, rounded.scale, rounded.scale_2)


# Layers whose output is that of the module they are in: an attention, an MLP or a state space.
_LAST = ("self_attention.linear_proj", "mlp.linear_fc2", "mixer.out_proj")


def _ended_by(name: str, modules: Mapping[str, torch.nn.Module]) -> torch.nn.Module | None:
    """Returns the module of a block whose last layer has this name; None where no module has such a layer."""
    return modules.get(name.rpartition(".")[0]) if name.endswith(_LAST) else None


def _placing(places: Iterable[int], layers: Collection[RoundedLayer]) -> Iterator[int]:
    """Yields the places of batches, and tells layers which one is running."""
    for place in places:
        for layer in layers:
            layer.place = place
        yield place


class _Reached(Exception):
    """The batch has come to where it is looked at."""


# In the order in which a block computes them.
_KINDS = ("in_proj", "out_proj", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


def _stages(layers: Mapping[str, RoundedLayer]) -> Iterator[dict[str, RoundedLayer]]:
    """Yields layers that are rounded together, since none is another's input: experts are many."""
    for kind in _KINDS:
        stage = {name: layer for name, layer in layers.items() if name.endswith(kind)}
        if stage:
            yield stage


@contextmanager
def _stopping(modules: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Ends a block's forward pass with :class:`_Reached` where it enters a module, if that is the only one.

    Hooks that the module has already are called first.
    """

    def stop(*_: Any) -> None:
        raise _Reached

    if len(modules) > 1:
        yield
        return
    handle = modules[0].register_forward_pre_hook(stop)
    try:
        yield
    finally:
        handle.remove()
