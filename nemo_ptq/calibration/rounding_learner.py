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
from nemo_ptq.calibration.held_out import HeldOutError, held_out_places, sample_errors
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
from nemo_ptq.quantization.activations import activation_scale, rounded_activation, rounded_by_scale
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
        moved: Layers whose weight is moved toward the unquantized model's output before.
        schemes: How it is stored.
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
                name: _Layer(
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

    def _keep_better(self, block: Block, layers: Mapping[str, "_Layer"]) -> None:
        """Rounds a block to nearest where that comes nearer to the unquantized one on batches that are held out."""
        found, learned = self._held_out_error(block, layers.values()), dict(self.rounded)
        weights = {name: layer.module.get_parameter("weight") for name, layer in layers.items()}
        for name, layer in layers.items():
            rounder = self.rounders[layer.linear.name]
            self.rounded[name] = self._serve(layer, round_shard(layer.linear, layer.smoothed(), None, rounder))
            layer.forget(self._held_out)
            layer.place = _ELSEWHERE
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

    def _held_out_error(self, block: Block, layers: Collection["_Layer"]) -> HeldOutError:
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

    def _keep_exact(self, block: Block, layers: Collection["_Layer"], reference: Stream) -> None:
        """Moves the reference through the block, and keeps the inputs of its layers."""
        for layer in layers:
            layer.mode = _EXACT
        for place in _placing(range(len(reference.hidden)), layers):
            self.runner.advance_batch(block, reference, place)
        for layer in layers:
            layer.mode = _IDLE

    def _gather(
        self, block: Block, stage: Mapping[str, "_Layer"], layers: Collection["_Layer"]
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
        experts = [layer.moments for name, layer in stage.items() if _is_of_expert(name)]
        if experts:
            share_among_experts(experts, self.parallelism.expert_tensor)
        found.merge()
        state = found.cache_entries()
        for name, linear in observed.items():
            entries = self.rounders[name].decide(linear, found.linears.pop(name), partial(self.foldable, name))
            state |= {f"{name}.input_quantizer.{entry}": value.cpu() for entry, value in entries.items()}
        return state

    def _round(self, layer: "_Layer") -> RoundedWeight:
        """Rounds a layer, and has it compute with the rounded weight."""
        rounded = round_shard(layer.linear, layer.smoothed(), layer.moments, self.rounders[layer.linear.name])
        del layer.moments
        return self._serve(layer, rounded)

    @staticmethod
    def _serve(layer: "_Layer", rounded: Rounded) -> RoundedWeight:
        layer.replace_weight(rounded.weight)
        return RoundedWeight(rounded.codes, rounded.scale, rounded.scale_2)


# Layers whose output is that of the module they are in: an attention, an MLP or a state space.
_LAST = ("self_attention.linear_proj", "mlp.linear_fc2", "mixer.out_proj")


def _ended_by(name: str, modules: Mapping[str, torch.nn.Module]) -> torch.nn.Module | None:
    """Returns the module of a block whose last layer has this name; None where no module has such a layer."""
    return modules.get(name.rpartition(".")[0]) if name.endswith(_LAST) else None


# The place of a batch from outside the calibration streams: its layers' inputs are not kept.
_ELSEWHERE = -1


def _placing(places: Iterable[int], layers: Collection["_Layer"]) -> Iterator[int]:
    """Yields the places of batches, and tells layers which one is running."""
    for place in places:
        for layer in layers:
            layer.place = place
        yield place


class _Reached(Exception):
    """The batch has come to where it is looked at."""


# In the order in which a block computes them.
_KINDS = ("in_proj", "out_proj", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


def _stages(layers: Mapping[str, "_Layer"]) -> Iterator[dict[str, "_Layer"]]:
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


# What a layer does with its input: keep it as the unquantized model's, nothing, compare it as the quantized model's
# with the one kept, or compute with it as a server does.
_EXACT, _IDLE, _COMPARE, _SERVE = "exact", "idle", "compare", "serve"


class _Layer:
    """A linear layer while its block is learned: its inputs are observed, and rounded afterwards.

    Args:
        module: The layer.
        linear: This rank's shard of it.
        runner: Knows where kept states wait.
        is_moved: Whether its weight is moved toward the unquantized model's output.
        residual: The residual stream that its output is added to, where it makes up for the stream's errors.
        ended: The module whose last layer it is, if any. For a batch whose input to the layer in the quantized model is
            known, that module computes nothing else.

    Attributes:
        module: As given.
        linear: As given.
        place: Which batch runs through the block.
        moments: Sums over its inputs, from when it compares until it is rounded.
        mode: What it does.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        linear: LinearShard,
        runner: BlockRunner,
        is_moved: bool,
        residual: Residual | None = None,
        ended: torch.nn.Module | None = None,
    ) -> None:
        self.module, self.linear, self._runner, self._residual, self.mode = module, linear, runner, residual, _IDLE
        self._weight = module.get_parameter("weight")
        # The two models may send a token to different experts.
        self._compares = is_moved and not _is_of_expert(linear.name)
        # (..., local in-features) by a batch's place: its input in the unquantized model until that is compared, then
        # in the quantized one, where that is kept.
        self._entered: dict[int, torch.Tensor] = {}
        self.place = 0
        self._held_out: Collection[int] = ()
        self._scale: torch.Tensor | None = None
        self._input_scale: torch.Tensor | None = None
        self._scheme: Scheme | None = None
        self._hook = module.register_forward_pre_hook(self._enter)
        self._ended = ended
        if ended is not None:
            self._compute_all = ended.forward
            ended.forward = self._compute

    def compare(self, held_out: Collection[int] = ()) -> None:
        """Compares inputs with those that are kept, from now on.

        Args:
            held_out: Batches whose tokens are only counted.
        """
        self._held_out = held_out
        outputs, local = self.linear.weight.shape
        whole = local * self.linear.input_ranks.size
        self.mode = _COMPARE
        self.moments = PairedMoments(
            local, whole, self.linear.weight.device, self._compares, None if self._residual is None else outputs
        )

    def serve(self, state: State, scheme: Scheme) -> None:
        """Scales and rounds inputs from now on, and the moments of earlier inputs likewise.

        Args:
            state: The block's calibration state.
            scheme: How the layer is stored.
        """
        amax, scale = (
            state.get(f"{self.linear.name}.input_quantizer.{entry}") for entry in ("amax", "pre_quant_scale")
        )
        self.mode, self._scheme = _SERVE, scheme
        if amax is not None:
            self._input_scale = activation_scale(amax, scheme).to(self.linear.weight.device)
        if scale is not None:
            scale = scale.to(self.linear.weight.device)
            local = self.linear.input_ranks.shard(scale)
            self._scale = local.to(self.linear.weight.dtype)
            self.moments.smooth(local, scale)
        if self._residual is not None:
            self._residual.restore()

    def smoothed(self) -> torch.Tensor:
        """Returns the layer's own weight, divided by the pre-quantization scale: float32."""
        weight = self.linear.weight.float()
        return weight if self._scale is None else weight / self._scale.float()

    def replace_weight(self, weight: torch.Tensor) -> None:
        """Computes with another weight, which is multiplied with scaled inputs."""
        self._set_weight(torch.nn.Parameter(weight.to(self._weight.dtype), requires_grad=False))

    def forget(self, places: Iterable[int]) -> None:
        """Drops the kept inputs of some batches: the layers before it have changed since."""
        for place in places:
            self._entered.pop(place, None)

    def restore(self) -> None:
        """Leaves the layer as it was."""
        self._hook.remove()
        self._entered.clear()
        if self._ended is not None:
            del self._ended.forward
        if self._residual is not None:
            self._residual.restore()
        self._set_weight(self._weight)

    def _set_weight(self, weight: torch.nn.Parameter) -> None:
        self.module.register_parameter("weight", weight)

    def _compute(self, *args: Any, **kwargs: Any) -> Any:
        """Replaces the forward pass of the module whose last layer it is."""
        if self.mode != _SERVE or self.place not in self._entered:
            return self._compute_all(*args, **kwargs)
        return self.module(self._entered[self.place].to(self._runner.device))

    def _enter(self, _: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        inputs = args[0]
        if self.mode == _EXACT and self._compares:
            self._keep(inputs)
            if self._residual is not None:
                self._residual.keep()
        elif self.mode == _COMPARE:
            exact = self._entered.pop(self.place, None)
            self._observe(inputs.reshape(-1, inputs.shape[-1]), exact)
            if self._ended is not None:
                self._keep(inputs)
        elif self.mode == _SERVE:
            if self._ended is not None and self.place != _ELSEWHERE and self.place not in self._entered:
                self._keep(inputs)
            return self._served(inputs), *args[1:]
        return None

    def _keep(self, inputs: torch.Tensor) -> None:
        self._entered[self.place] = self._runner.parked(inputs)

    def _observe(self, inputs: torch.Tensor, exact: torch.Tensor | None) -> None:
        if self.place in self._held_out:
            self.moments.tokens += inputs.shape[0]
            return
        residual = None
        if exact is not None:
            exact = exact.to(inputs.device).reshape(inputs.shape)
            if self._residual is not None:
                residual, counts = self._residual.compare(self.place)
                inputs, exact, residual = inputs * counts, exact * counts, residual * counts
        self.moments.observe(inputs, self.linear.input_ranks.gather(inputs), exact, residual)

    def _served(self, inputs: torch.Tensor) -> torch.Tensor:
        """The input as a server multiplies it with the weight."""
        scaled = inputs if self._scale is None else inputs * self._scale
        assert self._scheme is not None
        if self._input_scale is None:
            return rounded_activation(scaled, None, self._scheme) if self._scheme.dynamic_inputs else scaled
        return rounded_by_scale(scaled, self._input_scale, self._scheme)


def _is_of_expert(name: str) -> bool:
    return ".local_experts." in name


# An expert is rounded as if it had seen this many more of its layer's average tokens for each of its in-features.
_BORROWED = 0.1


def share_among_experts(moments: Sequence[PairedMoments | Moments], ranks: Ranks) -> None:
    """Adds to the Gram matrix of each expert the mean square of each channel over all experts of its layer.

    An expert that saw many more tokens than it has in-features hardly notices; one that saw few is kept from making up
    for errors through what these few tokens happened to have in common.

    Args:
        moments: Those of the same linear layer in each expert, merged.
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
        weight: float32 (local out-features, local in-features): the weight to round.
        moments: Sums over the layer's inputs, merged over the ranks that read other samples; None rounds to nearest.
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
    """Returns this rank's shard of a layer after each rank has rounded some whole rows of it; every rank calls it.

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
    """Turns each rank's rows of a matrix, (rows, in), into its columns, (out, local in)."""
    # Process groups do not support FP8.
    as_bytes = rows.view(torch.uint8) if rows.dtype == torch.float8_e4m3fn else rows
    columns = linear.input_ranks.shard(linear.input_ranks.gather(as_bytes.T).T)
    return columns.contiguous().view(rows.dtype)
