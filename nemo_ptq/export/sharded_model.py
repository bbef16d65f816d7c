# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A calibrated Megatron model in Megatron's torch_dist format: weights that are not packed, quantizers beside them.

``modelopt_state/`` says that there are quantizers, the modules' ``_extra_state`` entries what each of them does, and
their amaxes are tensors like any other.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from modelopt.torch.opt.plugins.mcore_dist_checkpointing import save_sharded_modelopt_state
from torch.distributed import checkpoint as dcp

from nemo_ptq.checkpoint.loading import LoadedModel

_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


class InTurn(TorchDistSaveShardedStrategy):
    """Writes this rank's shards one after the other; Megatron's own writer copies them all, and starts processes."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> None:
        """Writes what Megatron has left in the state dict after the common state."""
        state, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, keep_only_main_replica=True)
        dcp.save(
            mcore_to_pyt_state_dict(state, False),
            storage_writer=dcp.FileSystemWriter(checkpoint_dir, thread_count=1),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


def _without_padding(entry: Any, prefix: str, vocab_size: int) -> Any:
    """Leaves out the rows of an embedding or output layer that only this tensor parallelism pads.

    What is left need not divide among the ranks, so the first of them writes it whole.
    """
    is_vocabulary = isinstance(entry, ShardedTensor) and entry.key.removeprefix(prefix) in _VOCABULARY
    if not is_vocabulary or entry.global_shape[0] == vocab_size:
        return entry
    group = parallel_state.get_tensor_model_parallel_group()
    shards = [torch.empty_like(entry.data) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shards, entry.data.contiguous(), group=group)
    rows = torch.cat(shards)[:vocab_size]
    stage, _, copy = entry.replica_id
    return replace(
        entry,
        data=rows,
        local_shape=tuple(rows.shape),
        global_shape=tuple(rows.shape),
        global_offset=(0, 0),
        axis_fragmentations=(1, 1),
        replica_id=(stage, dist.get_rank(group), copy),
    )


def write_sharded_model(
    model: LoadedModel,
    directory: Path,
    prefix: str,
    common: Mapping[str, Any],
    write_documents: Callable[[], None],
) -> list[Path]:
    """Writes a model; every rank calls it.

    Args:
        model: This rank's part of the model, with its quantizers; tensors are stored in its data type.
        directory: Directory to make, in one that exists and that all ranks see.
        prefix: Prefix of the tensors' names in the files.
        common: Content of ``common.pt``.
        write_documents: Writes the rest of the checkpoint; rank 0 calls it.

    Returns:
        The files that this rank has written.
    """
    if dist.get_rank() == 0:
        directory.mkdir()
        write_documents()
    dist.barrier()
    sharded = model.module.sharded_state_dict(prefix=prefix)
    with torch.no_grad():
        whole = {key: _without_padding(entry, prefix, model.vocab_size) for key, entry in sharded.items()}
    dist_checkpointing.save({**common, "sharded_state_dict": whole}, str(directory), InTurn())
    save_sharded_modelopt_state([model.module], str(directory), InTurn())
    return sorted(directory.glob(f"__{dist.get_rank()}_*.distcp"))
