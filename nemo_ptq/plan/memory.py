# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""How much memory a rank holds at most in each step: counted, tensor by tensor, from what the engine keeps.

The counts follow the code that they describe, and are named after it; docs/plan.md explains them. They leave out memory
that does not grow with the model: the libraries' own, and fragments that an allocator does not give back.
"""

from dataclasses import dataclass, replace

from nemo_ptq.config import QuantizationConfig
from nemo_ptq.models.spec import ModelSpec
from nemo_ptq.plan.sharding import Blocks, Linear, Parallelism, Stage, embedding_parameters, linears_by_kind, stages
from nemo_ptq.quantization.algorithms import Algorithm, algorithm_of, moves_weights
from nemo_ptq.quantization.excluded import unquantized_layers

_BF16, _FP32 = 2, 4
# Copies of the activated half that a gated MLP makes: both halves of fc1's output, the activation, the other half with
# Megatron's offset, their product.
_GATED_COPIES, _PLAIN_COPIES = 5, 2
# The layer's input, the residual stream, and a normalised copy of it, beside the states that wait.
_STREAM_COPIES = 3
# Text that the models are compared on: see report/measure.py.
_MOST_LOGITS, _COMPARED_BATCH, COMPARED_SEQ_LEN = 1 << 28, 4, 256
# Positions whose distributions are compared at a time, and float32 copies of them: see verify/evaluate.py.
_SCORED_AT_ONCE, _SCORING_COPIES = 128, 10
# Values that verify checks at a time, and the wider types that it checks them in: see verify/trtllm/values.py.
_VERIFY_CHUNK = (1 << 22) * 16
# What torch needs to round a weight and read its codes back, in bytes for each element of a piece, beside the result.
_ROUNDING_BYTES = 10
# Elements of a weight that are worked on at a time: see quantization/pieces.py.
_PIECE = 1 << 27
# float64 copies that inverting a Gram matrix takes, and float32 copies that rounding a weight takes.
_INVERSE_BYTES, _ROUNDED_COPIES = 4 * 8, 6
# Copies of some rows of a Gram matrix while they are split into two bfloat16 terms, in bytes for each element.
_SPLITTING_BYTES = 10


@dataclass(frozen=True)
class StepMemory:
    """The peak memory of one rank in one step, in bytes.

    Attributes:
        step: "load", "calibrate", "export", "measure" or "verify".
        weights: The rank's parameters that are in memory at that moment.
        states: Hidden states of all batches, which wait between two blocks, where they are in the device's memory.
        activations: Memory that a batch needs on its way through a layer.
        statistics: Gram matrices of one layer, and the memory of AWQ's search or GPTQ's rounding with them.
        buffers: Data being read, measured, packed or checked, where it is in the device's memory.
        host: Data in the host's memory; 0 on a CPU, where the device's memory is the host's.
    """

    step: str
    weights: int
    states: int = 0
    activations: int = 0
    statistics: int = 0
    buffers: int = 0
    host: int = 0

    @property
    def device(self) -> int:
        """All that is in the device's memory."""
        return self.weights + self.states + self.activations + self.statistics + self.buffers


@dataclass(frozen=True)
class Batches:
    """The calibration data of one rank.

    Attributes:
        size: Samples in a batch.
        seq_len: Tokens of each: the length at which texts are cut, since most are longer.
        samples: All samples that the rank reads.
    """

    size: int
    seq_len: int
    samples: int

    @classmethod
    def of(cls, quantization: QuantizationConfig, parallelism: Parallelism) -> "Batches":
        """The share of a job's samples that one rank reads."""
        needed = quantization.calibration_dataset_size if algorithm_of(quantization).needs_data else 0
        samples = -(-needed // parallelism.readers)
        return cls(min(quantization.calibration_batch_size, samples), quantization.calibration_seq_len, samples)

    @property
    def tokens(self) -> int:
        """Tokens in a batch."""
        return self.size * self.seq_len


def activation_bytes(model: ModelSpec, parallelism: Parallelism, tokens: int) -> int:
    """The memory that one batch needs at the widest place of a transformer layer.

    Args:
        model: The model.
        parallelism: How it is spread.
        tokens: Tokens in the batch.
    """
    hidden = model.hidden_size
    linears = {
        linear.name: linear for kind in linears_by_kind(model, parallelism.tp, parallelism.ep) for linear in kind
    }
    stream = _STREAM_COPIES * hidden * _BF16
    norm = hidden * (3 * _BF16 + 3 * _FP32)
    state_space = attention = mlp = 0
    if "in_proj" in linears:
        # The projections, before and after the convolution; in float32 the gated values, the gate and the norm.
        state_space = stream + 3 * linears["in_proj"].rows * _BF16 + 3 * linears["out_proj"].columns * _FP32
    if "qkv" in linears:
        # Queries, keys and values, contiguous copies of them, their rotated halves, and the output.
        attention = stream + (2 * linears["qkv"].rows + 3 * linears["proj"].columns) * _BF16
    copies = _GATED_COPIES if model.gated_mlp else _PLAIN_COPIES
    if "fc2" in linears:
        mlp = stream + copies * linears["fc2"].columns * _BF16
    if model.num_experts:
        fc2 = linears["fc2"]
        # Every token is copied for each of its experts, which run one after the other; routing is seldom even.
        routed = model.experts_per_token or 1
        busiest = min(1.0, 2 * routed / model.num_experts)
        mlp = int(parallelism.ep * (stream + 3 * routed * hidden * _BF16) + busiest * copies * fc2.columns * _BF16)
    return tokens * max(norm, state_space, attention, mlp)


def _gram(linear: Linear) -> int:
    return linear.columns * linear.whole_columns * _FP32 * linear.count


def _search_bytes(linear: Linear, on_gpu: bool) -> int:
    """The memory of AWQ's search over one layer, its Gram matrix excluded: see calibration/awq.py."""
    gram = linear.columns * linear.whole_columns * _FP32
    # On a GPU some rows at a time.
    piece = min(linear.weights, _PIECE) if on_gpu else linear.weights
    whole = piece // linear.columns * linear.whole_columns
    # The scaled weight, its rounding, the error, and the error of all ranks; then stripes of the product.
    weight = piece * 3 * _BF16 + whole * _BF16 + 2 * whole // 8 * _FP32
    if on_gpu:
        # The two bfloat16 terms of the matrix take its place.
        return gram + max(min(gram // _FP32, _PIECE) * _SPLITTING_BYTES, weight)
    return weight + linear.weights * _FP32


def _observing_bytes(linear: Linear, tokens: int, on_gpu: bool) -> int:
    """The memory of adding a batch to a Gram matrix: the input, its magnitudes, and the input of all ranks.

    A CPU also needs these in float32, and the product; a GPU adds the product in place.
    """
    local, whole = tokens * linear.columns, tokens * linear.whole_columns
    gathered = whole * _BF16 if linear.columns < linear.whole_columns else 0
    on_cpu = 0 if on_gpu else (local + whole + linear.columns * linear.whole_columns) * _FP32
    return 2 * local * _BF16 + gathered + on_cpu


def _awq_bytes(
    model: ModelSpec, linears: tuple[Linear, ...], activations: int, tokens: int, on_gpu: bool
) -> tuple[int, int]:
    """Activations and statistics of one layer's AWQ calibration, when they are largest together.

    All Gram matrices exist while the batches run; each is then freed when its layer's search is done.
    """
    grams = sum(_gram(linear) for linear in linears)
    stream = tokens * _STREAM_COPIES * model.hidden_size * _BF16
    phases = [(activations, grams)]
    for index, linear in enumerate(linears):
        # Experts process their shares of the tokens one after the other.
        seen = tokens // linear.count
        phases.append((stream, grams + _observing_bytes(linear, seen, on_gpu)))
        phases.append((0, sum(_gram(left) for left in linears[index:]) + _search_bytes(linear, on_gpu)))
    return max(phases, key=sum)


def corrects_residual(model: ModelSpec, linear: Linear) -> bool:
    """Whether a layer makes up for what the residual stream lacks with quality "max": see calibration/residual.py."""
    is_dense = linear.name == "proj" or (linear.name == "fc2" and not model.num_experts)
    return is_dense and model.gemma is None


def _rounding_bytes(
    model: ModelSpec,
    quantization: QuantizationConfig,
    linears: tuple[Linear, ...],
    activations: int,
    tokens: int,
    on_gpu: bool,
) -> tuple[int, int]:
    """Activations and statistics while one layer is rounded with quality "balanced", when they are largest together.

    The linear layers are rounded one after the other, those of all experts together: a Gram matrix exists while the
    batches run and the layer is rounded, and a second one where its weight is moved. With "max" there is also a product
    as large as the weight, and in the end a second copy of the block, rounded to nearest.
    """
    phases, done, is_max = [(activations, 0)], 0, quantization.is_max
    moves = moves_weights(quantization)
    for linear in linears:
        seen, grams = tokens // linear.count, (1 + moves) * _gram(linear)
        if is_max and corrects_residual(model, linear):
            grams += linear.weights * _FP32
        observing = _observing_bytes(linear, seen, on_gpu) + moves * seen * linear.columns * _BF16
        phases.append((activations, done + grams + observing))
        inverse = linear.whole_columns**2 * _INVERSE_BYTES
        phases.append((0, done + grams + inverse + linear.weights * _ROUNDED_COPIES * _FP32))
        # Codes, and the weight that the block goes on with.
        done += linear.weights * linear.count * (1 + _BF16)
    if is_max:
        phases.append((activations, 2 * done))
    return max(phases, key=sum)


def _choosing_bytes(linears: tuple[Linear, ...], activations: int, tokens: int, on_gpu: bool) -> tuple[int, int]:
    """Activations and statistics while the options of one layer are tried, when they are largest together.

    All Gram matrices exist while the batches run; then each linear layer, or all experts together, have two inverses,
    one with the columns in their own order and one with them sorted, and a rounded weight.
    """
    grams = sum(_gram(linear) for linear in linears)
    observing = max(_observing_bytes(linear, tokens // linear.count, on_gpu) for linear in linears)
    phases = [(activations, grams + observing)]
    for linear in linears:
        inverse = linear.whole_columns**2
        kept = (2 * inverse * _FP32 + linear.weights * _BF16) * linear.count
        phases.append((activations, grams + kept))
        phases.append((0, grams + kept + inverse * _INVERSE_BYTES + linear.weights * _ROUNDED_COPIES * _FP32))
    return max(phases, key=sum)


def compared_documents(model: ModelSpec, quantization: QuantizationConfig) -> int:
    """The number of samples on which the quantized model is compared with the unquantized one."""
    most = max(1, _MOST_LOGITS // (min(COMPARED_SEQ_LEN, model.seq_length) * model.vocab_size))
    return min(quantization.evaluation_dataset_size, most)


# Linear layers whose output is that of an attention, an MLP or a state space.
_LAST = ("proj", "fc2", "out_proj")


def waiting_states(model: ModelSpec, quantization: QuantizationConfig, parallelism: Parallelism) -> int:
    """Bytes of the hidden states between two blocks: once for calibration batches, twice for compared ones.

    Where the calibration batches walk through the unquantized model as well, their states are kept twice too, and the
    inputs of each linear layer of the block whose weight is moved once. Of other layers, only the inputs of the last
    layer of an attention and of an MLP are kept, and none of experts. With "max" the residual stream is kept as well
    where a layer writes into it, and held-out batches have their states a third time.
    """
    batches = Batches.of(quantization, parallelism)
    calibrated = batches.samples * batches.seq_len
    compared = compared_documents(model, quantization) * min(COMPARED_SEQ_LEN, model.seq_length)
    width, copies, kept = model.hidden_size, 1 + moves_weights(quantization), 0
    if quantization.is_balanced:
        moves = moves_weights(quantization)
        is_max = quantization.is_max
        kept = max(
            sum(
                linear.columns * (moves or linear.name in _LAST) + width * (is_max and corrects_residual(model, linear))
                for linear in linears
                if not (model.num_experts and "fc" in linear.name)
            )
            for linears in linears_by_kind(model, parallelism.tp, parallelism.ep)
        )
    held_out = calibrated // 8 if quantization.is_max else 0
    return ((copies * calibrated + held_out + 2 * compared) * width + calibrated * kept) * _BF16


@dataclass(frozen=True)
class _Rank:
    """One rank of a job, and the memory beyond weights and waiting states that it needs for a block."""

    model: ModelSpec
    quantization: QuantizationConfig
    parallelism: Parallelism
    on_gpu: bool

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The linear layers of a layer; where layers differ, of one with most weights."""
        kinds = linears_by_kind(self.model, self.parallelism.tp, self.parallelism.ep)
        return max(kinds, key=lambda linears: sum(linear.weights * linear.count for linear in linears))

    @property
    def largest(self) -> Linear:
        return max(self.linears, key=lambda linear: linear.weights)

    @property
    def algorithm(self) -> Algorithm:
        return algorithm_of(self.quantization)

    def read(self, block: Blocks) -> int:
        """A stored tensor is read whole, even if this rank needs only a part of it."""
        if block.kind == "layer":
            return max(linear.weights for kind in linears_by_kind(self.model) for linear in kind) * _BF16
        return embedding_parameters(self.model) * _BF16

    def calibrate(self) -> tuple[int, int]:
        """Activations and statistics of a layer, when they are largest together."""
        batches = Batches.of(self.quantization, self.parallelism)
        activations = activation_bytes(self.model, self.parallelism, batches.tokens)
        if self.quantization.is_balanced:
            steps = [
                _rounding_bytes(self.model, self.quantization, self.linears, activations, batches.tokens, self.on_gpu)
            ]
            if self.algorithm.chooses:
                steps.append(_choosing_bytes(self.linears, activations, batches.tokens, self.on_gpu))
            return max(steps, key=sum)
        if self.algorithm.gram_candidates:
            return _awq_bytes(self.model, self.linears, activations, batches.tokens, self.on_gpu)
        # SmoothQuant takes the magnitudes of one weight at a time, after the activations are freed.
        magnitudes = self.largest.weights * _BF16 if self.algorithm.smooths else 0
        return max((activations, 0), (0, magnitudes), key=sum)

    def pack(self) -> int:
        """The device memory to pack the largest weight; the halves of a gated layer are packed one after the other."""
        whole = self.largest.weights
        half = whole // 2 if self.largest.name == "fc1" and self.model.gated_mlp else whole
        packing = half * self.algorithm.packing_bytes
        # Smoothed in float32, some rows at a time, then kept in bfloat16 while it is packed.
        return whole * _BF16 + max(min(whole, _PIECE) * _FP32, packing) if self.algorithm.smooths else packing

    def packed(self, block: Blocks) -> int:
        """A packed block, on the host."""
        if block.kind == "layer":
            # Layers may differ in their unquantized modules: a module that is unquantized in one layer counts as such
            # in all.
            plain = {
                name.rpartition(".")[2].removeprefix("linear_")
                for name in unquantized_layers(self.quantization, self.model)
            }
            sizes = {linear.name: linear.weights * linear.count for linear in self.linears}
            kept = sum(size for name, size in sizes.items() if name in plain)
            packed = self.algorithm.packed_bytes_of(self.quantization)
            return int((sum(sizes.values()) - kept) * packed) + kept * _BF16
        return block.parameters * _BF16

    def round(self, kept: int) -> int:
        """The device memory while the weights of a layer are rounded one after the other.

        Args:
            kept: Bytes per element that stay in memory.
        """
        rounding = max(_ROUNDING_BYTES, self.algorithm.packing_bytes)
        # The result in float32, and the smoothed weight.
        each = _FP32 + (_BF16 if self.algorithm.smooths else 0)
        held, most = 0, 0
        for linear in (self.linears[1], self.linears[0], *self.linears[2:]):
            piece = min(linear.weights, _PIECE)
            # On a CPU the result takes memory only as it is written, after the copies of each piece are freed.
            result = linear.weights if self.on_gpu else linear.weights - piece
            own = max(result * each + piece * rounding, linear.weights * each)
            most = max(most, held + (linear.count - 1) * linear.weights * kept + own)
            held += linear.weights * linear.count * kept
        return most

    def measure_layer(self) -> tuple[int, int]:
        """Activations and buffers while a layer is measured, when they are largest together."""
        compared = compared_documents(self.model, self.quantization)
        if not compared:
            return 0, self.round(0)
        tokens = min(compared, _COMPARED_BATCH) * min(COMPARED_SEQ_LEN, self.model.seq_length)
        rounded = sum(linear.weights * linear.count for linear in self.linears) * _BF16
        passing = activation_bytes(self.model, self.parallelism, tokens)
        return max((passing, rounded), (0, self.round(_BF16)), key=sum)

    def score(self) -> int:
        """Logits of both models for a batch, and the memory to compare those of one document, on the last stage."""
        compared = compared_documents(self.model, self.quantization)
        if not compared:
            return 0
        vocab, seq_len = self.model.vocab_size, min(COMPARED_SEQ_LEN, self.model.seq_length)
        local = -(-vocab // self.parallelism.tp)
        logits = min(compared, _COMPARED_BATCH) * seq_len * local * _BF16
        comparing = (2 * seq_len + _SCORING_COPIES * min(seq_len, _SCORED_AT_ONCE)) * vocab * _FP32
        return 2 * logits + max(logits, comparing)


def step_memory(
    model: ModelSpec,
    quantization: QuantizationConfig,
    parallelism: Parallelism,
    stage: Stage,
    *,
    layerwise: bool,
    inference_tp: int,
    is_cpu: bool,
) -> tuple[StepMemory, ...]:
    """Counts the memory of a rank of one pipeline stage, step by step.

    All steps but the last alternate, block by block; each is given for the kind of block with its peak.

    Args:
        model: The model.
        quantization: How it is quantized, and on how much data; none where it is calibrated already.
        parallelism: How it is spread.
        stage: The rank's stage.
        layerwise: Whether one block of weights is in memory at a time, and hidden states wait on the host.
        inference_tp: Tensor parallelism of the files.
        is_cpu: Whether the device's memory is the host's.
    """
    rank = _Rank(model, quantization, parallelism, not is_cpu)
    quantizes = rank.algorithm.quantizes
    all_states = waiting_states(model, quantization, parallelism) if quantizes else 0

    def step(
        name: str, block: Blocks, activations: int = 0, statistics: int = 0, device: int = 0, host: int = 0
    ) -> StepMemory:
        elements = block.parameters + block.kept if layerwise else block.so_far
        on_host = layerwise and not is_cpu
        return StepMemory(
            name,
            elements * _BF16,
            0 if on_host else all_states,
            activations,
            statistics,
            device + (host if is_cpu else 0),
            0 if is_cpu else host + (all_states if on_host else 0),
        )

    found: dict[str, list[StepMemory]] = {name: [] for name in ("load", "calibrate", "export", "measure")}
    for block in stage.blocks():
        is_layer = block.kind == "layer"
        found["load"].append(step("load", block, host=rank.read(block)))
        if is_layer and rank.algorithm.needs_data and quantization.calibration_dataset_size:
            found["calibrate"].append(step("calibrate", block, *rank.calibrate()))
        packing = rank.pack() if is_layer else 0
        found["export"].append(step("export", block, device=packing, host=rank.packed(block)))
        if is_layer and quantizes:
            activations, buffers = rank.measure_layer()
            found["measure"].append(step("measure", block, activations, device=buffers))
        elif block.kind == "head" and quantizes:
            found["measure"].append(step("measure", block, rank.score()))
    worst = [max(steps, key=lambda memory: memory.device) for steps in found.values() if steps]
    # The model is freed. Tensors are checked whole: those that are split over files are joined first.
    tables = embedding_parameters(model) * _BF16
    looked_at = tables * (2 if inference_tp > 1 else 1) + _VERIFY_CHUNK
    return (*worst, StepMemory("verify", 0, buffers=looked_at if is_cpu else 0, host=0 if is_cpu else looked_at))


def worst_memory(
    model: ModelSpec,
    quantization: QuantizationConfig,
    parallelism: Parallelism,
    *,
    layerwise: bool,
    inference_tp: int,
    is_cpu: bool,
) -> tuple[StepMemory, ...]:
    """Counts each step for the stage with the highest peak in it: see :func:`step_memory`."""
    worst: dict[str, StepMemory] = {}
    for stage in stages(model, parallelism):
        for step in step_memory(
            model, quantization, parallelism, stage, layerwise=layerwise, inference_tp=inference_tp, is_cpu=is_cpu
        ):
            worst[step.step] = max(worst.get(step.step, step), step, key=lambda memory: memory.device)
    return tuple(worst.values())


def without_data(quantization: QuantizationConfig) -> QuantizationConfig:
    """The data of a job whose model is calibrated already: it reads no text."""
    return replace(quantization, calibration_dataset_size=0, evaluation_dataset_size=0)
