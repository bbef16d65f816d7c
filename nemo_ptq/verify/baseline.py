# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The unquantized model to compare with, read tensor by tensor from a checkpoint, whatever its size.

A checkpoint has Megatron's names and order of rows; here they become those of a qnemo directory. The model's sizes are
taken from the exported directory, so both run through the same arithmetic and differ in their numbers only.
"""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from nemo_ptq.checkpoint.metadata import is_hugging_face
from nemo_ptq.errors import PtqError
from nemo_ptq.verify.config import Config
from nemo_ptq.verify.context import read_model_yaml
from nemo_ptq.verify.forward import open_model
from nemo_ptq.verify.reader import Checkpoint, Weights

# Reads a part of a stored tensor by its key and its (layer,) or (layer, expert); None where there is no such tensor.
ReadPart = Callable[[str, tuple[int, ...]], torch.Tensor | None]

_LAYER = re.compile(r"transformer\.layers\.(\d+)\.(.*)\.(weight|bias)")
_OUTSIDE = {
    "transformer.vocab_embedding.weight": "embedding.word_embeddings.weight",
    "transformer.position_embedding.weight": "embedding.position_embeddings.weight",
    "transformer.ln_f.weight": "decoder.final_layernorm.weight",
    "transformer.ln_f.bias": "decoder.final_layernorm.bias",
    "lm_head.weight": "output_layer.weight",
}
# Megatron fuses a norm into the linear layer after it, where it can.
_NORMS = {
    "input_layernorm": ("self_attention.linear_qkv.layer_norm_{}", "input_layernorm.{}"),
    "post_layernorm": ("mlp.linear_fc1.layer_norm_{}", "pre_mlp_layernorm.{}"),
}
_LINEARS = {
    "attention.qkv": "self_attention.linear_qkv",
    "attention.dense": "self_attention.linear_proj",
    "mlp.fc": "mlp.linear_fc1",
    "mlp.gate": "mlp.linear_fc1",
    "mlp.proj": "mlp.linear_fc2",
    "mlp.router": "mlp.router",
}


@dataclass(frozen=True)
class MegatronWeights:
    """A checkpoint's tensors under the names of a qnemo directory.

    Attributes:
        config: The model's sizes, unquantized and on one rank.
        zero_centered_norms: Whether norms are stored minus one.
        read: Gives the stored tensors.
    """

    config: Config
    zero_centered_norms: bool
    read: ReadPart

    def __contains__(self, name: str) -> bool:
        return self._find(name) is not None

    def tensor(self, name: str) -> torch.Tensor:
        """Reads one tensor.

        Raises:
            PtqError: The checkpoint has no such tensor.
        """
        found = self._find(name)
        if found is None:
            raise PtqError(f"the baseline holds nothing for {name}: it is another model than the exported one")
        return found

    def _find(self, name: str) -> torch.Tensor | None:
        if name in _OUTSIDE:
            return self._norm(name, self.read(_OUTSIDE[name], ()))
        match = _LAYER.fullmatch(name)
        if match is None:  # a scale
            return None
        layer, module, field = int(match[1]), match[2], match[3]
        if module in _NORMS:
            places = (f"decoder.layers.{place.format(field)}" for place in _NORMS[module])
            found = (self.read(place, (layer,)) for place in places)
            return self._norm(name, next((tensor for tensor in found if tensor is not None), None))
        if self.config.moe and module in ("mlp.fc", "mlp.proj"):
            return self._experts(layer, module, field, self.config.moe.num_experts)
        stored = self.read(f"decoder.layers.{_LINEARS[module]}.{field}", (layer,))
        return None if stored is None else self._rows(module, stored)

    def _norm(self, name: str, stored: torch.Tensor | None) -> torch.Tensor | None:
        if stored is None or not self.zero_centered_norms or not name.endswith(("norm.weight", "ln_f.weight")):
            return stored
        return stored.float() + 1.0

    def _rows(self, module: str, stored: torch.Tensor) -> torch.Tensor:
        """Sorts the rows of a fused linear layer."""
        if module == "attention.qkv":
            groups, heads = self.config.num_key_value_heads, self.config.num_attention_heads
            by_group = stored.unflatten(0, (groups, heads // groups + 2, self.config.head_size))
            return torch.cat([part.flatten(0, 2) for part in by_group.split([heads // groups, 1, 1], dim=1)])
        if self.config.gated and module in ("mlp.fc", "mlp.gate"):
            return stored.chunk(2)[module == "mlp.gate"]
        return stored

    def _experts(self, layer: int, module: str, field: str, count: int) -> torch.Tensor | None:
        key = f"decoder.layers.mlp.experts.experts.{_LINEARS[module].removeprefix('mlp.')}.{field}"
        experts = [self.read(key, (layer, expert)) for expert in range(count)]
        found = [expert for expert in experts if expert is not None]
        if not found:
            return None
        # A qnemo directory has [up; gate] of each expert.
        return torch.stack([expert.roll(len(expert) // 2, 0) if module == "mlp.fc" else expert for expert in found])


def open_baseline(path: Path, model: Checkpoint) -> Weights:
    """Opens the model to compare with.

    Args:
        path: A NeMo 2.0 checkpoint, a Hugging Face directory, or a qnemo directory.
        model: The exported directory.

    Raises:
        PtqError: If it is none of these.
    """
    if not is_hugging_face(path) and not (path / "context").is_dir():
        return open_model(path)
    config = replace(
        model.config,
        mapping=replace(model.config.mapping, world_size=1, tp_size=1, pp_size=1),
        quantization=replace(model.config.quantization, algorithm=None, kv_cache_algorithm=None),
    )
    zero_centered = bool(read_model_yaml(model.path)["config"].get("layernorm_zero_centered_gamma"))
    read = _hugging_face_parts(path) if is_hugging_face(path) else _nemo_parts(path / "weights")
    return MegatronWeights(config, zero_centered, read)


def _hugging_face_parts(path: Path) -> ReadPart:
    from nemo_ptq.quiet import quiet_imports

    with quiet_imports():
        from nemo_ptq.checkpoint.huggingface.importer import HuggingFaceModel

    parts = {(part.key, tuple(index for index, _ in part.position)): part for part in HuggingFaceModel(path).parts}

    def read(key: str, position: tuple[int, ...]) -> torch.Tensor | None:
        part = parts.get((key, position))
        return None if part is None else part.read()

    return read


def _nemo_parts(weights: Path) -> ReadPart:
    """Reads the chunks in which torch.distributed.checkpoint keeps a tensor, as far as they hold the part.

    The format: an index, and files in which each chunk lies as ``torch.save`` has written it.
    """
    index = FileSystemReader(weights).read_metadata()

    def load(place: Any) -> torch.Tensor:
        with (weights / place.relative_path).open("rb") as file:
            file.seek(place.offset)
            return torch.load(io.BytesIO(file.read(place.length)), weights_only=True)

    def read(key: str, position: tuple[int, ...]) -> torch.Tensor | None:
        name = f"module.{key}"
        stored = index.state_dict_metadata.get(name)
        if not isinstance(stored, TensorStorageMetadata):
            return None
        stacked = len(position)
        part = torch.empty(stored.size[stacked:], dtype=stored.properties.dtype)
        for chunk in stored.chunks:
            bounds = list(zip(chunk.offsets, chunk.sizes, strict=True))
            if all(start <= at < start + size for at, (start, size) in zip(position, bounds, strict=False)):
                whole = load(index.storage_data[MetadataIndex(name, chunk.offsets)])
                piece = whole[tuple(at - start for at, (start, _) in zip(position, bounds, strict=False))]
                part[tuple(slice(start, start + size) for start, size in bounds[stacked:])] = piece
        return part

    return read
