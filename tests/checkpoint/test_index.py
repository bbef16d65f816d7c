# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The index of a checkpoint's weights: what it says is held against itself before anything is counted by it."""

import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_ptq.checkpoint.index import read_stored
from nemo_ptq.checkpoint.torch_dist import checkpoint_parts, read_box, read_part
from nemo_ptq.errors import ConfigError, PtqError
from tests.conftest import Demo

NAME = "module.decoder.layers.mlp.linear_fc2.weight"


@pytest.fixture
def checkpoint(demo: Demo, tmp_path: Path) -> Path:
    """The demo's weights with an index of their own."""
    weights = Path(shutil.copytree(demo.checkpoint / "weights", tmp_path / "weights", copy_function=os.link))
    (weights / ".metadata").unlink()
    shutil.copy(demo.checkpoint / "weights" / ".metadata", weights)
    return tmp_path


def change(checkpoint: Path, how: Callable[[Any], object]) -> None:
    file = checkpoint / "weights" / ".metadata"
    index = pickle.loads(file.read_bytes())
    how(index)
    file.write_bytes(pickle.dumps(index))


def _entry(**changes: Any) -> Callable[[Any], object]:
    """Changes what the index says of a tensor."""

    def how(index: Any) -> None:
        index.state_dict_metadata[NAME] = replace(index.state_dict_metadata[NAME], **changes)

    return how


def _place(**changes: Any) -> Callable[[Any], object]:
    """Changes where one of its chunks lies."""

    def how(index: Any) -> None:
        key = next(key for key in index.storage_data if key.fqn == NAME)
        index.storage_data[key] = replace(index.storage_data[key], **changes)

    return how


def _chunk(**changes: Any) -> Callable[[Any], object]:
    def how(index: Any) -> None:
        entry = index.state_dict_metadata[NAME]
        entry.chunks[0] = replace(entry.chunks[0], **changes)

    return how


DAMAGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "too many layers": (_entry(size=torch.Size([10**6, 256, 768])), "is larger than its chunks"),
    "far too many layers": (_entry(size=torch.Size([10**12, 256, 768])), "is larger than its chunks"),
    "layers of nothing": (_entry(size=torch.Size([10**12, 0])), "has chunks of other axes than its own"),
    "empty layers": (_entry(size=torch.Size([10**12, 0, 1])), "is empty, and has an axis of 1000000000000"),
    "sizes as text": (_entry(size=("4", 256, 768)), "has sizes that are no whole numbers"),
    "sizes of half": (_entry(size=(4, 256, 0.5)), "has sizes that are no whole numbers"),
    "a negative size": (_chunk(sizes=torch.Size([1, 256, 768]), offsets=(-1, 0, 0)), "sizes that are no whole numbers"),
    "other axes": (_entry(size=torch.Size([4, 256 * 768])), "has chunks of other axes than its own"),
    "a chunk that is larger than its bytes": (_place(length=100), "lacks a place for all of"),
    "a negative place": (_place(offset=-1), "holds nothing at (-1"),
    "another directory": (_place(relative_path="../../secret"), "has a file that names '../../secret'"),
    "no name": (_place(relative_path=7), "cannot be read"),
    "nothing": (lambda index: setattr(index, "state_dict_metadata", None), "cannot be read"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("damage", DAMAGES)
def test_sizes_and_places_that_cannot_be_are_refused_in_a_line(damage: str, checkpoint: Path) -> None:
    how, reason = DAMAGES[damage]
    change(checkpoint, how)
    with pytest.raises(ConfigError) as caught:
        read_stored(checkpoint)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{checkpoint}/weights/.metadata ")
    assert reason in problem
    assert "\n" not in problem


@pytest.mark.parametrize("content", [b"", b"\x80\x04N.", b"\x80\x04cos\nsystem\n.", b"x" * 1000])
def test_what_is_no_index_is_refused_in_a_line(content: bytes, checkpoint: Path) -> None:
    (checkpoint / "weights" / ".metadata").write_bytes(content)
    with pytest.raises(ConfigError, match=r"\.metadata cannot be read") as caught:
        read_stored(checkpoint)
    assert "\n" not in str(caught.value)


def test_a_data_type_is_one_of_torchs(checkpoint: Path) -> None:
    file = checkpoint / "weights" / ".metadata"
    file.write_bytes(file.read_bytes().replace(b"bfloat16", b"cholesky"))
    with pytest.raises(PtqError, match="a tensor of the checkpoint is of cholesky, which torch does not have"):
        checkpoint_parts(checkpoint)


def test_a_box_is_what_stands_there_in_the_tensor(checkpoint: Path) -> None:
    tensor, weights = read_stored(checkpoint).tensors[NAME], checkpoint / "weights"
    whole = read_part(weights, tensor)
    for offsets, sizes in [((0, 0, 0), tensor.shape), ((1, 10, 20), (2, 30, 40)), ((3, 255, 0), (1, 1, 768))]:
        box = read_box(weights, tensor, offsets, sizes, torch.device("cpu"))
        expected = whole[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))]
        assert torch.equal(box, expected)
    with pytest.raises(PtqError, match="holds 0 of the 1 values of a tensor"):
        read_box(weights, tensor, (4, 0, 0), (1, 1, 1), torch.device("cpu"))
