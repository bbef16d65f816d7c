# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What quantization has changed in a Megatron model: measured on this rank, put together for all.

Weights are measured as they are. Activations are measured while a little text runs through the calibrated model: hooks
compare what enters and leaves each linear layer with what it would be unquantized, and keep sums only.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from modelopt.torch.export.quant_utils import get_weight_scaling_factor_2
from modelopt.torch.quantization.nn import TensorQuantizer

from nemo_ptq.calibration.awq import unquantized
from nemo_ptq.calibration.datasets import make_batches, tokenize
from nemo_ptq.calibration.forward import forward_batches
from nemo_ptq.calibration.text_files import Sample
from nemo_ptq.checkpoint.loading import LoadedModel
from nemo_ptq.engine.evaluation import whole_logits
from nemo_ptq.export.megatron import gather_shard_map, global_modules, scheme_of
from nemo_ptq.report.metrics import LinearSums, Sums, layer_records
from nemo_ptq.report.records import Layer
from nemo_ptq.report.sums import sums_of
from nemo_ptq.verify.dequantize import fake_quantize_nvfp4
from nemo_ptq.verify.evaluate import DocumentScore, score_document

# Logits of the unquantized model that are kept, over the whole vocabulary: 512 MiB in bfloat16.
_MOST_LOGITS = 1 << 28
_BATCH_SIZE = 4
_SEQ_LEN = 256


@dataclass(frozen=True)
class Measured:
    """What the job has measured; the same on every rank.

    Attributes:
        layers: Each linear layer.
        scores: Each document; empty where nothing was compared.
    """

    layers: tuple[Layer, ...] = ()
    scores: tuple[DocumentScore, ...] = ()


# --- sums -------------------------------------------------------------------------------------------------------------


def is_simulated(linear: Any) -> bool:
    """Whether ModelOpt can compute with this layer quantized: it has NVFP4 on GPUs only."""
    return scheme_of(linear).quant_algo != "NVFP4" or linear.weight.is_cuda


def _rounded_weight(linear: Any) -> torch.Tensor:
    if is_simulated(linear):
        return linear.weight_quantizer(linear.weight)
    return fake_quantize_nvfp4(linear.weight.float(), get_weight_scaling_factor_2(linear))


def _weight_sums(linear: Any) -> LinearSums:
    """What the weight alone says of a layer."""
    scheme = scheme_of(linear).quant_algo
    # Megatron's row-parallel layers know how their inputs come.
    row_parallel = hasattr(linear, "input_is_parallel")
    if scheme is None:
        return LinearSums(None, row_parallel, sums_of(linear.weight))
    quantizer = linear.input_quantizer
    scale = getattr(quantizer, "_pre_quant_scale", None)
    amax = getattr(quantizer, "_amax", None) if quantizer.is_enabled else None
    return LinearSums(
        scheme,
        row_parallel,
        sums_of(linear.weight, _rounded_weight(linear)),
        input_amax=None if amax is None else float(amax.amax()),
        pre_quant_scale=None if scale is None else scale.detach().float().cpu().numpy().reshape(-1),
    )


class _Probe:
    """Watches one linear layer while text runs through it."""

    def __init__(self) -> None:
        self.inputs, self.outputs = Sums(), Sums()

    def __call__(self, linear: Any, args: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, Any]) -> None:
        """Forward hook."""
        (inputs,) = args
        if not inputs.numel():  # an idle expert
            return
        rounds_inputs, rounds = linear.input_quantizer.is_enabled, _quantizes(linear)
        with unquantized(linear):
            plain = linear.input_quantizer(inputs)
            # The method, not the module: a hook would be called again.
            expected = linear.forward(inputs)[0] if rounds else output[0]
        self.inputs += sums_of(plain, linear.input_quantizer(inputs) if rounds_inputs else None)
        self.outputs += sums_of(expected, output[0] if rounds else None)


def _quantizes(module: torch.nn.Module) -> bool:
    return any(isinstance(child, TensorQuantizer) and child.is_enabled for child in module.modules())


@contextmanager
def _probing(linears: Mapping[str, torch.nn.Module]) -> Iterator[dict[str, _Probe]]:
    """Watches linear layers, given by name, within a ``with`` block."""
    probes = {name: _Probe() for name in linears}
    with ExitStack() as stack:
        for name, linear in linears.items():
            stack.callback(linear.register_forward_hook(probes[name]).remove)
        yield probes


# --- text -------------------------------------------------------------------------------------------------------------


def evaluation_batches(model: LoadedModel, samples: Iterable[Sample]) -> list[torch.Tensor]:
    """Tokenizes the samples that both models are compared on, the fewer the larger the vocabulary.

    Returns:
        int64 (batch, sequence) each, of two tokens or more in a row. The unquantized model's logits for all of them
        are at most 2^28 numbers.
    """
    seq_len = min(_SEQ_LEN, model.config.seq_length)
    sequences = [tokenize(model.tokenizer, sample, seq_len) for sample in samples]
    most = max(_MOST_LOGITS // (seq_len * model.vocab_size), 1)
    return make_batches([sequence for sequence in sequences if len(sequence) > 1][:most], _BATCH_SIZE)


def baseline_logits(model: LoadedModel, batches: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """Runs the model before it is calibrated; every rank calls it.

    Returns:
        For each batch, on the last stage this tensor-parallel rank's logits (batch, sequence, padded vocabulary / TP)
        in the model's dtype, kept in main memory; None on other stages.
    """
    return [None if logits is None else logits.cpu() for logits in forward_batches(model.module, batches)]


def _scores(
    model: LoadedModel, baseline: torch.Tensor, logits: torch.Tensor, tokens: torch.Tensor
) -> list[DocumentScore]:
    """Compares two models' tensor-parallel logits of one batch, document by document."""
    pairs = zip(baseline.split(1), logits.split(1), tokens.split(1), strict=True)
    return [
        score_document(whole_logits(model, before.to(logits.device)), whole_logits(model, after), document)
        for before, after, document in pairs
    ]


# --- all of it --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(model: LoadedModel, batches: Sequence[torch.Tensor], baseline: Sequence[torch.Tensor | None]) -> Measured:
    """Measures a calibrated model; every rank calls it.

    Args:
        model: This rank's part of the model.
        batches: int64 (batch, sequence) text to run through it; none leaves out what needs text.
        baseline: What :func:`baseline_logits` has returned for these batches.

    Returns:
        On rank 0 everything, on the others nothing.
    """
    modules = global_modules(model.module)
    shard_map = gather_shard_map(modules)
    linears = {name: module for name, module in modules.items() if ".linear_" in name}
    sums = {name: _weight_sums(linear) for name, linear in linears.items()}
    scores: list[DocumentScore] = []
    if batches:
        simulated = all(map(is_simulated, linears.values()))
        with nullcontext() if simulated else unquantized(model.module), _probing(linears) as probes:
            for tokens, before, after in zip(batches, baseline, forward_batches(model.module, batches), strict=True):
                if simulated and before is not None and after is not None:
                    scores += _scores(model, before, after, tokens)
        for name, probe in probes.items():
            sums[name] = replace(sums[name], inputs=probe.inputs, outputs=probe.outputs)
    mine = (sums, scores)
    everyones = [mine] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, everyones)
    if everyones is None:
        return Measured()
    # All ranks of the last stage have the same scores.
    return Measured(
        layer_records([theirs for theirs, _ in everyones], shard_map.owners),
        tuple(next((theirs for _, theirs in everyones if theirs), [])),
    )
