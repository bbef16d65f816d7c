# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Write a NeMo 2.0 checkpoint: `context/` and `weights/`, one tensor in memory at a time."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from nemo_ptq.checkpoint.known_tensors import PREFIX
from nemo_ptq.checkpoint.parts import TensorPart
from nemo_ptq.console.quiet import import_nemo
from nemo_ptq.models.state_space import StateSpace
from nemo_ptq.parallel.attributes import replaced
from nemo_ptq.parallel.megatron import CheckpointingConfig, ShardedObject, save_config

# Files that NeMo expects in a checkpoint beside the weights.
COMMON_STATE: Mapping[str, Any] = {
    "state_dict": {},
    "epoch": 0,
    "global_step": 0,
    "pytorch-lightning_version": version("lightning"),
    # Tells readers that layers are stacked (false) instead of named one by one.
    "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
}
# Default name of the layers in NeMo's configuration of models with state spaces.
_STACK_SPEC = "default_mamba_stack_spec"


def write_weights(directory: Path, parts: Sequence[TensorPart], state_space: StateSpace | None = None) -> None:
    """Write `weights/` of a NeMo 2.0 checkpoint in Megatron's torch_dist format.

    The names are those that a model with Transformer Engine layers has, `_extra_state` entries included.

    Args:
        directory: The directory to fill; made if it is missing.
        parts: Every part of every tensor.
        state_space: That of a hybrid, some of whose groups of rows are tensors of their own in NeMo's checkpoints.
    """
    groups = {} if state_space is None else state_space.rows
    stored = [own for part in parts for own in _with_rows_split(part, groups)]
    write_tensors(directory, stored, PREFIX, COMMON_STATE)


def _with_rows_split(part: TensorPart, groups: Mapping[str, Mapping[str, int]]) -> Iterator[TensorPart]:
    """Yields a tensor for each group of rows of a part, where it has several that are stored apart."""
    rows = next((rows for module, rows in groups.items() if f".{module}." in part.live_name), None)
    is_whole = part.key.endswith((".weight", ".bias"))
    if rows is None or not is_whole:
        yield part
        return
    first = 0
    for name, count in rows.items():
        which = slice(first, first + count)
        yield replace(part, key=f"{part.key}.{name}", shape=(count, *part.shape[1:]), read=partial(_rows, part, which))
        first += count


def _rows(part: TensorPart, which: slice) -> torch.Tensor:
    return part.read()[which].clone()


def write_tensors(directory: Path, parts: Sequence[TensorPart], prefix: str, common: Mapping[str, Any]) -> None:
    """Write a directory in Megatron's torch_dist format.

    Args:
        directory: The directory to fill; made if it is missing.
        parts: Every part of every tensor.
        prefix: Prefix of their names in the files.
        common: The state beside them, in ``common.pt``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    storage = dcp.FileSystemWriter(directory, thread_count=1)
    try:
        dcp.save({}, storage_writer=storage, planner=_LazyPlanner(parts, prefix), no_dist=True)
    except CheckpointException as error:  # wraps each rank's error
        (cause, _), *_ = error.failures.values()
        raise cause from None
    torch.save(dict(common), directory / "common.pt")
    save_config(CheckpointingConfig(sharded_backend="torch_dist"), str(directory))


def write_context(directory: Path, model: Any) -> None:
    """Write `context/` of a NeMo 2.0 checkpoint: io.json, model.yaml, the tokenizer's files.

    Nothing is built, so that options this machine lacks (Transformer Engine's fusions, say) can be written.

    Args:
        directory: The directory to fill; made if it is missing.
        model: Fiddle config of a NeMo GPTModel with `config` and `tokenizer`. A tokenizer directory that it names is
            copied next to io.json and named relative to it.
    """
    import_nemo()
    import fiddle as fdl
    from nemo.collections.llm.gpt.model import ssm
    from nemo.lightning import MegatronStrategy, Trainer
    from nemo.lightning.io.pl import TrainerContext

    strategy = fdl.Config(MegatronStrategy, ckpt_save_optimizer=False, always_save_context=True)
    trainer = fdl.Config(Trainer, devices=1, accelerator="cpu", strategy=strategy)
    context = TrainerContext.__new__(TrainerContext)
    context.__io__ = fdl.Config(TrainerContext, model=model, trainer=trainer, extra={})
    # Hugging Face objects are saved by walking from the context along the configuration's attributes.
    context.model = SimpleNamespace(
        config=SimpleNamespace(generation_config=getattr(model.config, "generation_config", None))
    )
    # NeMo looks this up where Megatron's Mamba cannot be imported as well; io.json does not have it.
    with nullcontext() if hasattr(ssm, _STACK_SPEC) else replaced(ssm, _STACK_SPEC, None):
        context.io_dump(directory, yaml_attrs=["model"])


class _LazyPlanner(dcp.DefaultSavePlanner):
    """Plans a save from shapes alone; a tensor is made when it is written, and dropped when the next one has been."""

    def __init__(self, parts: Sequence[TensorPart], prefix: str) -> None:
        super().__init__(flatten_state_dict=False)
        self._items = [_tensor_item(part, prefix) for part in parts]
        self._parts = {item.index: part for item, part in zip(self._items, parts, strict=True)}
        self._items += [_state_item(key) for part in parts for key in _extra_state_keys(part, prefix)]

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(self._items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(_EMPTY_STATE)
        part = self._parts[write_item.index]
        data = part.read()
        if (tuple(data.shape), data.dtype) != (part.shape, part.dtype):
            raise ValueError(f"{part.key}: planned {part.shape} {part.dtype}, got {tuple(data.shape)} {data.dtype}")
        return data.reshape((1,) * len(part.position) + part.shape)


def _tensor_item(part: TensorPart, prefix: str) -> WriteItem:
    offsets = torch.Size([index for index, _ in part.position] + [0] * len(part.shape))
    chunk = ChunkStorageMetadata(offsets=offsets, sizes=torch.Size((1,) * len(part.position) + part.shape))
    size = torch.Size([size for _, size in part.position] + list(part.shape))
    return WriteItem(
        index=MetadataIndex(prefix + part.key, offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(chunk=chunk, properties=TensorProperties(dtype=part.dtype), size=size),
    )


def _state_item(key: str) -> WriteItem:
    return WriteItem(
        index=MetadataIndex(key), type=WriteItemType.BYTE_IO, bytes_io_data=BytesIOWriteData(len(_EMPTY_STATE))
    )


# Megatron's names of such modules in a hybrid with state spaces.
_STATE_SPACE = ("in_proj", "out_proj", "final_norm")


def _extra_state_keys(part: TensorPart, prefix: str) -> list[str]:
    """Keys of the `_extra_state` entries of the modules that Transformer Engine would give this part's layer.

    Linear layers, attention and norms that are not fused into a linear layer carry FP8 metadata there. A loader that
    has such a module (Megatron's own linear layers included) fails when the entry is missing.
    """
    # If a projection's groups of rows are tensors of their own, the first one stands for it.
    module, _, parameter = part.key.removesuffix(".z").rpartition(".")
    parent, _, name = module.rpartition(".")
    has_state = name.startswith("linear_") or name.endswith("layernorm") or name in _STATE_SPACE
    if parameter != "weight" or not has_state:
        return []
    modules = [module, f"{parent}.core_attention"] if name == "linear_proj" else [module]
    position = part.position or ((0, 1),)
    shape, offset = tuple(size for _, size in position), tuple(index for index, _ in position)
    return [
        ShardedObject(f"{prefix}{module}._extra_state", None, shape, offset, replica_id=0).unique_key
        for module in modules
    ]


def _serialized(data: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(data, buffer)
    return buffer.getvalue()


# Megatron stores the objects of one key as a list; None stands for "no FP8 metadata".
_EMPTY_STATE = _serialized([None])
