# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A model computed block by block is the model, wherever its stages and shards are."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.ranks import run_ranks


def both_ways(checkpoint: Path, tp: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """This rank's logits of batches of several sizes, block by block and all at once."""
    from nemo_ptq.calibration.forward import forward_batches
    from nemo_ptq.calibration.streams import BlockRunner, Stream
    from tests import steps

    with steps.loaded(checkpoint, tp) as model:
        stream = Stream(steps.random_batches())
        runner = BlockRunner(model.module, steps.CPU, model.parallelism, steps.CPU)
        for block in model.blocks[:-1]:
            runner.advance(block, stream)
        expected = [output for output in forward_batches(model.module, stream.tokens) if output is not None]
        return [runner.logits(states) for states in stream.hidden], expected


# Rotary scaling; a scaled, tied embedding; learned positions; experts.
@pytest.mark.parametrize("model", ["llama31", "gemma", "starcoder", "mixtral"])
def test_block_by_block_is_all_at_once(model: str, checkpoint_of: Callable[[str], Path]) -> None:
    ((found, expected),) = run_ranks(both_ways, 1, checkpoint_of(model), 1)
    assert len(found) == 5
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_over_shards(checkpoint_of: Callable[[str], Path]) -> None:
    for found, expected in run_ranks(both_ways, 2, checkpoint_of("llama31"), 2):
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours, theirs)


def over_stages(checkpoint: Path) -> torch.Tensor | None:
    """The logits of a model on two stages, between which hidden states travel; None on the first."""
    from nemo_ptq.calibration.streams import BlockRunner, Stream
    from tests import steps

    with steps.loaded(checkpoint, 1, 2) as model:
        runner = BlockRunner(model.module, steps.CPU, model.parallelism, steps.CPU)
        stream = Stream(steps.random_batches())
        if model.parallelism.stage == 1:
            runner.receive(stream)
            for block in model.blocks[:-1]:
                runner.advance(block, stream)
            return torch.cat([runner.logits(states).flatten() for states in stream.hidden])
        for block in model.blocks:
            runner.advance(block, stream)
        runner.send(stream)
        assert stream.hidden == []
        return None


def test_over_stages(checkpoint_of: Callable[[str], Path]) -> None:
    ((found, _),) = run_ranks(both_ways, 1, checkpoint_of("llama31"), 1)
    first, second = run_ranks(over_stages, 2, checkpoint_of("llama31"))
    assert first is None
    assert torch.equal(second, torch.cat([logits.flatten() for logits in found]))
