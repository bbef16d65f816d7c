# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The layout table of the TensorRT-LLM checkpoint: which tensors a rank file has, and where their rows come from."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from nemo_ptq.export.layout import Block, FileTensor, Part, Placement, joined, share, whole
from nemo_ptq.models.layers import ModuleSpec
from nemo_ptq.models.mapping import trtllm_tensors
from nemo_ptq.models.spec import ModelSpec
from nemo_ptq.quantization.schemes import UNQUANTIZED, Field, Scheme

# Vocabulary sizes that AWQ's readers take are multiples of this.
AWQ_VOCAB_MULTIPLE = 64
KV_CACHE_FIELDS = ("k_cache_scaling_factor", "v_cache_scaling_factor", "kv_cache_scaling_factor")


@dataclass(frozen=True)
class QnemoLayout:
    """The rank files of one export.

    Attributes:
        shape: The model.
        schemes: Scheme of each quantized linear layer, by Megatron's name; the others are unquantized.
        kv_cache: Megatron's names of the core attention modules whose KV cache is quantized.
        dtype: Data type of what stays unquantized.
        tensor_parallel: Tensor parallelism of the files.
        pipeline_parallel: Pipeline parallelism of the files.
    """

    shape: ModelSpec
    schemes: Mapping[str, Scheme]
    kv_cache: frozenset[str]
    dtype: torch.dtype
    tensor_parallel: int
    pipeline_parallel: int

    @property
    def world_size(self) -> int:
        """How many rank files there are."""
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def files(self) -> Sequence[str]:
        """Names of the rank files, in the order of ranks."""
        return [f"rank{rank}.safetensors" for rank in range(self.world_size)]

    def metadata(self, file: int) -> Mapping[str, str]:
        """The header says which rank a file is for."""
        return {"rank": str(file)}

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding as config.json states them."""
        rows = self.shape.vocab_size
        has_awq = any(scheme.quant_algo in ("W4A16_AWQ", "W4A8_AWQ") for scheme in self.schemes.values())
        return math.ceil(rows / AWQ_VOCAB_MULTIPLE) * AWQ_VOCAB_MULTIPLE if has_awq else rows

    @property
    def unquantized(self) -> frozenset[str]:
        """Megatron's names of the linear layers that are not quantized."""
        return frozenset(
            name
            for layer, spec in enumerate(self.shape.layers)
            for module in spec.modules
            if module.is_quantized and (name := f"decoder.layers.{layer}.{module.name}") not in self.schemes
        )

    def stage_of_layer(self, layer: int) -> int:
        """Which pipeline stage of the files holds a layer."""
        return layer // (self.shape.num_layers // self.pipeline_parallel)

    def blocks(self, file: int) -> Iterator[Block]:
        """Yields the blocks of a file, empty ones included: embedding, every layer of the model, and the head.

        Args:
            file: Rank of the file: tensor-parallel rank + pipeline rank * tensor_parallel.
        """
        stage, rank = divmod(file, self.tensor_parallel)
        last = self.pipeline_parallel - 1
        yield list(self._embedding(rank)) if stage == 0 else []
        for layer in range(self.shape.num_layers):
            yield list(self._layer(layer, rank)) if self.stage_of_layer(layer) == stage else []
        yield list(self._head(rank, alone=last > 0)) if stage == last else []

    def _vocab(self, part: Part, name: str, rank: int) -> FileTensor:
        rows = math.ceil(self.vocab_size / self.tensor_parallel)
        start, stop = (min(bound, part.shape[0]) for bound in (rank * rows, (rank + 1) * rows))
        return FileTensor(
            name, self.dtype, (rows, *part.shape[1:]), (Placement(part, 0, start, stop, (0,) * len(part.shape)),)
        )

    def _embedding(self, rank: int) -> Iterator[FileTensor]:
        shape = self.shape
        words = Part("embedding.word_embeddings", "", "weight", (shape.vocab_size, shape.hidden_size), 0)
        yield self._vocab(words, "transformer.vocab_embedding.weight", rank)
        if shape.position_embedding_type == "learned_absolute":
            rows = math.ceil(shape.seq_length / self.tensor_parallel)
            start, stop = (min(bound, shape.seq_length) for bound in (rank * rows, (rank + 1) * rows))
            positions = Part("embedding.position_embeddings", "", "weight", (shape.seq_length, shape.hidden_size), None)
            yield FileTensor(
                "transformer.position_embedding.weight",
                self.dtype,
                (rows, shape.hidden_size),
                (Placement(positions, 0, start, stop, (0, 0)),),
            )

    def _head(self, rank: int, alone: bool) -> Iterator[FileTensor]:
        """What follows the last layer; ``alone`` says that the embedding is in another file."""
        shape = self.shape
        has_bias = shape.normalization == "LayerNorm"
        norm = ModuleSpec("decoder.final_layernorm", "norm", {"": shape.hidden_size}, has_bias=has_bias)
        yield from self._norm(norm.name, "transformer.ln_f", norm)
        size = (shape.vocab_size, shape.hidden_size)
        if not shape.tied_embeddings:
            yield self._vocab(Part("output_layer", "", "weight", size, 0), "lm_head.weight", rank)
        elif alone:
            yield self._vocab(Part("embedding.word_embeddings", "", "weight", size, 0), "lm_head.weight", rank)

    def _norm(self, module: str, name: str, spec: ModuleSpec) -> Iterator[FileTensor]:
        for field in ("weight", "bias") if spec.has_bias else ("weight",):
            yield whole(Part(module, "", field, spec.shape, None), f"{name}.{field}", self.dtype)

    def _layer(self, layer: int, rank: int) -> Iterator[FileTensor]:
        module = f"decoder.layers.{layer}."
        name = f"transformer.layers.{layer % (self.shape.num_layers // self.pipeline_parallel)}."
        # One tensor of all experts for each of one.
        stacked: dict[str, list[FileTensor]] = defaultdict(list)
        for spec in self.shape.layers[layer].modules:
            for own, groups in trtllm_tensors(spec).items():
                if spec.kind == "norm":
                    yield from self._norm(module + spec.name, name + own, spec)
                elif spec.kind == "router":
                    # Routers choose experts by small differences: their readers want float32.
                    part = Part(module + spec.name, "", "weight", spec.shape, None)
                    yield whole(part, f"{name}{own}.weight", torch.float32)
                else:
                    for tensor in self._linear(module + spec.name, name + own, spec, groups, rank):
                        if spec.expert is None:
                            yield tensor
                        else:
                            stacked[tensor.name].append(tensor)
        yield from map(_stacked, stacked.values())
        attention = module + "self_attention.core_attention"
        if attention in self.kv_cache:
            for suffix in KV_CACHE_FIELDS:
                yield whole(Part(attention, "", suffix, (1,), None), f"{name}attention.{suffix}", torch.float32)

    def _linear(
        self, module: str, name: str, spec: ModuleSpec, groups: Sequence[str], rank: int
    ) -> Iterator[FileTensor]:
        """A linear layer, whose outputs or inputs are sharded.

        Args:
            module: Megatron's name.
            name: Name in the file.
            spec: The layer.
            groups: The groups of output rows that make the stored layer, in their order.
            rank: Tensor-parallel rank of the file.
        """
        scheme = self.schemes.get(module, UNQUANTIZED)
        rows = {group: spec.outputs(group) for group in groups}
        shares_rows = spec.axis == 0
        for field in (*scheme.fields, _BIAS) if spec.has_bias else scheme.fields:
            dtype, axis = field.dtype or self.dtype, field.axis(shares_rows)
            target = f"{name}.{field.suffix}"
            if axis is None:
                size = field.shape(sum(rows.values()), spec.inputs, scheme.block_size)
                yield whole(Part(module, "", field.suffix, size, None), target, dtype)
                continue
            pieces = []
            for group, outputs in rows.items():
                size = field.shape(outputs, spec.inputs, scheme.block_size)
                part = Part(module, group, field.suffix, size, axis)
                pieces.append((part, *self._share(group, size[axis], rank)))
            yield joined(target, dtype, pieces, axis)

    def _share(self, group: str, extent: int, rank: int) -> tuple[int, int]:
        """Which part of an axis a file has; KV heads are repeated where there are more files than heads."""
        kv, ranks = self.shape.num_query_groups, self.tensor_parallel
        if group in ("k", "v") and ranks > kv:
            return share(extent, rank * kv // ranks, kv)
        return share(extent, rank, ranks)


_BIAS = Field("bias", None, lambda o, i, g: (o,), 0, None)


def _stacked(tensors: Sequence[FileTensor]) -> FileTensor:
    """Stacks one tensor of every expert along a new first dimension.

    Activations enter all experts with one scale: theirs is not stacked.
    """
    first = tensors[0]
    if first.name.endswith("activation_scaling_factor"):
        return first
    placements = tuple(
        Placement(p.part, p.axis, p.start, p.stop, (expert, *p.target))
        for expert, tensor in enumerate(tensors)
        for p in tensor.placements
    )
    return FileTensor(first.name, first.dtype, (len(tensors), *first.shape), placements)
