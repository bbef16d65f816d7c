# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Rank files opened lazily, one by one or merged into the tensors of the unsharded model."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from nemo_ptq.errors import PtqError
from nemo_ptq.verify import dequantize as dq
from nemo_ptq.verify.linear import Stack, Tensors, stored_linear
from nemo_ptq.verify.model_config import Config, load_json, parse_config
from nemo_ptq.verify.tensor_file import TensorFile
from nemo_ptq.verify.trtllm.expected_tensors import Shard, TensorSpec, rank_tensors, stages

# This format's names of a linear layer's fields.
_FIELDS = {
    "weight_scale": "weights_scaling_factor",
    "weight_scale_2": "weights_scaling_factor_2",
    "input_scale": "activation_scaling_factor",
    "pre_quant_scale": "prequant_scaling_factor",
}


def same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors are equal bit for bit; NaNs are compared like any other value."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return torch.equal(_bytes(left), _bytes(right))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def split_parts(tensor: torch.Tensor, shard: Shard) -> list[torch.Tensor]:
    """Cuts one rank's piece into the parts that are sharded on their own, in the order of ``shard.parts``."""
    unit = tensor.shape[shard.dim] // sum(part.share for part in shard.parts)
    return list(tensor.split([unit * part.share for part in shard.parts], dim=shard.dim))


def merge(pieces: Sequence[torch.Tensor], shard: Shard | None) -> torch.Tensor:
    """Puts the pieces of the tensor-parallel ranks together, as a single rank would hold them.

    Args:
        pieces: One tensor for each rank, in rank order, all of the same shape and dtype.
        shard: How they were cut; None takes the first piece.

    Returns:
        The global tensor: parts concatenated over the ranks, copies taken once, padding dropped.
    """
    if shard is None or len(pieces) == 1:
        return pieces[0]
    by_part = zip(*(split_parts(piece, shard) for piece in pieces), strict=True)
    merged = torch.cat(
        [piece for part, of_ranks in zip(shard.parts, by_part, strict=True) for piece in of_ranks[:: part.replicas]],
        dim=shard.dim,
    )
    return merged if shard.size is None else merged.narrow(shard.dim, 0, shard.size)


@dataclass(frozen=True)
class Checkpoint:
    """A qnemo directory seen as one unsharded model.

    Tensors are read and merged when asked for, so memory holds what the caller keeps. Names are those that a directory
    with a single rank would have: layers numbered through the pipeline, query, key and value rows of the ranks sorted
    into [all q; all k; all v], each key and value head once.
    """

    path: Path
    raw_config: dict[str, Any]
    config: Config

    @cached_property
    def rank_files(self) -> tuple[TensorFile, ...]:
        """The files of all ranks, in rank order."""
        return tuple(
            TensorFile(self.path / f"rank{rank}.safetensors") for rank in range(self.config.mapping.world_size)
        )

    def stage_files(self, pp_rank: int) -> tuple[TensorFile, ...]:
        """The files of one pipeline stage, in tensor-parallel order."""
        tp_size = self.config.mapping.tp_size
        return self.rank_files[pp_rank * tp_size : (pp_rank + 1) * tp_size]

    @cached_property
    def _locations(self) -> dict[str, tuple[int, str, TensorSpec]]:
        """Pipeline stage, name in its files and spec of every global tensor."""
        locations = {}
        for pp_rank, layers in stages(self.config):
            for local_name, spec in rank_tensors(self.config, pp_rank).items():
                if spec.optional:
                    continue
                name = _renumber(local_name, layers.start)
                locations[name] = (pp_rank, local_name, spec)
        return locations

    def __contains__(self, name: str) -> bool:
        return name in self._locations

    def names(self) -> Iterable[str]:
        """Names of the global tensors."""
        return self._locations.keys()

    def tensor(self, name: str) -> torch.Tensor:
        """Reads one global tensor in the files' dtype.

        Raises:
            PtqError: No such tensor, or a rank file lacks it or holds another shape or dtype.
        """
        if name not in self._locations:
            raise PtqError(f"{self.path}: config.json promises no tensor {name}")
        pp_rank, local_name, spec = self._locations[name]
        pieces = []
        for file in self.stage_files(pp_rank):
            found = file.header.get(local_name)
            if found != (spec.dtype, spec.shape):
                raise PtqError(f"{file.path.name}: {local_name} is {found}, expected {(spec.dtype, spec.shape)}")
            pieces.append(file.tensor(local_name))
        return merge(pieces, spec.shard)

    def linear(self, name: str, device: torch.device) -> Stack:
        """Reads a linear layer by its global name."""
        return (stored_linear(self._algorithm(name), lambda field: self._field(name, field, device)),)

    def experts(self, name: str, device: torch.device) -> list[Stack]:
        """Reads the same linear layer of every expert."""
        algorithm = self._algorithm(name.rpartition(".")[0])
        fields = {field: self._field(name, field, device) for field in ("weight", "weight_scale", "input_scale")}

        def field_of(expert: int, field: str) -> torch.Tensor | None:
            found = fields.get(field)
            return found if found is None or field == "input_scale" else found[expert]

        assert self.config.moe is not None
        return [(stored_linear(algorithm, partial(field_of, expert)),) for expert in range(self.config.moe.num_experts)]

    def kv_cache(self, layer: int, device: torch.device) -> tuple[Tensors, Tensors] | None:
        """Returns functions that round a layer's keys and values as its cache does."""
        algorithm = self.config.quantization.kv_cache_algorithm
        if algorithm is None:
            return None
        scale = self.tensor(f"transformer.layers.{layer}.attention.kv_cache_scaling_factor").to(device)
        quantize = partial({"FP8": dq.fake_quantize_fp8, "INT8": dq.fake_quantize_int8}[algorithm], scale=scale)
        return quantize, quantize

    def _algorithm(self, module: str) -> str | None:
        # Exclusion patterns match the names in the rank's file, where every stage counts its layers from 0.
        parts = module.split(".")
        if parts[:2] == ["transformer", "layers"]:
            parts[2] = str(int(parts[2]) % self.config.layers_per_stage)
        return self.config.quantization.algorithm_of(".".join(parts))

    def _field(self, name: str, field: str, device: torch.device) -> torch.Tensor | None:
        full = f"{name}.{_FIELDS.get(field, field)}"
        return self.tensor(full).to(device) if full in self else None


def _renumber(name: str, first_layer: int) -> str:
    """The global name of a tensor in the file of a pipeline stage whose first layer is ``first_layer``."""
    prefix = "transformer.layers."
    if not name.startswith(prefix):
        return name
    local, rest = name.removeprefix(prefix).split(".", 1)
    return f"{prefix}{first_layer + int(local)}.{rest}"


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Opens a qnemo directory; only config.json is read.

    Raises:
        PtqError: config.json is missing, unreadable, or lacks what the reader requires.
    """
    path = Path(path)
    raw = load_json(path / "config.json")
    return Checkpoint(path, raw, parse_config(raw))


def split_qkv(config: Config, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Splits a merged attention.qkv tensor (weight, bias or scale, rows first) into query, key and value rows."""
    rows = tensor.shape[0] // (config.num_attention_heads + 2 * config.num_key_value_heads)
    kv_rows = rows * config.num_key_value_heads
    query, key, value = tensor.split([rows * config.num_attention_heads, kv_rows, kv_rows])
    return query, key, value
