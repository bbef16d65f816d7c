# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of Megatron-LM and Megatron-Bridge, written by megatron-core: what is read, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nemo_ptq.checkpoint.metadata import read_metadata
from nemo_ptq.checkpoint.parts import TensorPart
from tests.megatron import ARGUMENTS, training_arguments, write_megatron_lm
from tests.ranks import run_ranks

Maker = Callable[..., Path]


@pytest.fixture(scope="module")
def megatron_lm(checkpoint_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """Writes what Megatron-LM leaves of a model of tests/families.py, once; not to be changed."""
    made: dict[tuple[object, ...], Path] = {}

    def make(name: str, layout: tuple[int, int] = (1, 1)) -> Path:
        if (name, layout) not in made:
            root = tmp_path_factory.mktemp("megatron") / name
            arguments = training_arguments(**ARGUMENTS[name])
            run_ranks(write_megatron_lm, layout[0] * layout[1], checkpoint_of(name), root, arguments, layout)
            made[name, layout] = root
        return made[name, layout]

    return make


def values_of(parts: list[TensorPart]) -> dict[str, torch.Tensor]:
    return {part.live_name: part.read() for part in parts}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_model_is_the_one_that_was_trained(
    name: str, megatron_lm: Maker, checkpoint_of: Callable[[str], Path]
) -> None:
    from nemo_ptq.checkpoint.megatron.model import MegatronModel
    from nemo_ptq.checkpoint.torch_dist import checkpoint_parts

    source, root = checkpoint_of(name), megatron_lm(name)
    assert read_metadata(root) == read_metadata(source)
    found, expected = values_of(MegatronModel(root).parts), values_of(checkpoint_parts(source))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
