# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts: spreading them over ranks changes nothing, and idle ones get sound ranges."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nemo_ptq.config import QuantizationConfig
from nemo_ptq.verify.trtllm.trtllm_reader import open_checkpoint, same_bytes
from tests.ranks import run_ranks

LAYERS, EXPERTS, CHOSEN = 2, 8, 2


def calibrate_experts(
    checkpoint: Path, ep: int, pp: int, tokens: list[list[int]] | None, directory: Path
) -> tuple[Counter[tuple[int, int]], dict[str, float]]:
    """Calibrates and exports a mixture of experts.

    Args:
        checkpoint: The model.
        ep: Expert parallelism.
        pp: Pipeline parallelism.
        tokens: One batch; None takes the usual ones.
        directory: Where to.

    Returns:
        The tokens that each expert saw, and the range of each of this rank's experts' inputs.
    """
    from nemo_ptq.calibration.forward import run_batches
    from nemo_ptq.modelopt.experts import with_idle_experts_covered
    from nemo_ptq.modelopt.megatron_layers import global_modules
    from nemo_ptq.modelopt.quantizers import calibrate
    from tests import steps

    batches = steps.random_batches() if tokens is None else [torch.tensor(tokens)]
    reported: list[Counter[tuple[int, int]]] = []

    def loop(module: torch.nn.Module) -> None:
        for _ in run_batches(module, batches):
            pass

    with steps.loaded(checkpoint, pp=pp, ep=ep) as model:
        covered = with_idle_experts_covered(loop, reported.append)
        calibrate(model.module, QuantizationConfig("fp8"), "llama", covered)
        steps.export(model, directory)
        ranges = {
            name: float(module.input_quantizer.amax)
            for name, module in global_modules(model.module).items()
            if "local_experts" in name
        }
    (counts,) = reported
    return counts, ranges


@pytest.mark.parametrize(("ep", "pp"), [(2, 1), (4, 1), (2, 2)])
def test_spreading_experts_changes_nothing(
    ep: int, pp: int, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = checkpoint_of("mixtral")
    ((counts, _),) = run_ranks(calibrate_experts, 1, checkpoint, 1, 1, None, tmp_path / "alone")
    spread = run_ranks(calibrate_experts, ep * pp, checkpoint, ep, pp, None, tmp_path / "spread")
    alone, together = open_checkpoint(tmp_path / "alone"), open_checkpoint(tmp_path / "spread")
    assert [name for name in alone.names() if not same_bytes(alone.tensor(name), together.tensor(name))] == []
    assert all(found == counts for found, _ in spread)


def test_every_token_is_counted_at_its_experts(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    ((counts, _),) = run_ranks(calibrate_experts, 1, checkpoint_of("mixtral"), 1, 1, None, tmp_path)
    assert counts.keys() == {(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)}
    tokens = 4 * 4 * 32 + 7
    for layer in range(LAYERS):
        assert sum(counts[layer, expert] for expert in range(EXPERTS)) == CHOSEN * tokens


@pytest.mark.parametrize("ep", [1, 2, 8])
def test_idle_experts_get_the_largest_range_of_their_siblings(
    ep: int, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    results = run_ranks(calibrate_experts, ep, checkpoint_of("mixtral"), ep, 1, [[5, 6]], tmp_path)
    idle = {expert for expert, tokens in results[0][0].items() if tokens == 0}
    # Two tokens reach four experts of eight at most.
    assert len(idle) >= LAYERS * (EXPERTS - 2 * CHOSEN)
    ranges = {name: amax for _, mine in results for name, amax in mine.items()}
    assert len(ranges) == LAYERS * EXPERTS * 2
    for layer in range(LAYERS):
        for linear in ("linear_fc1", "linear_fc2"):
            prefix = f"decoder.layers.{layer}.mlp.experts.local_experts."
            of_experts = [ranges[f"{prefix}{expert}.{linear}"] for expert in range(EXPERTS)]
            # The files have one scale for all experts of a layer.
            assert of_experts == [max(of_experts)] * EXPERTS
            assert max(of_experts) > 0


def count_in_dense_model(checkpoint: Path) -> int:
    from nemo_ptq.modelopt.experts import counting_tokens
    from tests import steps

    with steps.loaded(checkpoint) as model, counting_tokens(model.module) as counts:
        return len(counts)


def test_dense_models_have_no_experts(checkpoint_of: Callable[[str], Path]) -> None:
    assert run_ranks(count_in_dense_model, 1, checkpoint_of("llama2")) == [0]
