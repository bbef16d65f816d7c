# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The weights of a checkpoint read from its files are those that Megatron loads, whoever has written which shard."""

import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_ptq.checkpoint.index import Chunk, Stored, read_stored
from nemo_ptq.checkpoint.torch_dist import checkpoint_parts, read_chunk
from nemo_ptq.errors import PtqError
from nemo_ptq.models.mapping import live_name
from tests.ranks import run_ranks


def loaded_by_megatron(checkpoint: Path) -> dict[str, torch.Tensor]:
    """A model's weights through Megatron's own reader, not ours."""
    from megatron.core import dist_checkpointing

    from nemo_ptq.checkpoint.known_tensors import PREFIX
    from nemo_ptq.modelopt.megatron_layers import global_modules
    from tests import steps

    with steps.loaded(checkpoint) as model:
        for parameter in model.module.parameters():
            parameter.data.zero_()
        state = {"state_dict": model.module.sharded_state_dict(prefix=PREFIX)}
        read = dist_checkpointing.load(state, str(checkpoint / "weights"))["state_dict"]
        model.module.load_state_dict({key.removeprefix(PREFIX): value for key, value in read.items()}, strict=False)
        return {
            f"{name}.{kind}": tensor.clone()
            for name, module in global_modules(model.module).items()
            for kind, tensor in module.named_parameters(recurse=False)
        }


def save_in_shards(checkpoint: Path, directory: Path) -> None:
    """Writes a model's weights from two tensor-parallel ranks of two pipeline stages each."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    from nemo_ptq.checkpoint.known_tensors import PREFIX
    from nemo_ptq.export.sharded_model import InTurn
    from tests import steps

    with steps.loaded(checkpoint, 2, 2) as model:
        if steps.is_first():
            (directory / "weights").mkdir(parents=True)
        dist.barrier()
        state = {"sharded_state_dict": model.module.sharded_state_dict(prefix=PREFIX)}
        dist_checkpointing.save(state, str(directory / "weights"), InTurn())


@pytest.mark.parametrize("model", ["gemma", "mixtral", "starcoder", "gpt_swiglu"])
def test_parts_are_what_megatron_loads(model: str, checkpoint_of: Callable[[str], Path]) -> None:
    (expected,) = run_ranks(loaded_by_megatron, 1, checkpoint_of(model))
    found = {part.live_name: part for part in checkpoint_parts(checkpoint_of(model))}
    assert found.keys() == expected.keys()
    for name, part in found.items():
        tensor = part.read()
        assert (tuple(tensor.shape), tensor.dtype) == (part.shape, part.dtype)
        assert torch.equal(tensor.bfloat16(), expected[name]), name


def test_shards_of_several_ranks_are_put_together(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    run_ranks(save_in_shards, 4, checkpoint_of("llama31"), tmp_path)
    assert len(list((tmp_path / "weights").glob("*.distcp"))) == 4
    whole = {part.live_name: part.read() for part in checkpoint_parts(checkpoint_of("llama31"))}
    for part in checkpoint_parts(tmp_path):
        # Tensor parallelism pads the vocabulary.
        found = part.read()[: len(whole[part.live_name])]
        assert torch.equal(found, whole[part.live_name]), part.live_name


def test_the_index_knows_types_and_places(checkpoint_of: Callable[[str], Path]) -> None:
    tensors = read_stored(checkpoint_of("llama31")).tensors
    embedding = tensors["module.embedding.word_embeddings.weight"]
    assert embedding.dtype == "bfloat16"
    assert {chunk.offsets for chunk in embedding.chunks} == {(0, 0)}
    layers = tensors["module.decoder.layers.mlp.linear_fc2.weight"]
    assert len(layers.chunks) == layers.shape[0] > 1


def test_a_tensor_with_a_hole_is_refused(checkpoint_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from nemo_ptq.checkpoint import torch_dist

    def with_a_hole(checkpoint: Path) -> Stored:
        name = "module.output_layer.weight"
        return Stored({name: replace(read_stored(checkpoint).tensors[name], chunks=())}, {})

    monkeypatch.setattr(torch_dist, "read_stored", with_a_hole)
    (part,) = checkpoint_parts(checkpoint_of("llama31"))
    with pytest.raises(PtqError, match=r"holds 0 of the .* values of a tensor"):
        part.read()


def saved_chunk(value: Any, file: Path) -> Chunk:
    """A chunk as torch.distributed.checkpoint writes it, behind another one."""
    content = io.BytesIO()
    torch.save(value, content)
    file.write_bytes(b"x" * 100 + content.getvalue())
    return Chunk("weight", (0,), (3,), file.name, 100, len(content.getvalue()))


@pytest.mark.parametrize("value", [torch.randn(7, 9).bfloat16(), [None]], ids=["tensor", "object"])
def test_a_damaged_byte_of_any_record_is_found(value: Any, tmp_path: Path) -> None:
    file = tmp_path / "__0_0.distcp"
    chunk = saved_chunk(value, file)
    sound = file.read_bytes()
    read_chunk(tmp_path, chunk)
    with zipfile.ZipFile(io.BytesIO(sound[chunk.start :])) as archive:
        starts = {
            record.filename: chunk.start + record.header_offset + 30 + sum(struct.unpack_from("<HH", local, 26))
            for record in archive.infolist()
            if (local := sound[chunk.start + record.header_offset :])
        }
        sizes = {record.filename: record.file_size for record in archive.infolist()}
    for name, start in starts.items():
        for place in {start, start + sizes[name] - 1}:
            damaged = bytearray(sound)
            damaged[place] ^= 1
            file.write_bytes(damaged)
            with pytest.raises(PtqError, match=f"{file}: weight cannot be read .*: copy or save the checkpoint again"):
                read_chunk(tmp_path, chunk)


def test_a_file_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        chunk = saved_chunk(torch.arange(3.0), tmp_path / "__0_0.distcp")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_chunk(tmp_path, chunk), torch.arange(3.0))


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("decoder.layers.mlp.linear_fc1.layer_norm_bias", "decoder.layers.3.pre_mlp_layernorm.bias"),
        ("decoder.layers.self_attention.linear_qkv.layer_norm_weight", "decoder.layers.3.input_layernorm.weight"),
        ("decoder.layers.7.mlp.linear_fc2.weight", "decoder.layers.7.mlp.linear_fc2.weight"),
        ("decoder.final_layernorm.weight", "decoder.final_layernorm.weight"),
    ],
)
def test_names_are_those_of_the_model(key: str, name: str) -> None:
    assert live_name(key, 3) == name
