# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The layout table of the TensorRT-LLM checkpoint: which tensors a rank file has, and where their rows come from."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from nemo_ptq.export.layout import Block, FileTensor, Part, Placement, joined, share, whole
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
        yield from self._norm("decoder.final_layernorm", "transformer.ln_f", shape.hidden_size)
        size = (shape.vocab_size, shape.hidden_size)
        if not shape.tied_embeddings:
            yield self._vocab(Part("output_layer", "", "weight", size, 0), "lm_head.weight", rank)
        elif alone:
            yield self._vocab(Part("embedding.word_embeddings", "", "weight", size, 0), "lm_head.weight", rank)

    def _norm(self, module: str, name: str, size: int) -> Iterator[FileTensor]:
        fields = ("weight", "bias") if self.shape.normalization == "LayerNorm" else ("weight",)
        for field in fields:
            yield whole(Part(module, "", field, (size,), None), f"{name}.{field}", self.dtype)

    def _layer(self, layer: int, rank: int) -> Iterator[FileTensor]:
        shape, module = self.shape, f"decoder.layers.{layer}."
        name = f"transformer.layers.{layer % (shape.num_layers // self.pipeline_parallel)}."
        heads, kv, head = shape.num_attention_heads, shape.num_query_groups, shape.head_size
        yield from self._norm(module + "input_layernorm", name + "input_layernorm", shape.hidden_size)
        yield from self._norm(module + "pre_mlp_layernorm", name + "post_layernorm", shape.hidden_size)
        yield from self._column(
            module + "self_attention.linear_qkv",
            name + "attention.qkv",
            {"q": heads * head, "k": kv * head, "v": kv * head},
            shape.hidden_size,
            rank,
            shape.qkv_bias,
        )
        yield from self._row(
            module + "self_attention.linear_proj", name + "attention.dense", shape.hidden_size, heads * head, rank
        )
        attention = module + "self_attention.core_attention"
        if attention in self.kv_cache:
            for field in KV_CACHE_FIELDS:
                yield whole(Part(attention, "", field, (1,), None), f"{name}attention.{field}", torch.float32)
        if shape.num_experts:
            yield from self._experts(module + "mlp.", name + "mlp.", rank)
        else:
            yield from self._dense_mlp(module + "mlp.", name + "mlp.", rank)

    def _dense_mlp(self, module: str, name: str, rank: int) -> Iterator[FileTensor]:
        shape = self.shape
        # The activated half is fc, whatever the model's own names say.
        for target, rows in (("fc", "gate"), ("gate", "up")) if shape.gated_mlp else (("fc", ""),):
            yield from self._column(
                module + "linear_fc1",
                name + target,
                {rows: shape.ffn_hidden_size},
                shape.hidden_size,
                rank,
                shape.linear_bias,
            )
        yield from self._row(module + "linear_fc2", name + "proj", shape.hidden_size, shape.ffn_hidden_size, rank)

    def _column(
        self, module: str, name: str, rows: dict[str, int], inputs: int, rank: int, bias: bool
    ) -> Iterator[FileTensor]:
        """A layer whose outputs are sharded.

        Args:
            module: Megatron's name.
            name: Name in the file.
            rows: The groups of output rows that make the stored layer, in their order, with the size of each.
            inputs: In-features.
            rank: Tensor-parallel rank of the file.
            bias: Whether there is one.
        """
        scheme = self.schemes.get(module, UNQUANTIZED)
        fields = (*scheme.fields, _BIAS) if bias else scheme.fields
        for field in fields:
            dtype, axis = field.dtype or self.dtype, field.column_axis
            if axis is None:
                size = field.shape(sum(rows.values()), inputs, scheme.block_size)
                yield whole(Part(module, "", field.suffix, size, None), f"{name}.{field.suffix}", dtype)
                continue
            pieces = []
            for group, outputs in rows.items():
                size = field.shape(outputs, inputs, scheme.block_size)
                part = Part(module, group, field.suffix, size, axis)
                pieces.append((part, *self._row_share(group, size[axis], rank)))
            yield joined(f"{name}.{field.suffix}", dtype, pieces, axis)

    def _row_share(self, group: str, extent: int, rank: int) -> tuple[int, int]:
        """Which rows of a group a file has; KV heads are repeated where there are more files than heads."""
        kv, ranks = self.shape.num_query_groups, self.tensor_parallel
        if group in ("k", "v") and ranks > kv:
            return share(extent, rank * kv // ranks, kv)
        return share(extent, rank, ranks)

    def _row(self, module: str, name: str, outputs: int, inputs: int, rank: int) -> Iterator[FileTensor]:
        """A layer whose inputs are sharded."""
        scheme = self.schemes.get(module, UNQUANTIZED)
        fields = (*scheme.fields, _BIAS) if self.shape.linear_bias else scheme.fields
        for field in fields:
            dtype, axis = field.dtype or self.dtype, field.row_axis
            size = field.shape(outputs, inputs, scheme.block_size)
            part = Part(module, "", field.suffix, size, axis)
            if axis is None:
                yield whole(part, f"{name}.{field.suffix}", dtype)
            else:
                start, stop = share(size[axis], rank, self.tensor_parallel)
                yield joined(f"{name}.{field.suffix}", dtype, [(part, start, stop)], axis)

    def _experts(self, module: str, name: str, rank: int) -> Iterator[FileTensor]:
        """A mixture of experts: the experts' tensors are stacked, and the activated half of fc comes second."""
        shape, inner = self.shape, self.shape.ffn_hidden_size
        assert shape.num_experts
        router = Part(module + "router", "", "weight", (shape.num_experts, shape.hidden_size), None)
        yield whole(router, name + "router.weight", torch.float32)
        gated = (
            {"up": shape.ffn_hidden_size, "gate": shape.ffn_hidden_size}
            if shape.gated_mlp
            else {"": shape.ffn_hidden_size}
        )
        for expert_part, target in (("linear_fc1", "fc"), ("linear_fc2", "proj")):
            experts = []
            for expert in range(shape.num_experts):
                source = f"{module}experts.local_experts.{expert}.{expert_part}"
                if target == "fc":
                    experts.append(list(self._column(source, name + target, gated, shape.hidden_size, rank, False)))
                else:
                    experts.append(list(self._row(source, name + target, shape.hidden_size, inner, rank)))
            for same_field in zip(*experts, strict=True):
                yield _stacked(same_field)


_BIAS = Field("bias", None, lambda o, i, g: (o,), 0, None)


def _stacked(tensors: tuple[FileTensor, ...]) -> FileTensor:
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
