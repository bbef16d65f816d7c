# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Blocks are read and dropped one by one, and every rank reads its own shards."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from nemo_ptq.checkpoint.blocks import Block, BlockLoader, parameters_of
from nemo_ptq.checkpoint.parts import TensorPart
from nemo_ptq.errors import PtqError
from nemo_ptq.parallel.ranks import Parallelism, Ranks
from tests.ranks import run_ranks

CPU = torch.device("cpu")
FC1, FC2 = "decoder.layers.0.mlp.linear_fc1", "decoder.layers.0.mlp.linear_fc2"
EXPERT = "decoder.layers.0.mlp.experts.local_experts.3.linear_fc2"


def part(key: str, values: torch.Tensor, *position: tuple[int, int]) -> TensorPart:
    return TensorPart(key, tuple(values.shape), values.dtype, lambda: values, position)


def block_of(shapes: Mapping[str, tuple[int, ...]]) -> Block:
    """A block whose modules have a weight each, without memory."""
    modules = {}
    for name, shape in shapes.items():
        modules[name] = torch.nn.Module()
        modules[name].register_parameter("weight", torch.nn.Parameter(torch.empty(shape, device="meta")))
        modules[name].register_parameter("bias", None)
    return Block(1, 0, modules)


def loaded(
    values: torch.Tensor, name: str, key: str, shape: tuple[int, ...], parallelism: Parallelism, gated: bool = False
) -> torch.Tensor:
    """A module's weight of a shape on one rank, read from a checkpoint that has these values of the whole."""
    block = block_of({name: shape})
    position = ((0, 1), (3, 4)) if name == EXPERT else ((0, 1),)
    BlockLoader([part(key, values, *position)], CPU, torch.bfloat16, parallelism, gated).load(block)
    (module,) = block.modules.values()
    return module.get_parameter("weight").detach()


def shard(rank: int, size: int) -> Parallelism:
    return Parallelism(tensor=Ranks(rank, size))


WHOLE = torch.arange(48.0).reshape(8, 6)


def test_outputs_and_inputs_are_cut() -> None:
    key1, key2 = "decoder.layers.mlp.linear_fc1.weight", "decoder.layers.mlp.linear_fc2.weight"
    for rank in range(2):
        rows = loaded(WHOLE, FC1, key1, (4, 6), shard(rank, 2))
        assert torch.equal(rows, WHOLE[4 * rank : 4 * rank + 4].bfloat16())
        columns = loaded(WHOLE, FC2, key2, (8, 3), shard(rank, 2))
        assert torch.equal(columns, WHOLE[:, 3 * rank : 3 * rank + 3].bfloat16())


def test_halves_of_a_gated_layer_are_cut_each() -> None:
    key = "decoder.layers.mlp.linear_fc1.weight"
    first = loaded(WHOLE, FC1, key, (4, 6), shard(0, 2), gated=True)
    second = loaded(WHOLE, FC1, key, (4, 6), shard(1, 2), gated=True)
    assert torch.equal(first, WHOLE[[0, 1, 4, 5]].bfloat16())
    assert torch.equal(second, WHOLE[[2, 3, 6, 7]].bfloat16())


def test_experts_are_cut_among_their_own_ranks() -> None:
    place = Parallelism(tensor=Ranks(1, 2), expert_tensor=Ranks(0, 1))
    key = "decoder.layers.mlp.experts.experts.linear_fc2.weight"
    assert torch.equal(loaded(WHOLE, EXPERT, key, (8, 6), place), WHOLE.bfloat16())


def test_padding_is_zero() -> None:
    """Seven rows of a vocabulary on three ranks of three."""
    rows, name = WHOLE[:7], "embedding.word_embeddings"
    found = []
    for rank in range(3):
        block = block_of({name: (3, 6)})
        BlockLoader([part(f"{name}.weight", rows)], CPU, torch.bfloat16, shard(rank, 3), False).load(block)
        found.append(block.modules[name].get_parameter("weight").detach())
    assert torch.equal(torch.cat(found), torch.cat([rows, torch.zeros(2, 6)]).bfloat16())


def test_a_tied_output_layer_is_the_embedding() -> None:
    block = block_of({"output_layer": (8, 6)})
    parts = [part("embedding.word_embeddings.weight", WHOLE)]
    BlockLoader(parts, CPU, torch.bfloat16, Parallelism(), False).load(block)
    assert torch.equal(block.modules["output_layer"].get_parameter("weight"), WHOLE.bfloat16())


def test_what_has_memory_is_left_alone_and_what_is_dropped_has_none() -> None:
    block = block_of({FC1: (8, 6)})
    reads: list[None] = []

    def read() -> torch.Tensor:
        reads.append(None)
        return WHOLE

    stored = TensorPart("decoder.layers.mlp.linear_fc1.weight", (8, 6), torch.float32, read, ((0, 1),))
    loader = BlockLoader([stored], CPU, torch.bfloat16, Parallelism(), False)
    find = parameters_of([block])
    loader.load(block)
    loader.load(block)
    assert len(reads) == 1
    first = find(f"{FC1}.weight")
    assert first is not None
    assert not first.requires_grad
    loader.drop(block)
    dropped = find(f"{FC1}.weight")
    assert dropped is not None
    assert (dropped.is_meta, dropped.shape, dropped.dtype) == (True, (8, 6), torch.bfloat16)
    loader.load(block)
    assert len(reads) == 2
    again = find(f"{FC1}.weight")
    assert again is not None
    assert torch.equal(again, first)


def test_parameters_are_found_by_name() -> None:
    find = parameters_of([block_of({FC1: (8, 6)}), block_of({FC2: (6, 8)})])
    assert [None if found is None else found.shape for found in map(find, (f"{FC2}.weight", f"{FC2}.bias"))] == [
        (6, 8),
        None,
    ]
    assert find("decoder.layers.1.mlp.linear_fc1.weight") is None


@pytest.mark.parametrize("shape", [(5, 6), (4, 3), (8, 7)])
def test_weights_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    key = "decoder.layers.mlp.linear_fc1.weight"
    place = shard(0, 1)
    with pytest.raises(PtqError, match=r"linear_fc1.weight has shape \(8, 6\) in the checkpoint"):
        loaded(WHOLE, FC1, key, shape, place)


def test_a_missing_tensor_is_named() -> None:
    with pytest.raises(PtqError, match=f"the checkpoint has no {FC1}.weight, which the model needs"):
        BlockLoader([], CPU, torch.bfloat16, Parallelism(), False).load(block_of({FC1: (8, 6)}))


def blocks(checkpoint: Path, pp: int, ep: int) -> list[tuple[int, int, set[str]]]:
    """Index, place and parameters of each block of this rank, and that they are all of the model's."""
    from nemo_ptq.checkpoint.loading import open_model
    from tests import steps

    with steps.loaded(checkpoint, pp=pp, ep=ep):
        model = open_model(checkpoint, CPU)
        assert all(parameter.is_meta for parameter in model.module.parameters())
        found = [(block.index, block.place, {name for name, _, _ in block.parameters()}) for block in model.blocks]
        assert sum(len(names) for _, _, names in found) == len(list(model.module.parameters()))
        return found


def test_stages_have_the_blocks_of_one_rank_between_them(checkpoint_of: Callable[[str], Path]) -> None:
    (alone,) = run_ranks(blocks, 1, checkpoint_of("llama31"), 1, 1)
    first, second = run_ranks(blocks, 2, checkpoint_of("llama31"), 2, 1)
    assert [index for index, _, _ in alone] == [0, 1, 2, 3]
    assert [place for _, place, _ in alone[1:3]] == [0, 1]
    # The place counts from the stage's own first layer.
    assert [(index, place) for index, place, _ in second] == [(2, 0), (3, 1)]
    assert [(index, names) for index, _, names in first + second] == [(index, names) for index, _, names in alone]


def test_experts_are_counted_through_the_model(checkpoint_of: Callable[[str], Path]) -> None:
    (alone,) = run_ranks(blocks, 1, checkpoint_of("mixtral"), 1, 1)
    first, second = run_ranks(blocks, 2, checkpoint_of("mixtral"), 1, 2)
    for (_, _, whole), (_, _, one), (_, _, other) in zip(alone, first, second, strict=True):
        assert one | other == whole
        assert not any(".local_experts." in name for name in one & other)
