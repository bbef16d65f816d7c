# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Quality "balanced": each block is rounded so that it gives, from what reaches it, what the unquantized model gives.

The calibration batches walk twice, through the unquantized model and through what has become of it so far. For each
block:

1. The unquantized batches run through it, and what enters each linear layer is kept: X.
2. The quantized batches run as far as each linear layer in turn, through those before it as they have been rounded.
   Summed up are X_q^T X_q and (X - X_q)^T X_q, with X_q what enters the layer, and what the scales of its activations
   need. Then it is rounded by :mod:`nemo_ptq.calibration.gptq`.
3. The quantized batches run through the rounded block, activations rounded as a server does.

That is less than four forward passes over the calibration data: a whole one, about one and a half for the four linear
layers of a block, and another whole one.

Quality "max" also has the layers that write into the residual stream make up for what it lacks (residual.py), and keeps
a block that is rounded to nearest where that is better on batches that are held out (held_out.py).
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from nemo_ptq.calibration.gptq import (
    InverseFactor,
    Rounded,
    coarse_products,
    inverse_factor,
    moved,
    predictable_share,
    unit_factor,
)
from nemo_ptq.calibration.held_out import BlockError, held_out_places, sample_errors
from nemo_ptq.calibration.methods import LinearShard
from nemo_ptq.calibration.observing import (
    BlockStatistics,
    State,
    TokenCounts,
    expert_of,
    has_cache,
    linear_shards,
    round_cache,
)
from nemo_ptq.calibration.residual import Residual, residual_of
from nemo_ptq.calibration.rounders import Rounder
from nemo_ptq.calibration.statistics import Moments, PairedMoments
from nemo_ptq.calibration.streams import BlockRunner, Stream
from nemo_ptq.checkpoint.blocks import Block
from nemo_ptq.config import FP8_CACHE
from nemo_ptq.parallel.ranks import Parallelism, Ranks
from nemo_ptq.quantization.activations import rounded_activation
from nemo_ptq.quantization.rounded_weight import RoundedWeight
from nemo_ptq.quantization.schemes import Scheme

# Gives the pre-quantization scale that every format can hold, of a layer by name and the scale that it would like best.
Foldable = Callable[[str, torch.Tensor], torch.Tensor]


@dataclass
class RoundingLearner:
    """Decides scales and rounds weights, block by block: a :class:`~nemo_ptq.calibration.pipeline.Learner`.

    Attributes:
        runner: Computes blocks.
        parallelism: This rank's place.
        reference: The calibration batches of this data-parallel rank, on their way through the unquantized model.
        quantized: The same on their way through the quantized one.
        rounders: How each quantized layer is rounded, by its name.
        schemes: How it is stored.
        foldable: Which pre-quantization scales there may be.
        quantizes_kv_cache: Whether keys and values are calibrated as well.
        is_max: Whether layers that write into the residual stream make up for what it lacks, and each block is compared
            with one that is rounded to nearest on batches that are held out: quality "max".
        cache_format: What keys and values are rounded to then.
        counts: See :class:`~nemo_ptq.calibration.pipeline.Learner`.
        rounded: This rank's shards of the weights of the block that was learned last, by the layers' names.
        nearest: Blocks of this rank in which rounding to nearest was better on the batches that are held out.
    """

    runner: BlockRunner
    parallelism: Parallelism
    reference: Stream
    quantized: Stream
    rounders: Mapping[str, Rounder]
    schemes: Mapping[str, Scheme]
    foldable: Foldable
    quantizes_kv_cache: bool
    is_max: bool = False
    cache_format: str = FP8_CACHE
    counts: TokenCounts = field(default_factory=Counter)
    rounded: dict[str, RoundedWeight] = field(default_factory=dict)
    nearest: list[int] = field(default_factory=list)

    @property
    def streams(self) -> Mapping[str, Stream]:
        """See :attr:`~nemo_ptq.calibration.pipeline.Learner.streams`."""
        return {"calibration": self.reference, "calibration_quantized": self.quantized}

    @torch.no_grad()
    def learn(self, block: Block, is_head: bool) -> dict[str, torch.Tensor]:
        """See :meth:`~nemo_ptq.calibration.pipeline.Learner.learn`."""
        self.rounded.clear()
        if is_head:
            return {}
        if block.index == 0:
            self.runner.advance(block, self.reference)
            self.quantized.hidden = list(self.reference.hidden)
            return {}
        linears = linear_shards(block, self.parallelism)
        linears = {name: linear for name, linear in linears.items() if name in self.schemes}
        state: dict[str, torch.Tensor] = {}
        with ExitStack() as stack:
            layers = {
                name: _Layer(
                    block.modules[name],
                    linear,
                    self.runner,
                    residual_of(name, block.modules, self.runner) if self.is_max else None,
                )
                for name, linear in linears.items()
            }
            for layer in layers.values():
                stack.callback(layer.restore)
            self._keep_exact(block, layers.values())
            for stage in _stages(layers):
                found = self._gather(block, stage)
                state |= found
                for name, layer in stage.items():
                    if expert := expert_of(name):
                        self.counts[expert] += layer.moments.tokens
                    layer.serve(found, self.schemes[name])
                    self.rounded[name] = self._round(layer)
                for name, module in block.modules.items():
                    if has_cache(name, found):
                        stack.callback(round_cache(module, name, found, self.cache_format).remove)
            if self.is_max:
                self._keep_better(block, layers)
            self.runner.advance(block, self.quantized)
        return state

    @property
    def _held_out(self) -> frozenset[int]:
        """The batches that nothing is fitted to but the scales of activations, which must hold what they have."""
        return held_out_places(len(self.quantized.tokens)) if self.is_max else frozenset()

    def _keep_better(self, block: Block, layers: Mapping[str, "_Layer"]) -> None:
        """Rounds a block to nearest where that comes nearer to the unquantized one on batches that are held out."""
        found, learned = self._held_out_error(block), dict(self.rounded)
        weights = {name: layer.module.get_parameter("weight") for name, layer in layers.items()}
        for name, layer in layers.items():
            rounder = self.rounders[layer.linear.name]
            self.rounded[name] = self._serve(layer, round_shard(layer.linear, layer.smoothed(), None, rounder))
        if self._held_out_error(block).is_less(found):
            self.nearest.append(block.index)
            return
        self.rounded.update(learned)
        for name, layer in layers.items():
            layer.replace_weight(weights[name])

    def _held_out_error(self, block: Block) -> BlockError:
        errors = [torch.zeros(0, device=self.runner.device)]
        for place in sorted(self._held_out):
            found = self.runner.layer(block, self.quantized.hidden[place])
            errors.append(sample_errors(found, self.reference.hidden[place].to(found.device)))
        return BlockError.of(torch.cat(errors), self.parallelism)

    def _keep_exact(self, block: Block, layers: Collection["_Layer"]) -> None:
        """Moves the reference through the block, and keeps what enters its layers."""
        for place in range(len(self.reference.hidden)):
            for layer in layers:
                layer.exact.append(None)
            self.runner.advance_batch(block, self.reference, place)
        for layer in layers:
            layer.mode = _IDLE

    def _gather(self, block: Block, stage: Mapping[str, "_Layer"]) -> dict[str, torch.Tensor]:
        """Runs the quantized batches through the block as far as the layers of a stage.

        Returns:
            What their inputs are scaled with: their entries of the calibration state.
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
            for place, states in enumerate(self.quantized.hidden):
                for layer in stage.values():
                    layer.place = place
                with suppress(_Reached):
                    self.runner.layer(block, states)
        for layer in stage.values():
            layer.forget()
            layer.moments.merge(self.parallelism.data)
        experts = [layer.moments for name, layer in stage.items() if _is_of_expert(name)]
        if experts:
            share_among_experts(experts, self.parallelism.expert_tensor)
        found.merge()
        state = found.cache_entries()
        for name, linear in observed.items():
            constrain = partial(self._constrained, name)
            entries = self.rounders[name].decide(linear, found.linears.pop(name), constrain)
            state |= {f"{name}.input_quantizer.{entry}": value.cpu() for entry, value in entries.items()}
        return state

    def _constrained(self, name: str, scale: torch.Tensor) -> torch.Tensor:
        return self.foldable(name, scale.cpu()).to(scale)

    def _round(self, layer: "_Layer") -> RoundedWeight:
        """Rounds a layer, and has it compute with what the weight was rounded to."""
        rounded = round_shard(layer.linear, layer.smoothed(), layer.moments, self.rounders[layer.linear.name])
        del layer.moments
        return self._serve(layer, rounded)

    @staticmethod
    def _serve(layer: "_Layer", rounded: Rounded) -> RoundedWeight:
        layer.replace_weight(rounded.weight)
        return RoundedWeight(rounded.codes, rounded.scale, rounded.scale_2)


class _Reached(Exception):
    """The batch has come to where it is looked at."""


# In the order in which a block computes them.
_KINDS = ("in_proj", "out_proj", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


def _stages(layers: Mapping[str, "_Layer"]) -> Iterator[dict[str, "_Layer"]]:
    """Yields layers that are rounded together, since none of them enters another: experts are many."""
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


# What a layer does with what enters it: keeps it as that of the unquantized model, nothing, compares that of the
# quantized model with what is kept, or computes with it as a server does.
_EXACT, _IDLE, _COMPARE, _SERVE = "exact", "idle", "compare", "serve"


class _Layer:
    """A linear layer while its block is learned: what enters it is looked at, and afterwards rounded.

    Args:
        module: The layer.
        linear: This rank's shard of it.
        runner: Knows where what is kept waits.
        residual: What its output is added to, where it makes up for what that lacks.

    Attributes:
        module: As given.
        linear: As given.
        exact: (tokens, local in-features) of each batch, what enters it in the unquantized model; None where that is
            not compared.
        place: Which batch enters it.
        moments: Of what entered it, from when it compares until it is rounded.
        mode: What it does.
    """

    def __init__(
        self, module: torch.nn.Module, linear: LinearShard, runner: BlockRunner, residual: Residual | None = None
    ) -> None:
        self.module, self.linear, self._runner, self._residual, self.mode = module, linear, runner, residual, _EXACT
        self._weight = module.get_parameter("weight")
        # The two models may send a token to different experts.
        self._compares = not _is_of_expert(linear.name)
        self.exact: list[torch.Tensor | None] = []
        self.place = 0
        self._held_out: Collection[int] = ()
        self._amax: torch.Tensor | None = None
        self._scale: torch.Tensor | None = None
        self._scheme: Scheme | None = None
        self._hook = module.register_forward_pre_hook(self._enter)

    def compare(self, held_out: Collection[int] = ()) -> None:
        """Compares from now on what enters with what is kept.

        Args:
            held_out: Batches of which only the tokens are counted.
        """
        self._held_out = held_out
        outputs, local = self.linear.weight.shape
        whole = local * self.linear.input_ranks.size
        self.mode = _COMPARE
        self.moments = PairedMoments(
            local, whole, self.linear.weight.device, self._compares, None if self._residual is None else outputs
        )

    def forget(self) -> None:
        """Forgets what is kept of the unquantized model."""
        self.exact.clear()
        if self._residual is not None:
            self._residual.restore()

    def serve(self, state: State, scheme: Scheme) -> None:
        """Scales and rounds from now on what enters, and the moments of what has entered likewise.

        Args:
            state: The block's calibration state.
            scheme: How the layer is stored.
        """
        amax, scale = (
            state.get(f"{self.linear.name}.input_quantizer.{entry}") for entry in ("amax", "pre_quant_scale")
        )
        self.mode, self._scheme = _SERVE, scheme
        self._amax = None if amax is None else amax.to(self.linear.weight.device)
        if scale is not None:
            scale = scale.to(self.linear.weight.device)
            local = self.linear.input_ranks.shard(scale)
            self._scale = local.to(self.linear.weight.dtype)
            self.moments.smooth(local, scale)

    def smoothed(self) -> torch.Tensor:
        """Returns the layer's own weight, divided by the pre-quantization scale: float32."""
        weight = self.linear.weight.float()
        return weight if self._scale is None else weight / self._scale.float()

    def replace_weight(self, weight: torch.Tensor) -> None:
        """Computes with another weight, which is multiplied with scaled inputs."""
        self._set_weight(torch.nn.Parameter(weight.to(self._weight.dtype), requires_grad=False))

    def restore(self) -> None:
        """Leaves the layer as it was."""
        self._hook.remove()
        self.forget()
        self._set_weight(self._weight)

    def _set_weight(self, weight: torch.nn.Parameter) -> None:
        self.module.register_parameter("weight", weight)

    def _enter(self, _: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.mode == _SERVE:
            scaled = args[0] if self._scale is None else args[0] * self._scale
            if self._amax is None:
                return scaled, *args[1:]
            assert self._scheme is not None
            return rounded_activation(scaled, self._amax, self._scheme), *args[1:]
        inputs = args[0].reshape(-1, args[0].shape[-1])
        if self.mode == _EXACT and self._compares:
            self.exact[-1] = self._runner.parked(inputs)
            if self._residual is not None:
                self._residual.keep()
        elif self.mode == _COMPARE and self.place in self._held_out:
            self.moments.tokens += inputs.shape[0]
        elif self.mode == _COMPARE:
            exact = self.exact[self.place]
            exact, residual = None if exact is None else exact.to(inputs.device), None
            if self._residual is not None and exact is not None:
                residual, counts = self._residual.compare(self.place)
                inputs, exact, residual = inputs * counts, exact * counts, residual * counts
            self.moments.observe(inputs, self.linear.input_ranks.gather(inputs), exact, residual)
        return None


def _is_of_expert(name: str) -> bool:
    return ".local_experts." in name


# An expert is rounded as if it had seen so many more tokens of the layer's ordinary kind, for each of its in-features.
_BORROWED = 0.1


def share_among_experts(moments: Sequence[PairedMoments | Moments], ranks: Ranks) -> None:
    """Adds to the Gram matrix of each expert the mean square of each channel over all experts of its layer.

    An expert that saw many more tokens than it has in-features hardly notices; one that saw few is kept from making up
    for errors by what these few tokens happened to have in common.

    Args:
        moments: Of the same linear layer of each expert, merged.
        ranks: The ranks that share its inputs, or any others where they do not.
    """
    tokens = torch.stack([each.count for each in moments]).sum()
    if not tokens:
        return
    diagonals = [_own_diagonal(each.gram, ranks) for each in moments]
    borrowed = torch.stack(diagonals).sum(0) * (_BORROWED * moments[0].gram.shape[1] / tokens)
    for diagonal in diagonals:
        diagonal += borrowed


def _own_diagonal(gram: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """The part of a Gram matrix's diagonal that is in this rank's rows of it, a view."""
    is_whole = len(gram) == gram.shape[1]
    return gram.diagonal(0 if is_whole else len(gram) * ranks.rank)


def round_shard(linear: LinearShard, weight: torch.Tensor, moments: PairedMoments | None, rounder: Rounder) -> Rounded:
    """Rounds this rank's shard of a layer; every rank that shares the layer calls it.

    Where the ranks share the inputs of a layer, each rounds some whole rows of it, and hands the others their columns.

    Args:
        linear: The layer.
        weight: float32 (local out-features, local in-features): what is rounded.
        moments: Of the layer's inputs, merged over the ranks that read other samples; None rounds to nearest.
        rounder: How it is rounded.
    """
    ranks = linear.input_ranks
    weight = ranks.shard(ranks.gather(weight), 0)
    with coarse_products(weight.device):
        if moments is None:
            factor = unit_factor(weight.shape[1], weight.device)
        else:
            gram = ranks.gather(moments.gram.T)  # symmetric
            factor = inverse_factor(gram, rounder.sorts)
            weight = _target(weight, moments, gram, factor, ranks)
        rounded = rounder.round(weight, factor, linear.ranks)
    return shard_of_rows(rounded, linear)


def shard_of_rows(rounded: Rounded, linear: LinearShard) -> Rounded:
    """Returns this rank's shard of a layer of which each rank has rounded some whole rows; every rank calls it.

    Args:
        rounded: Where the ranks share the inputs of the layer, this rank's rows of it; else its shard.
        linear: The layer.
    """
    ranks = linear.input_ranks
    if ranks.size == 1:
        return rounded
    scale = rounded.scale
    if scale.dim() == 2:
        scale = _own_columns(scale, linear)
    elif scale.numel() > 1:
        scale = ranks.gather(scale)
    return replace(
        rounded,
        codes=_own_columns(rounded.codes, linear),
        scale=scale,
        weight=_own_columns(rounded.weight, linear),
    )


def _target(
    weight: torch.Tensor, moments: PairedMoments, gram: torch.Tensor, factor: InverseFactor, ranks: Ranks
) -> torch.Tensor:
    """Moves some whole rows of a weight toward the unquantized model's output, as far as that can be predicted."""

    def share(cross: torch.Tensor, lack: torch.Tensor) -> torch.Tensor:
        return predictable_share(cross, factor, gram.diagonal().mean(), lack, moments.count)

    lacks = []
    if moments.cross is not None:
        cross = ranks.gather(moments.cross.T).T
        if (part := share(cross, ranks.sum(moments.lack.sum()))) > 0:
            lacks.append(weight @ (part * cross))
    if moments.residual is not None:
        residual = ranks.gather(moments.residual)
        if (part := share(residual, moments.residual_lack)) > 0:
            lacks.append(part * ranks.shard(residual, 0))
    return moved(weight, sum(lacks[1:], lacks[0]), factor) if lacks else weight


def _own_columns(rows: torch.Tensor, linear: LinearShard) -> torch.Tensor:
    """From some rows of a matrix on each rank, (rows, in), to some columns of it, (out, local in)."""
    # No process group knows FP8.
    as_bytes = rows.view(torch.uint8) if rows.dtype == torch.float8_e4m3fn else rows
    columns = linear.input_ranks.shard(linear.input_ranks.gather(as_bytes.T).T)
    return columns.contiguous().view(rows.dtype)
