# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""How much memory a rank holds at most in each step: counted, tensor by tensor, from what the engine keeps.

The counts follow the code that they describe, and are named after it: docs/plan.md has them in words. They leave out
what does not grow with the model: the libraries' own memory, and fragments that an allocator does not give back.
"""

from dataclasses import dataclass

from nemo_ptq.config import QuantizationConfig
from nemo_ptq.models.spec import ModelSpec
from nemo_ptq.plan.sharding import Linear, Parallelism, Stage, embedding_parameters, layer_linears
from nemo_ptq.quantization.algorithms import algorithm_of

_BF16, _FP32 = 2, 4
# Copies of the activated half that a gated MLP makes: both halves of fc1's output, the activation, the other half with
# Megatron's offset, their product.
_GATED_COPIES, _PLAIN_COPIES = 5, 2
# The embedding's output, the layer's input, the residual stream, and a normalised copy of it.
_STREAM_COPIES = 4
# Text that the models are compared on before and after: see report/measure.py.
_MOST_LOGITS, _COMPARED_BATCH, _COMPARED_SEQ_LEN = 1 << 28, 4, 256
# What torch needs to round a weight and keep it, in bytes for each of its elements: the result, and float32 on the way.
_ROUNDING_BYTES = 10
# Values that verify looks at together, and the wider types that it looks at them in: see verify/trtllm/values.py.
_VERIFY_CHUNK = (1 << 22) * 16


@dataclass(frozen=True)
class StepMemory:
    """What one rank holds in one step, in bytes, when it holds most.

    Attributes:
        step: "load", "baseline", "calibrate", "measure", "export" or "verify".
        weights: The rank's parameters.
        activations: What a batch needs on its way through a layer, and with AWQ the hidden states of all batches.
        statistics: AWQ's Gram matrices of one layer, and what the search over them needs.
        buffers: What is read, measured, packed or checked at the moment, where it is in the device's memory.
        host: What is in the host's memory beside the device's; 0 on a CPU, which has one memory.
    """

    step: str
    weights: int
    activations: int = 0
    statistics: int = 0
    buffers: int = 0
    host: int = 0

    @property
    def device(self) -> int:
        """All that is in the device's memory."""
        return self.weights + self.activations + self.statistics + self.buffers


@dataclass(frozen=True)
class Batches:
    """The calibration data of one rank.

    Attributes:
        size: Samples in a batch.
        seq_len: Tokens of each; the cut, since longer texts are the usual case.
        samples: All samples that the rank reads.
    """

    size: int
    seq_len: int
    samples: int

    @classmethod
    def of(cls, quantization: QuantizationConfig, parallelism: Parallelism) -> "Batches":
        """The share of a job's samples that one rank reads."""
        samples = max(1, -(-quantization.calibration_dataset_size // parallelism.readers))
        return cls(min(quantization.calibration_batch_size, samples), quantization.calibration_seq_len, samples)

    @property
    def tokens(self) -> int:
        """Tokens in a batch."""
        return self.size * self.seq_len


def activation_bytes(model: ModelSpec, parallelism: Parallelism, tokens: int) -> int:
    """What one batch needs at once, at the widest place of a transformer layer.

    Args:
        model: The model.
        parallelism: How it is spread.
        tokens: Tokens in the batch.
    """
    hidden = model.hidden_size
    qkv, proj, _, fc2 = layer_linears(model, parallelism.tp, parallelism.ep)
    stream = _STREAM_COPIES * hidden * _BF16
    norm = hidden * (3 * _BF16 + 3 * _FP32)
    # Queries, keys and values, contiguous copies of them, their rotated halves, and the output.
    attention = stream + (2 * qkv.rows + 3 * proj.columns) * _BF16
    copies = _GATED_COPIES if model.gated_mlp else _PLAIN_COPIES
    mlp = stream + copies * fc2.columns * _BF16
    if model.num_experts:
        # Every token is copied for each of its experts, which run one after the other; routing is seldom even.
        routed = model.experts_per_token or 1
        busiest = min(1.0, 2 * routed / model.num_experts)
        mlp = int(parallelism.ep * (stream + 3 * routed * hidden * _BF16) + busiest * copies * fc2.columns * _BF16)
    return tokens * max(norm, attention, mlp)


def _gram(linear: Linear) -> int:
    return linear.columns * linear.whole_columns * _FP32 * linear.count


def _search_bytes(linear: Linear, on_gpu: bool) -> int:
    """What AWQ's search over one layer needs beside its Gram matrix: see calibration/awq.py."""
    gram = linear.columns * linear.whole_columns * _FP32
    whole = linear.rows * linear.whole_columns
    # The scaled weight, its rounding, the error, and the error of all ranks.
    weight = linear.weights * 3 * _BF16 + whole * _BF16
    if on_gpu:
        # Two bfloat16 terms of the matrix: while the second is made, the first and a float32 difference are there.
        return max(gram * 5 // 2, gram + weight + 2 * whole // 8 * _FP32)
    return weight + linear.weights * _FP32 + 2 * whole // 8 * _FP32


def _observing_bytes(linear: Linear, tokens: int, on_gpu: bool) -> int:
    """What adding a batch to a Gram matrix needs: the input, its magnitudes, that of all ranks, and the product."""
    local, whole = tokens * linear.columns, tokens * linear.whole_columns
    gathered = whole * _BF16 if linear.columns < linear.whole_columns else 0
    float32 = 0 if on_gpu else (local + whole) * _FP32
    return 2 * local * _BF16 + gathered + float32 + linear.columns * linear.whole_columns * _FP32


def _awq_bytes(
    model: ModelSpec, linears: tuple[Linear, ...], activations: int, tokens: int, on_gpu: bool
) -> tuple[int, int]:
    """Activations and statistics of one layer's AWQ calibration, when they are largest together.

    All Gram matrices are there while the batches run; then each layer's goes when its search is done.
    """
    grams = sum(_gram(linear) for linear in linears)
    stream = tokens * _STREAM_COPIES * model.hidden_size * _BF16
    phases = [(activations, grams)]
    for index, linear in enumerate(linears):
        # Experts see their share of the tokens, one after the other.
        seen = tokens // linear.count
        phases.append((stream, grams + _observing_bytes(linear, seen, on_gpu)))
        phases.append((0, sum(_gram(left) for left in linears[index:]) + _search_bytes(linear, on_gpu)))
    return max(phases, key=sum)


def compared_documents(model: ModelSpec, quantization: QuantizationConfig) -> int:
    """How many samples the quantized model is compared with the unquantized one on."""
    most = max(1, _MOST_LOGITS // (min(_COMPARED_SEQ_LEN, model.seq_length) * model.vocab_size))
    return min(quantization.evaluation_dataset_size, most)


def step_memory(
    model: ModelSpec,
    quantization: QuantizationConfig,
    parallelism: Parallelism,
    stage: Stage,
    *,
    inference_tp: int,
    is_cpu: bool,
) -> tuple[StepMemory, ...]:
    """Counts the memory of a rank of one pipeline stage, step by step.

    Args:
        model: The model.
        quantization: How it is quantized, and on how much data.
        parallelism: How it is spread.
        stage: The rank's stage.
        inference_tp: Tensor parallelism of the files.
        is_cpu: Whether the device's memory is the host's.
    """
    algorithm = algorithm_of(quantization)
    weights = stage.parameters * _BF16
    linears = layer_linears(model, parallelism.tp, parallelism.ep)
    batches = Batches.of(quantization, parallelism)
    layer = sum(linear.weights * linear.count for linear in linears)
    # The halves of a gated layer are packed one after the other.
    widest = max(linear.weights // (2 if linear.name == "fc1" and model.gated_mlp else 1) for linear in linears)

    def step(name: str, activations: int = 0, statistics: int = 0, device: int = 0, host: int = 0) -> StepMemory:
        buffers = device + (host if is_cpu else 0)
        return StepMemory(name, weights, activations, statistics, buffers, 0 if is_cpu else host)

    # A stored tensor is read whole, whatever part of it this rank wants. Megatron stores a layer's as one.
    stored = max(embedding_parameters(model), *(linear.weights for linear in layer_linears(model)))
    steps = [step("load", host=stored * _BF16)]

    kept = 0
    if algorithm.quantizes:
        compared = compared_documents(model, quantization)
        seq_len = min(_COMPARED_SEQ_LEN, model.seq_length)
        tokens = min(compared, _COMPARED_BATCH) * seq_len
        row = embedding_parameters(model, parallelism.tp) // model.hidden_size if stage.is_last else 0
        if compared:
            # The unquantized model's logits stay in main memory until the end.
            kept = compared * seq_len * row * _BF16
            passing = activation_bytes(model, parallelism, tokens)
            logits = tokens * row * _BF16
            steps.append(step("baseline", max(passing, logits), host=kept))

        activations, statistics = activation_bytes(model, parallelism, batches.tokens), 0
        if algorithm.gram_candidates:
            activations, statistics = _awq_bytes(model, linears, activations, batches.tokens, not is_cpu)
            activations += batches.samples * batches.seq_len * model.hidden_size * _BF16
        # SmoothQuant looks at the magnitude of one weight at a time, when the activations are gone.
        steps.append(step("calibrate", activations, statistics, host=kept))

        rounding = max(linear.weights for linear in linears) * _ROUNDING_BYTES
        if compared:
            # A document's logits of both models are compared in float32, over the whole vocabulary.
            scoring = logits + 2 * seq_len * model.vocab_size * _FP32 if stage.is_last else 0
            steps.append(step("measure", max(passing, scoring - rounding), device=rounding, host=kept))
        else:
            steps.append(step("measure", device=rounding))

    # Blocks, the embedding, a layer or the head, are packed one by one; the one before is still being let go.
    packed = int(layer * algorithm.packed_bytes)
    table = stage.largest_table * _BF16
    steps.append(step("export", device=widest * algorithm.packing_bytes, host=kept + packed + max(packed, table)))

    # Tensors are looked at whole: those that the files cut are joined first.
    joined = embedding_parameters(model) * _BF16 if inference_tp > 1 else 0
    steps.append(step("verify", host=kept + joined + _VERIFY_CHUNK))
    return tuple(steps)
