# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What quantization changes in a model, measured while it walks by block by block.

Two streams of hidden states go through the blocks: one through the weights of the checkpoint, the other through what a
server computes with the calibrated layers. Hooks compare what enters and leaves each linear layer with what it would be
unquantized, and keep sums only; the head gives both models' logits.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist

from nemo_ptq.calibration.chats import Sample
from nemo_ptq.calibration.forward import whole_logits
from nemo_ptq.calibration.observing import State, has_cache, round_cache
from nemo_ptq.calibration.streams import BlockRunner, Stream
from nemo_ptq.calibration.tokens import make_batches, tokenize
from nemo_ptq.checkpoint.blocks import Block
from nemo_ptq.checkpoint.loading import LoadedModel
from nemo_ptq.checkpoint.parts import is_linear
from nemo_ptq.config import FP8_CACHE
from nemo_ptq.export.calibrated import CalibratedLayers
from nemo_ptq.export.module_tensors import Linear
from nemo_ptq.export.shard_map import ShardMap
from nemo_ptq.export.simulation import rounded_input, rounded_weight, scaled_input
from nemo_ptq.report.metrics import LinearSums, Sums, layer_records
from nemo_ptq.report.records import Layer
from nemo_ptq.report.sums import sums_of
from nemo_ptq.report.weight_errors import weight_sums
from nemo_ptq.verify.evaluate import DocumentScore, score_document

# Logits of a batch over the whole vocabulary, in numbers.
_MOST_LOGITS = 1 << 28
_BATCH_SIZE = 4
_SEQ_LEN = 256


@dataclass(frozen=True)
class Measured:
    """Measurements of a job, on rank 0.

    Attributes:
        layers: Each linear layer.
        scores: Each document; empty where nothing was compared.
    """

    layers: tuple[Layer, ...] = ()
    scores: tuple[DocumentScore, ...] = ()


def evaluation_batches(model: LoadedModel, samples: Iterable[Sample]) -> list[torch.Tensor]:
    """Tokenizes the samples that both models are compared on, the fewer the larger the vocabulary.

    Returns:
        int64 (batch, sequence) each, of two tokens or more in a row. The logits for all of them are at most 2^28
        numbers.
    """
    seq_len = min(_SEQ_LEN, model.config.seq_length)
    sequences = [tokenize(model.tokenizer, sample, seq_len) for sample in samples]
    most = max(_MOST_LOGITS // (seq_len * model.vocab_size), 1)
    return make_batches([sequence for sequence in sequences if len(sequence) > 1][:most], _BATCH_SIZE)


class SimulatedLinear:
    """A Megatron linear layer that computes as a server does with its calibrated self, and sums up what that changes.

    Args:
        module: The layer; its weight is replaced.
        linear: The calibrated layer.
        rounded: float32 (out, in): the weight that the server multiplies with.
    """

    def __init__(self, module: Any, linear: Linear, rounded: torch.Tensor) -> None:
        self._module = module
        self._original = module.get_parameter("weight")
        weight = torch.nn.Parameter(rounded.to(self._original.dtype), requires_grad=False)
        self._set_weight(weight)
        # Without the weight that was smoothed for rounding, a copy of the original's size.
        self._linear = replace(linear, weight=weight)
        self.inputs, self.outputs = Sums(), Sums()
        self._entered: torch.Tensor | None = None
        self._rounding = module.register_forward_pre_hook(self._round)
        self._comparing = module.register_forward_hook(self._compare)

    def stop_comparing(self) -> None:
        """Leaves the layer as a server has it, and frees its original weight."""
        self._comparing.remove()
        del self._original

    def remove(self) -> None:
        """Gives the layer its original weight back."""
        self._set_weight(self._original)
        self._rounding.remove()
        self._comparing.remove()

    def _set_weight(self, weight: torch.nn.Parameter) -> None:
        self._module.register_parameter("weight", weight)

    def _round(self, _: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        self._entered = args[0]
        return (rounded_input(scaled_input(args[0], self._linear), self._linear), *args[1:])

    def _compare(self, module: Any, args: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, Any]) -> None:
        entered, self._entered = self._entered, None
        if entered is None or not entered.numel():  # an idle expert
            return
        plain = scaled_input(entered, self._linear)
        self.inputs += sums_of(plain, args[0] if self._linear.rounds_inputs else None)
        simulated = module.get_parameter("weight")
        self._set_weight(self._original)
        # The method, not the module: hooks would be called again.
        expected = module.forward(entered)[0]
        self._set_weight(simulated)
        self.outputs += sums_of(expected, output[0])


class _Watched:
    """A linear layer that is not quantized: what enters and leaves it."""

    def __init__(self, module: Any) -> None:
        self.inputs, self.outputs = Sums(), Sums()
        self._hook = module.register_forward_hook(self._compare)

    def _compare(self, _: Any, args: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, Any]) -> None:
        if args[0].numel():
            self.inputs += sums_of(args[0])
            self.outputs += sums_of(output[0])

    def stop_comparing(self) -> None:
        """Stops watching."""
        self._hook.remove()

    remove = stop_comparing


@dataclass
class Measurement:
    """Measures each block as the walk comes by: see :class:`~nemo_ptq.calibration.pipeline.BlockVisitor`.

    Attributes:
        model: This rank's part of the model.
        runner: Computes blocks.
        layers: The calibrated layers.
        reference: Evaluation batches on their way through the checkpoint's weights; None measures weights alone.
        quantized: The same batches on their way through the calibrated layers.
        keep: Leave the blocks simulated, for a sample of text.
        cache_format: Format that keys and values of a quantized KV cache are rounded to.
        sums: Sums of each linear layer of this rank.
        scores: Score of each document, on the last stage.
    """

    model: LoadedModel
    runner: BlockRunner
    layers: CalibratedLayers
    reference: Stream | None
    quantized: Stream | None
    keep: bool = False
    cache_format: str = FP8_CACHE
    sums: dict[str, LinearSums] = field(default_factory=dict)
    scores: list[DocumentScore] = field(default_factory=list)

    @torch.no_grad()
    def visit(self, index: int, block: Block | None, state: State) -> None:
        """See :meth:`BlockVisitor.visit`."""
        if block is None:
            return
        if index == self.model.num_blocks - 1:
            self._score()
            return
        if self.reference is not None:
            self.runner.advance(block, self.reference)
        if index == 0:
            if self.quantized is not None and self.reference is not None:
                self.quantized.hidden = list(self.reference.hidden)
            return
        self._measure_layer(block, state)

    def _measure_layer(self, block: Block, state: State) -> None:
        simulate = self.quantized is not None or self.keep
        probes: dict[str, SimulatedLinear | _Watched] = {}
        for name, module in block.modules.items():
            if is_linear(name) and (probe := self._measure_weight(name, module, simulate)) is not None:
                probes[name] = probe
        if not simulate:
            return
        device = self.runner.device
        attentions = {name: module for name, module in block.modules.items() if has_cache(name, state)}
        caches = [round_cache(module, name, state, self.cache_format, device) for name, module in attentions.items()]
        if self.quantized is not None:
            self.runner.advance(block, self.quantized)
        for name, probe in probes.items():
            self.sums[name] = replace(self.sums[name], inputs=probe.inputs, outputs=probe.outputs)
            probe.stop_comparing() if self.keep else probe.remove()
        if not self.keep:
            for cache in caches:
                cache.remove()

    def _measure_weight(self, name: str, module: Any, simulate: bool) -> SimulatedLinear | _Watched | None:
        linear = self.layers.linear(name)
        rounded = rounded_weight(linear) if linear.is_quantized else None
        self.sums[name] = weight_sums(name, linear, rounded)
        if not simulate:
            return None
        return _Watched(module) if rounded is None else SimulatedLinear(module, linear, rounded)

    def _score(self) -> None:
        if self.reference is None or self.quantized is None:
            return
        for tokens, before, after in zip(
            self.reference.tokens, self.reference.hidden, self.quantized.hidden, strict=True
        ):
            pairs = zip(
                self.runner.logits(before).split(1), self.runner.logits(after).split(1), tokens.split(1), strict=True
            )
            self.scores += [
                score_document(whole_logits(self.model, theirs), whole_logits(self.model, ours), document)
                for theirs, ours, document in pairs
            ]

    def gather(self, shard_map: ShardMap) -> Measured:
        """Puts together what all ranks have measured; every rank calls it, and rank 0 gets it."""
        mine = (self.sums, self.scores)
        everyones = [mine] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(mine, everyones)
        if everyones is None:
            return Measured()
        # All ranks of the last stage have the same scores.
        return Measured(
            layer_records([theirs for theirs, _ in everyones], shard_map.owners),
            tuple(next((theirs for _, theirs in everyones if theirs), [])),
        )
