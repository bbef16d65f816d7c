# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts in the block pipeline: spreading them over ranks changes nothing, idle ones get sound amaxes."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nemo_ptq.config import QuantizationConfig
from nemo_ptq.verify.trtllm.trtllm_reader import open_checkpoint, same_bytes
from tests.ranks import run_ranks

LAYERS, EXPERTS, CHOSEN = 2, 8, 2


def learn(
    checkpoint: Path, layout: tuple[int, ...], tokens: list[list[int]] | None
) -> tuple[Counter[tuple[int, int]], dict[str, float]]:
    """Calibrates a mixture of experts.

    Args:
        checkpoint: The model.
        layout: TP, PP and EP.
        tokens: One batch; None takes the usual ones.

    Returns:
        The tokens that each expert saw, and the amax of each expert's inputs.
    """
    from tests import steps

    batches = None if tokens is None else [torch.tensor(tokens)]
    counts: Counter[tuple[int, int]] = Counter()
    with steps.loaded(checkpoint, *layout) as model:
        state = steps.learn(model, QuantizationConfig("fp8"), batches, counts=counts).tensors
    amaxes = {name.partition(".input_quantizer")[0]: float(amax) for name, amax in state.items() if "experts" in name}
    return counts, amaxes


def export(checkpoint: Path, layout: tuple[int, ...], directory: Path) -> None:
    from tests import steps

    steps.run_job(steps.job_of(checkpoint, QuantizationConfig("fp8"), directory, layout))


@pytest.mark.parametrize(("ep", "pp"), [(2, 1), (2, 2)])
def test_spreading_experts_changes_nothing(
    ep: int, pp: int, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = checkpoint_of("mixtral")
    run_ranks(export, 1, checkpoint, (1, 1, 1), tmp_path / "alone")
    run_ranks(export, ep * pp, checkpoint, (1, pp, ep), tmp_path / "spread")
    alone, together = open_checkpoint(tmp_path / "alone"), open_checkpoint(tmp_path / "spread")
    assert [name for name in alone.names() if not same_bytes(alone.tensor(name), together.tensor(name))] == []


def awq_scales(checkpoint: Path, ep: int) -> dict[str, torch.Tensor]:
    """AWQ's scales of the second layers of the first layer's experts."""
    from tests import steps

    with steps.loaded(checkpoint, ep=ep) as model:
        state = steps.learn(model, QuantizationConfig("int4_awq")).tensors
    return {name: scale for name, scale in state.items() if "layers.0." in name and "linear_fc2.input" in name}


def test_an_experts_scale_follows_from_its_own_inputs(checkpoint_of: Callable[[str], Path]) -> None:
    (alone,) = run_ranks(awq_scales, 1, checkpoint_of("mixtral"), 1)
    assert len(alone) == EXPERTS and len({scale.sum().item() for scale in alone.values()}) == EXPERTS
    for spread in run_ranks(awq_scales, 2, checkpoint_of("mixtral"), 2):
        torch.testing.assert_close(spread, alone, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("layout", [(1, 1, 1), (1, 1, 4), (2, 1, 1), (1, 2, 2)])
def test_every_token_is_counted_at_its_experts(layout: tuple[int, ...], checkpoint_of: Callable[[str], Path]) -> None:
    tp, pp, ep = layout
    tokens = 4 * 4 * 32 + 7
    for counts, _ in run_ranks(learn, tp * pp * ep, checkpoint_of("mixtral"), layout, None):
        assert counts.keys() == {(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)}
        for layer in range(LAYERS):
            assert sum(counts[layer, expert] for expert in range(EXPERTS)) == CHOSEN * tokens


@pytest.mark.parametrize("ep", [1, 2, 8])
def test_idle_experts_get_the_largest_amax_of_their_siblings(ep: int, checkpoint_of: Callable[[str], Path]) -> None:
    for counts, amaxes in run_ranks(learn, ep, checkpoint_of("mixtral"), (1, 1, ep), [[5, 6]]):
        idle = {expert for expert, tokens in counts.items() if tokens == 0}
        # Two tokens reach four experts of eight at most.
        assert len(idle) >= LAYERS * (EXPERTS - 2 * CHOSEN)
        assert len(amaxes) == LAYERS * EXPERTS * 2
        for layer in range(LAYERS):
            for linear in ("linear_fc1", "linear_fc2"):
                prefix = f"decoder.layers.{layer}.mlp.experts.local_experts."
                of_experts = [amaxes[f"{prefix}{expert}.{linear}"] for expert in range(EXPERTS)]
                # The files have one scale for all experts of a layer.
                assert of_experts == [max(of_experts)] * EXPERTS
                assert max(of_experts) > 0
