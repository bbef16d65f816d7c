# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The layout table of a Hugging Face directory: its tensors, under the names that transformers has for them.

The names are those of the import, read the other way round (:mod:`nemo_ptq.models.mapping`). How a
linear layer is stored is a table of the format's own: this one serves every format whose files are such a directory.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from nemo_ptq.export.layout import Block, FileTensor, Part, joined, whole
from nemo_ptq.models.layers import ModuleSpec
from nemo_ptq.models.mapping import is_linear
from nemo_ptq.models.spec import ModelSpec
from nemo_ptq.quantization.schemes import UNQUANTIZED, Field, Scheme, Shape

# A file is closed when it would exceed this, as transformers does; a block is never split.
MAX_FILE_BYTES = 5_000_000_000
BIAS = Field("bias", None, lambda o, i, g: (o,), 0, None)
_VOCABULARY = ("embedding.word_embeddings", "output_layer")

# Hugging Face's name of each group of rows of a module. Groups with one name follow each other in one layer.
Names = Mapping[str, str]


@dataclass(frozen=True)
class HuggingFaceLayout:
    """The files of one Hugging Face directory.

    Attributes:
        shape: The model.
        names: Hugging Face's names of its modules, as
            :meth:`~nemo_ptq.models.hugging_face.HuggingFaceClass.module_names` gives them.
        schemes: Scheme of each quantized linear layer, by Megatron's name; the others are unquantized.
        fields: Gives the tensors that store a linear layer, from its Megatron name, the group of its rows and its
            scheme. A field's name is both the packed tensor's and the stored one's.
        kv_fields: The scales of a quantized KV cache, by the rows whose layer they belong to ("k" and "v").
        kv_name: Gives the name of such a scale, from that of the layer and that of the field.
        kv_cache: Megatron's names of the core attention modules whose KV cache is quantized.
        dtype: Data type of what stays unquantized.
        vocab_size: Rows of the embedding that are stored.
        max_file_bytes: Largest size of a file of several blocks.
    """

    shape: ModelSpec
    names: Mapping[str, Names]
    schemes: Mapping[str, Scheme]
    fields: Callable[[str, str, Scheme], Sequence[Field]]
    kv_fields: Mapping[str, Field]
    kv_name: Callable[[str, str], str]
    kv_cache: frozenset[str]
    dtype: torch.dtype
    vocab_size: int
    max_file_bytes: int = field(default_factory=lambda: MAX_FILE_BYTES)

    @cached_property
    def _blocks(self) -> list[Block]:
        middle = [list(self._layer(layer)) for layer in range(self.shape.num_layers)]
        return [list(self._embedding()), *middle, list(self._head())]

    @cached_property
    def _file_of_block(self) -> list[int]:
        file, filled, result = 0, 0, []
        for block in self._blocks:
            size = sum(tensor.dtype.itemsize * torch.Size(tensor.shape).numel() for tensor in block)
            if filled and filled + size > self.max_file_bytes:
                file, filled = file + 1, 0
            filled += size
            result.append(file)
        return result

    @property
    def files(self) -> Sequence[str]:
        """Names of the files, as transformers numbers them."""
        count = self._file_of_block[-1] + 1
        if count == 1:
            return ["model.safetensors"]
        return [f"model-{file + 1:05}-of-{count:05}.safetensors" for file in range(count)]

    def metadata(self, file: int) -> Mapping[str, str]:
        """Entries that transformers requires in a file's header."""
        return {"format": "pt"}

    def blocks(self, file: int) -> Iterator[Block]:
        """Yields the blocks of a file, empty ones included: embedding, every layer of the model, and the head."""
        for block, home in zip(self._blocks, self._file_of_block, strict=True):
            yield block if home == file else []

    @property
    def index(self) -> dict[str, object]:
        """model.safetensors.index.json: which file holds which tensor."""
        files = {
            tensor.name: self.files[home]
            for block, home in zip(self._blocks, self._file_of_block, strict=True)
            for tensor in block
        }
        size = sum(t.dtype.itemsize * torch.Size(t.shape).numel() for block in self._blocks for t in block)
        return {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))}

    def unquantized(self, embeddings: bool) -> list[str]:
        """Hugging Face's names of the linear layers that are not quantized, the output layer and routers included.

        Args:
            embeddings: Whether to name the embeddings as well.
        """
        kinds = ("router", "output_layer", *(["_embeddings"] if embeddings else []))
        found = {
            name.format(**numbers)
            for template, names in self.names.items()
            if is_linear(template) or template.endswith(kinds)
            for numbers in self._numbers(template)
            if template.format(**numbers) not in self.schemes
            for name in names.values()
        }
        return sorted(found)

    def quantized(self) -> dict[str, Scheme]:
        """The scheme of each quantized linear layer, by Hugging Face's name."""
        found = {
            name.format(**numbers): self.schemes[template.format(**numbers)]
            for template, names in self.names.items()
            for numbers in self._numbers(template)
            if template.format(**numbers) in self.schemes
            for name in names.values()
        }
        return dict(sorted(found.items()))

    def _numbers(self, template: str) -> Iterator[dict[str, int]]:
        layers = range(self.shape.num_layers) if "{layer}" in template else range(1)
        experts = range(self.shape.num_experts or 0) if "{expert}" in template else range(1)
        for layer in layers:
            for expert in experts:
                if self.shape.has(template.format(layer=layer, expert=expert)):
                    yield {"layer": layer, "expert": expert}

    def row_groups(self, module: str) -> Sequence[str]:
        """The groups of rows of a linear layer that are stored as layers of their own; "" alone where it stays one."""
        names = self._names(module)
        return list(names) if len(set(names.values())) > 1 else [""]

    def splits_rows(self, module: str) -> bool:
        """Whether the rows of a linear layer are stored in another order than Megatron's."""
        return len(self._names(module)) > 1

    def _names(self, module: str) -> Names:
        spec = self.shape.module(module)
        template = module.replace(module.split(".")[2], "{layer}", 1)
        if spec.expert is not None:
            template = template.replace(f".{spec.expert}.", ".{expert}.", 1)
        return self.names[template]

    def _plain(
        self, module: str, name: str, shape: Shape, axis: int | None, bias: bool = False
    ) -> Iterator[FileTensor]:
        """An unquantized weight, and a bias of as many elements as it has rows."""
        part = Part(module, "", "weight", shape, axis)
        stored = self.vocab_size if module in _VOCABULARY else shape[0]
        yield joined(f"{name}.weight", self.dtype, [(part, 0, stored)], 0)
        if bias:
            yield whole(Part(module, "", "bias", shape[:1], None), f"{name}.bias", self.dtype)

    def _embedding(self) -> Iterator[FileTensor]:
        shape, words = self.shape, "embedding.word_embeddings"
        yield from self._plain(words, self.names[words][""], (shape.vocab_size, shape.hidden_size), 0)
        positions = self.names.get("embedding.position_embeddings")
        if positions is not None:
            size = (shape.seq_length, shape.hidden_size)
            yield from self._plain("embedding.position_embeddings", positions[""], size, None)

    def _head(self) -> Iterator[FileTensor]:
        shape = self.shape
        norm = "decoder.final_layernorm"
        has_bias = shape.normalization == "LayerNorm"
        yield from self._plain(norm, self.names[norm][""], (shape.hidden_size,), None, has_bias)
        if not shape.tied_embeddings:
            yield from self._plain(
                "output_layer", self.names["output_layer"][""], (shape.vocab_size, shape.hidden_size), 0
            )

    def _layer(self, layer: int) -> Iterator[FileTensor]:
        for template in self.names:
            if "{layer}" not in template:
                continue
            for numbers in self._numbers(template):
                if numbers["layer"] == layer:
                    yield from self._module(template, numbers)

    def _module(self, template: str, numbers: Mapping[str, int]) -> Iterator[FileTensor]:
        module = template.format(**numbers)
        spec = self.shape.module(module)
        names = {rows: name.format(**numbers) for rows, name in self.names[template].items()}
        if spec.kind in ("conv", "state") or (spec.kind == "norm" and spec.axis == 0):
            yield from self._of_state_space(module, spec, next(iter(names.values())))
            return
        if spec.kind != "linear":
            yield from self._plain(module, names[""], spec.shape, None, spec.has_bias)
            return
        for name in dict.fromkeys(names.values()):
            yield from self._linear(module, spec, [rows for rows, other in names.items() if other == name], name)
        attention = module.replace("linear_qkv", "core_attention")
        if attention in self.kv_cache:
            for rows, scale in self.kv_fields.items():
                name = self.kv_name(names[rows], scale.suffix)
                yield whole(Part(attention, "", scale.suffix, scale.shape(0, 0, 1), None), name, torch.float32)

    def _of_state_space(self, module: str, spec: ModuleSpec, name: str) -> Iterator[FileTensor]:
        """What a state space has beside linear layers, of which ranks share the rows of each group."""
        dtype = torch.float32 if spec.kind == "state" else self.dtype
        for parameter in (*spec.parameters, *(["bias"] if spec.has_bias else [])):
            pieces = []
            for rows in spec.rows:
                shape = spec.shape_of(rows)
                part = Part(module, rows, parameter, shape[:1] if parameter == "bias" else shape, 0)
                pieces.append((part, 0, shape[0]))
            yield joined(f"{name}.{parameter}", dtype, pieces, 0)

    def _linear(self, module: str, spec: ModuleSpec, groups: Sequence[str], name: str) -> Iterator[FileTensor]:
        """A linear layer, or the part of one that is stored as a layer of its own.

        Args:
            module: Megatron's name.
            spec: The layer.
            groups: The groups of its rows that are stored here, one after the other.
            name: Hugging Face's name.
        """
        scheme = self.schemes.get(module, UNQUANTIZED)
        shares_rows = spec.axis == 0
        rows = groups[0] if len(groups) == 1 else ""
        for stored in (*self.fields(module, rows, scheme), *([BIAS] if spec.has_bias else [])):
            axis = stored.axis(shares_rows)
            dtype = stored.dtype or self.dtype
            target = f"{name}.{stored.suffix}"
            # What is the same for all rows is packed once.
            is_cut = shares_rows and stored.column_axis is not None
            pieces = []
            for group in groups if is_cut else [rows if stored.each_group else ""]:
                outputs = spec.outputs(group if is_cut else rows)
                size = stored.shape(outputs, spec.inputs, scheme.block_size)
                pieces.append(
                    (Part(module, group, stored.suffix, size, axis), 0, size[axis] if axis is not None else 0)
                )
            yield whole(pieces[0][0], target, dtype) if axis is None else joined(target, dtype, pieces, axis)
