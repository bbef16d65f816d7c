# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""How much a job computes and moves, and how long that takes, within a factor of about two.

Operations are counted; rates are those of data sheets times their measured share (docs/benchmarks.md).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from nemo_ptq.config import QuantizationConfig
from nemo_ptq.models.spec import ModelSpec
from nemo_ptq.plan.devices import Device
from nemo_ptq.plan.memory import (
    COMPARED_SEQ_LEN,
    Batches,
    compared_documents,
    corrects_residual,
    waiting_states,
)
from nemo_ptq.plan.sharding import Linear, Parallelism, layer_linears
from nemo_ptq.quantization.algorithms import algorithm_of, moves_weights

# Measured share of an H100's data-sheet rate in a forward pass, and in Gram matrices with AWQ's search.
_FORWARD_SHARE, _GRAM_SHARE = 0.5, 0.25
# A CPU multiplies Gram matrices in float32.
_CPU_FLOAT32_SHARE = 0.35
# Share of D G D^T that is computed: the upper triangle of G is folded into the lower, in eight stripes.
_SEARCH_SHARE = 0.5 + 0.5 / 8
# Operations of GPTQ: inverting a Gram matrix and a product with it, per cube of its size; moving and rounding a weight,
# per element and input.
_INVERSE, _ROUNDING = 4, 7
# One core of a host, in 10^9 bytes a second: packing and writing, SHA-256, the reader's checks.
_PACK_RATE, _HASH_RATE, _VERIFY_RATE = 2.0, 1.0, 0.4
# Between a GPU and memory that is not page-locked, in 10^9 bytes a second: hidden states that wait on the host.
_COPY_RATE = 5.0
# Passes of the compared text: the checkpoint's weights, the rounded ones, and each original layer on its quantized
# inputs.
_MEASURE_PASSES = 3


@dataclass(frozen=True)
class Work:
    """The operations of a calibration, over all ranks.

    Attributes:
        forward_flops: Operations of the forward passes.
        gram_flops: Operations of Gram matrices and of AWQ's search or GPTQ's rounding with them, in float32 or better.
    """

    forward_flops: int
    gram_flops: int

    @property
    def flops(self) -> int:
        """All operations."""
        return self.forward_flops + self.gram_flops


def calibration_work(model: ModelSpec, quantization: QuantizationConfig) -> Work:
    """Counts the operations of a calibration: two for each weight and token, attention, and Gram matrices."""
    algorithm = algorithm_of(quantization)
    if not algorithm.needs_data or not quantization.calibration_dataset_size:
        return Work(0, 0)
    tokens = quantization.calibration_dataset_size * quantization.calibration_seq_len
    forward = _forward_flops(model, tokens, quantization.calibration_seq_len)
    if quantization.is_balanced:
        rounding = _rounding_flops(model, tokens, grams=1 + moves_weights(quantization))
        if quantization.is_max:
            rounding += _residual_flops(model, tokens)
        if algorithm.chooses:  # two inverses of each Gram matrix, and a rounding for each option
            rounding += _rounding_flops(model, tokens, grams=1, inverses=2, roundings=len(algorithm.candidates))
        return Work(int(forward_passes(quantization) * forward), rounding)
    grams = 0
    if algorithm.gram_candidates:
        for linears, layers in _kinds(model):
            gathered = sum(2 * tokens * linear.columns**2 * _active(model, linear) for linear in linears)
            search = sum(2 * linear.weights * linear.columns * linear.count for linear in linears)
            grams += layers * (gathered + int(algorithm.gram_candidates * _SEARCH_SHARE * search))
    return Work(forward, grams)


def forward_passes(quantization: QuantizationConfig) -> float:
    """Returns how many times the calibration data passes through each block: see calibration/rounding_learner.py."""
    if not quantization.is_balanced:
        return 1
    # The quantized stream takes about one and a half passes in parts, the unquantized one takes one. To choose, the
    # unquantized stream goes through each block once more, and some of it for each option of each layer.
    passes = 1.5 + moves_weights(quantization) + 2 * algorithm_of(quantization).chooses
    # With "max" an eighth of the samples also goes through the rounded block, and twice through one rounded to nearest:
    # with the inputs that reach it, and with those of a model rounded to nearest throughout.
    return passes + 0.375 * quantization.is_max


def _rounding_flops(model: ModelSpec, tokens: int, grams: int, inverses: int = 1, roundings: int = 1) -> int:
    """Gram matrices of each linear layer, the inverse of one, and the weight moved with a second one and rounded."""
    total = 0
    for linears, layers in _kinds(model):
        for linear in linears:
            size = linear.whole_columns
            gathered = grams * 2 * tokens * size**2 * _active(model, linear)
            rounded = inverses * _INVERSE * size**3 + roundings * _ROUNDING * linear.weights * size
            total += layers * (gathered + linear.count * rounded)
    return total


def _residual_flops(model: ModelSpec, tokens: int) -> int:
    """The products with the residual stream's errors, with quality "max"."""
    return sum(
        layers * 2 * tokens * linear.weights * _active(model, linear)
        for linears, layers in _kinds(model)
        for linear in linears
        if corrects_residual(model, linear)
    )


def _kinds(model: ModelSpec) -> Iterator[tuple[tuple[Linear, ...], int]]:
    """Yields the linear layers of each kind of layer, and how many layers are of it."""
    for layer, count in model.layer_kinds:
        yield layer_linears(model, layer=layer), count


def _active(model: ModelSpec, linear: Linear) -> int:
    """The number of linear layers of a kind that a token passes in one layer."""
    return min(linear.count, max(1, model.experts_per_token))


def _forward_flops(model: ModelSpec, tokens: int, seq_len: int) -> int:
    total = 0
    for linears, layers in _kinds(model):
        weights = sum(linear.weights * _active(model, linear) for linear in linears)
        # Scores and their product with the values, half of which causality leaves out. A state space has neither.
        attends = any(linear.name == "qkv" for linear in linears)
        attention = 2 * seq_len * model.num_attention_heads * model.head_size if attends else 0
        total += layers * tokens * (2 * weights + attention)
    return total


def step_seconds(
    model: ModelSpec,
    quantization: QuantizationConfig,
    parallelism: Parallelism,
    device: Device,
    *,
    layerwise: bool,
    read_bytes: int,
    written_bytes: int,
    files: int,
) -> dict[str, float]:
    """Estimates how long each step takes, in seconds.

    Args:
        model: The model.
        quantization: How it is quantized, and on how much data.
        parallelism: How it is spread.
        device: The device that each rank runs on; a CPU is shared by all ranks.
        layerwise: Whether hidden states wait on the host.
        read_bytes: Size of the checkpoint's weights.
        written_bytes: Size of all rank files.
        files: How many rank files there are.
    """
    work = calibration_work(model, quantization)
    # Stages wait for one another while the first batch reaches them, and after the last one has passed.
    batches = Batches.of(quantization, parallelism)
    rounds = -(-batches.samples // max(1, batches.size)) or 1
    busy = 1.0 if device.is_cpu else parallelism.ranks * rounds / (rounds + parallelism.pp - 1)
    rate = device.bf16_tflops * 1e12 * busy
    # On a GPU the search multiplies with two bfloat16 terms instead of one in float32.
    gram_rate = rate * (_CPU_FLOAT32_SHARE if device.is_cpu else _GRAM_SHARE)
    forward_rate = rate * (1.0 if device.is_cpu else _FORWARD_SHARE)
    seconds = {"load": read_bytes / (device.disk_bandwidth * 1e9)}
    if work.flops:
        seconds["calibrate"] = work.forward_flops / forward_rate + work.gram_flops / gram_rate
        if layerwise and not device.is_cpu:
            # There and back, for each layer.
            copied = 2 * waiting_states(model, quantization, parallelism) * model.num_layers / parallelism.pp
            seconds["calibrate"] += copied / (_COPY_RATE * 1e9)
    writers = max(1, min(files, parallelism.ranks))
    at_once = 1e9 * (1 if device.is_cpu else writers)
    disk = written_bytes / (device.disk_bandwidth * 1e9)
    seconds["export"] = disk + written_bytes / at_once * (1 / _PACK_RATE + 1 / _HASH_RATE)
    if algorithm_of(quantization).quantizes:
        seq_len = min(COMPARED_SEQ_LEN, model.seq_length)
        passes = _MEASURE_PASSES * _forward_flops(model, compared_documents(model, quantization) * seq_len, seq_len)
        seconds["measure"] = passes / forward_rate + written_bytes / (at_once * _PACK_RATE)
    seconds["verify"] = written_bytes / (_VERIFY_RATE * 1e9)
    return seconds
