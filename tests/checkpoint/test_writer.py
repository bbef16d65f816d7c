# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The checkpoint writer: what Megatron reads back, bounded memory."""

import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata

from nemo_ptq.checkpoint.parts import TensorPart
from nemo_ptq.checkpoint.writer import write_weights
from nemo_ptq.parallel.process_groups import Launch, process_groups


@pytest.fixture(scope="module", autouse=True)
def single_rank() -> Iterator[None]:
    """Megatron's reader asks for its rank."""
    with process_groups(Launch(0, 1, 0), torch.device("cpu")):
        yield


def _part(key: str, tensor: torch.Tensor, *position: tuple[int, int]) -> TensorPart:
    return TensorPart(key, tuple(tensor.shape), tensor.dtype, lambda: tensor, position)


def test_megatron_reads_back_what_was_written(tmp_path: Path) -> None:
    embedding = torch.randn(5, 4, dtype=torch.bfloat16)
    layers = torch.randn(3, 4, 2, dtype=torch.float16)
    experts = torch.randn(3, 2, 4)
    write_weights(
        tmp_path / "weights",
        [
            _part("embedding.word_embeddings.weight", embedding),
            *(_part("decoder.layers.mlp.linear_fc2.weight", layers[i], (i, 3)) for i in range(3)),
            *(_part("decoder.layers.bias", experts[i, e], (i, 3), (e, 2)) for i in range(3) for e in range(2)),
        ],
    )
    read = dist_checkpointing.load_plain_tensors(str(tmp_path / "weights"))
    stored = {
        "module.embedding.word_embeddings.weight": embedding,
        "module.decoder.layers.mlp.linear_fc2.weight": layers,
        "module.decoder.layers.bias": experts,
    }
    assert stored.keys() <= read.keys()
    for key, tensor in stored.items():
        assert read[key].dtype == tensor.dtype
        assert torch.equal(read[key], tensor)


def test_has_the_files_of_a_nemo_checkpoint(tmp_path: Path) -> None:
    write_weights(tmp_path / "weights", [_part("decoder.final_layernorm.weight", torch.ones(2))])
    names = {file.name for file in (tmp_path / "weights").iterdir()}
    assert names == {".metadata", "metadata.json", "common.pt", "__0_0.distcp"}
    assert dist_checkpointing.check_is_distributed_checkpoint(str(tmp_path / "weights"))
    assert dist_checkpointing.load_content_metadata(str(tmp_path / "weights"))["singleton_local_shards"] is False


def test_extra_states_are_those_of_transformer_engine_layers(tmp_path: Path) -> None:
    keys = [
        "embedding.word_embeddings.weight",
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.self_attention.linear_qkv.weight",
        "decoder.layers.self_attention.linear_qkv.bias",
        "decoder.layers.self_attention.linear_proj.weight",
        "decoder.layers.pre_mlp_layernorm.weight",
        "decoder.layers.mlp.router.weight",
        "decoder.layers.mlp.experts.experts.linear_fc1.weight",
        "decoder.final_layernorm.weight",
        "output_layer.weight",
    ]

    def position(key: str) -> tuple[tuple[int, int], ...]:
        expert = ((0, 1),) if ".experts." in key else ()
        return ((0, 1), *expert) if ".layers." in key else ()

    write_weights(tmp_path / "weights", [_part(key, torch.ones(2), *position(key)) for key in keys])
    metadata = load_sharded_metadata(str(tmp_path / "weights"))
    assert {key for key, entry in metadata.items() if isinstance(entry, ShardedObject)} == {
        "module.decoder.layers.self_attention.linear_qkv._extra_state/shard_0_1",
        "module.decoder.layers.self_attention.linear_proj._extra_state/shard_0_1",
        "module.decoder.layers.self_attention.core_attention._extra_state/shard_0_1",
        "module.decoder.layers.pre_mlp_layernorm._extra_state/shard_0_1",
        "module.decoder.layers.mlp.experts.experts.linear_fc1._extra_state/shard_0.0_1.1",
        "module.decoder.final_layernorm._extra_state/shard_0_1",
    }


def test_extra_states_can_be_loaded_and_are_empty(tmp_path: Path) -> None:
    write_weights(tmp_path / "weights", [_part("decoder.layers.mlp.linear_fc2.weight", torch.ones(2), (0, 1))])
    wanted = ShardedObject("module.decoder.layers.mlp.linear_fc2._extra_state", None, (1,), (0,), replica_id=0)
    assert dist_checkpointing.load({"state": wanted}, str(tmp_path / "weights"))["state"] is None


def test_no_more_than_the_tensor_before_is_alive_when_one_is_read(tmp_path: Path) -> None:
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    seen = []

    def read() -> torch.Tensor:
        seen.append(len(alive))
        tensor = torch.zeros(64, 64)
        alive.add(tensor)
        return tensor

    parts = [TensorPart("decoder.layers.weight", (64, 64), torch.float32, read, ((i, 12),)) for i in range(12)]
    write_weights(tmp_path / "weights", parts)
    assert len(seen) == 12
    assert max(seen) <= 1


def test_a_tensor_that_is_not_as_planned_is_an_error(tmp_path: Path) -> None:
    part = TensorPart("decoder.final_layernorm.weight", (2,), torch.bfloat16, lambda: torch.ones(2))
    with pytest.raises(ValueError, match=r"decoder\.final_layernorm\.weight: planned"):
        write_weights(tmp_path / "weights", [part])
