# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""One calibration rank's share of a model's parameters, as Megatron spreads them."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from nemo_ptq.models.layers import LayerSpec, ModuleSpec
from nemo_ptq.models.spec import ModelSpec


@dataclass(frozen=True)
class Parallelism:
    """How a model is spread during calibration.

    Attributes:
        tp: Ranks that share a layer.
        pp: Pipeline stages.
        ep: Ranks that share the experts of a layer.
        ranks: All processes: TP times PP times data parallelism.
        first: Layers of the first stage, where stages are uneven.
        last: Layers of the last stage, where stages are uneven.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1
    ranks: int = 1
    first: int | None = None
    last: int | None = None

    @property
    def readers(self) -> int:
        """Groups of ranks that read calibration samples of their own."""
        return max(1, self.ranks // (self.tp * self.pp * self.ep))

    def layers(self, num_layers: int) -> list[int]:
        """Layers of each stage; if they cannot be shared evenly, the last of the even stages gets the remainder."""
        if self.pp == 1:
            return [num_layers]
        uneven = {0: self.first, self.pp - 1: self.last}
        given = {stage: layers for stage, layers in uneven.items() if layers is not None}
        stages = [stage for stage in range(self.pp) if stage not in given]
        left = max(0, num_layers - sum(given.values()))
        even = {stage: left * (i + 1) // len(stages) - left * i // len(stages) for i, stage in enumerate(stages)}
        return [{**even, **given}[stage] for stage in range(self.pp)]


@dataclass(frozen=True)
class Linear:
    """A quantized linear layer, or all experts' of one rank.

    Attributes:
        name: "qkv", "proj", "fc1" or "fc2"; "in_proj" or "out_proj" of a state space.
        rows: Output features of this rank.
        columns: Input features of this rank.
        whole_columns: Input features of all ranks that share the layer.
        bias: Bias elements of this rank.
        count: How many of these a layer of this rank has: its experts, or 1.
    """

    name: str
    rows: int
    columns: int
    whole_columns: int
    bias: int = 0
    count: int = 1

    @property
    def weights(self) -> int:
        """Elements of one weight."""
        return self.rows * self.columns


def layer_linears(model: ModelSpec, tp: int = 1, ep: int = 1, layer: LayerSpec | None = None) -> tuple[Linear, ...]:
    """The linear layers of one transformer layer, as one rank holds them.

    Args:
        model: The model.
        tp: Ranks that share a layer; sizes are rounded up where it does not divide them.
        ep: Ranks that share the experts.
        layer: The transformer layer; the first if none is given.
    """
    experts = -(-(model.num_experts or 1) // ep)

    def linear(module: ModuleSpec) -> Linear:
        rows, columns = module.outputs(), module.inputs
        rows = -(-rows // tp) if module.axis == 0 else rows
        columns = -(-columns // tp) if module.axis == 1 else columns
        name, bias = module.name.rpartition(".")[2].removeprefix("linear_"), rows if module.has_bias else 0
        return Linear(name, rows, columns, module.inputs, bias, 1 if module.expert is None else experts)

    modules = (layer or model.layers[0]).modules
    return tuple(linear(module) for module in modules if module.is_quantized and module.expert in (None, 0))


def linears_by_kind(model: ModelSpec, tp: int = 1, ep: int = 1) -> list[tuple[Linear, ...]]:
    """The linear layers of each kind of layer, as one rank holds them: arguments as for :func:`layer_linears`."""
    return [layer_linears(model, tp, ep, layer) for layer, _ in model.layer_kinds]


def layer_parameters(model: ModelSpec, layer: LayerSpec, tp: int = 1, ep: int = 1) -> int:
    """Parameters of one transformer layer on one rank."""
    linears = sum((linear.weights + linear.bias) * linear.count for linear in layer_linears(model, tp, ep, layer))
    others = [module for module in layer.modules if not module.is_quantized]
    return linears + sum(
        prod(module.shape) * len(module.parameters) + module.outputs() * module.has_bias for module in others
    )


def embedding_parameters(model: ModelSpec, tp: int = 1) -> int:
    """Parameters of the word embedding, or of an output layer, on one rank."""
    return -(-model.vocab_size // tp) * model.hidden_size


@dataclass(frozen=True)
class Blocks:
    """The blocks of one kind of a pipeline stage: its embedding, its layers, or its head.

    Attributes:
        kind: "embedding", "layer" or "head".
        parameters: Parameters of the largest of them, on one rank.
        so_far: Parameters of the stage up to the last of them.
        kept: Parameters that stay in memory after the embedding, since the head needs them again.
    """

    kind: str
    parameters: int
    so_far: int
    kept: int = 0


@dataclass(frozen=True)
class Stage:
    """One pipeline stage, as one rank holds it.

    Attributes:
        embedding: Parameters of its embedding, 0 where it has none.
        layers: Parameters of each of its layers.
        head: Parameters of its final norm and output layer, 0 where it has none.
        is_first: Whether hidden states begin here.
        is_last: Whether hidden states end here.
        is_tied: Whether its output layer is its embedding.
    """

    embedding: int
    layers: tuple[int, ...]
    head: int
    is_first: bool
    is_last: bool
    is_tied: bool

    @property
    def num_layers(self) -> int:
        """Its transformer layers."""
        return len(self.layers)

    @property
    def parameters(self) -> int:
        """Parameters of this rank."""
        return self.embedding + sum(self.layers) + self.head

    def blocks(self) -> Iterator[Blocks]:
        """Yields its kinds of blocks, in the order of the walk."""
        if self.is_first:
            yield Blocks("embedding", self.embedding, self.embedding)
        kept = self.embedding if self.is_tied else 0
        yield Blocks("layer", max(self.layers, default=0), self.embedding + sum(self.layers), kept)
        if self.is_last:
            yield Blocks("head", self.head, self.parameters, kept)


def stages(model: ModelSpec, parallelism: Parallelism) -> Iterator[Stage]:
    """Yields the pipeline stages of a calibration."""
    table = embedding_parameters(model, parallelism.tp)
    positions = model.seq_length * model.hidden_size if model.position_embedding_type == "learned_absolute" else 0
    norm = model.hidden_size * (2 if model.normalization == "LayerNorm" else 1)
    first = 0
    for index, num_layers in enumerate(parallelism.layers(model.num_layers)):
        layers = model.layers[first : first + num_layers]
        first += num_layers
        is_first, is_last = index == 0, index == parallelism.pp - 1
        # A tied output layer is the embedding itself, unless that is on another stage.
        is_tied = model.tied_embeddings and is_first and is_last
        embedding = table + positions if is_first else 0
        head = norm + (0 if is_tied else table) if is_last else 0
        sizes = tuple(layer_parameters(model, layer, parallelism.tp, parallelism.ep) for layer in layers)
        yield Stage(embedding, sizes, head, is_first, is_last, is_tied)


def linear_parameters(model: ModelSpec) -> int:
    """Elements of the weights that algorithms quantize, of the whole model."""
    layers = (layer_linears(model, layer=layer) for layer in model.layers)
    return sum(linear.weights * linear.count for linears in layers for linear in linears)


def model_parameters(model: ModelSpec) -> int:
    """Parameters of the whole model, a tied embedding counted once."""
    return next(stages(model, Parallelism())).parameters
