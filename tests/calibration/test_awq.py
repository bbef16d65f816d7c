# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""AWQ's search without data: its loss is the output error, and every parallelism takes the same decisions."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_ptq.config import QuantizationConfig
from tests.ranks import run_ranks

BLOCK = 128


@dataclass
class Search:
    """What happened to one linear layer, its tensors those of one rank.

    Attributes:
        weight: (out, in), before anything was done to it.
        inputs: (tokens, in): all that entered it.
        scales: float32 (in,) each: what was tried, in this order.
        candidates: float32 (out, in) each: what the weight would have become, in effect.
        losses: What was found of each.
        smoothing: float32 (in,): what the input is multiplied with in the end.
        rounded: (out, in): what the weight has become, smoothed and rounded.
    """

    weight: torch.Tensor
    inputs: list[torch.Tensor] = field(default_factory=list)
    scales: list[torch.Tensor] = field(default_factory=list)
    candidates: list[torch.Tensor] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    smoothing: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    rounded: torch.Tensor = field(default_factory=lambda: torch.empty(0))


def search(
    checkpoint: Path, algorithm: str = "int4_awq", tp: int = 1, batches: list[torch.Tensor] | None = None
) -> dict[str, Search]:
    """Calibrates a model and records, for each linear layer of this rank, what was searched and found.

    Args:
        checkpoint: The model.
        algorithm: Which AWQ.
        tp: Tensor parallelism; the other ranks are data parallel.
        batches: What each data-parallel rank reads; None gives all of them the same.
    """
    from unittest.mock import patch

    from nemo_ptq.calibration.awq import _Search
    from nemo_ptq.modelopt.transfer import apply_state
    from nemo_ptq.quantization.rounding import fake_quantize_int4
    from tests import steps

    with steps.loaded(checkpoint, tp) as model:
        linears = {
            name: linear
            for name, linear in model.module.named_modules()
            if name.rpartition(".")[2].startswith("linear_")
        }
        found = {name: Search(linear.weight.detach().clone()) for name, linear in linears.items()}
        names = {linear.weight.data_ptr(): name for name, linear in linears.items()}
        loss = _Search._loss

        def record_inputs(name: str) -> Callable[..., None]:
            def hook(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
                found[name].inputs.append(inputs[0].flatten(0, -2))

            return hook

        def record_loss(self: Any, scale: torch.Tensor, *rest: Any) -> float:
            result = found[names[self.weight.data_ptr()]]
            rounded = fake_quantize_int4((self.weight * scale).bfloat16(), BLOCK)
            result.scales.append(scale)
            result.candidates.append(rounded.float() * (1 / scale).bfloat16())
            result.losses.append(loss(self, scale, *rest))
            return result.losses[-1]

        hooks = [linear.register_forward_pre_hook(record_inputs(name)) for name, linear in linears.items()]
        mine = None if batches is None else [batches[model.parallelism.data.rank]]
        quantization = QuantizationConfig(algorithm, awq_block_size=BLOCK, enable_kv_cache=False)
        with patch.object(_Search, "_loss", record_loss):
            state = steps.learn(model, quantization, mine)
        for hook in hooks:
            hook.remove()
        apply_state(model.module, state)
        for name, linear in linears.items():
            found[name].smoothing = linear.input_quantizer.pre_quant_scale.float()
            found[name].rounded = linear.weight_quantizer(linear.weight).detach()
        return found


@pytest.fixture(scope="module")
def searches(checkpoint_of: Callable[[str], Path]) -> dict[str, Search]:
    """Of a model on one rank."""
    return run_ranks(search, 1, checkpoint_of("llama2"))[0]


def test_loss_is_the_error_of_the_output(searches: dict[str, Search]) -> None:
    assert len(searches) == 8
    for name, result in searches.items():
        inputs, weight = torch.cat(result.inputs).double(), result.weight
        assert len(result.candidates) == len(result.losses) == 11
        for candidate, loss in zip(result.candidates, result.losses, strict=True):
            error = inputs @ (weight.double() - candidate.double()).T
            # The error is rounded to bfloat16 once before it is squared.
            assert loss == pytest.approx(float(error.square().sum()), rel=2e-4), name


def test_best_scale_is_taken_and_folded_in(searches: dict[str, Search]) -> None:
    chosen = []
    for name, result in searches.items():
        best = min(range(11), key=result.losses.__getitem__)
        chosen.append(best)
        # The exponent 0 is tried first: the search is never worse than it.
        assert result.losses[best] <= result.losses[0]
        torch.testing.assert_close(result.smoothing, 1 / result.scales[best], rtol=2**-8, atol=0.0)
        inputs = torch.cat(result.inputs).float()
        expected = inputs @ result.weight.float().T
        found = (inputs * result.smoothing) @ result.rounded.float().T
        error = float((found - expected).square().sum())
        assert error == pytest.approx(result.losses[best], rel=0.05), name
    assert any(chosen)


def test_tensor_parallel_ranks_decide_as_one(searches: dict[str, Search], checkpoint_of: Callable[[str], Path]) -> None:
    shards = run_ranks(search, 2, checkpoint_of("llama2"), "int4_awq", 2)
    for name, expected in searches.items():
        first, second = (shard[name] for shard in shards)
        assert first.losses == second.losses, name
        rows_are_sharded = name.endswith(("linear_proj", "linear_fc2"))
        smoothing = torch.cat([first.smoothing, second.smoothing]) if rows_are_sharded else first.smoothing
        if not rows_are_sharded:
            assert torch.equal(first.smoothing, second.smoothing), name
        torch.testing.assert_close(smoothing, expected.smoothing, rtol=2**-6, atol=0.0)
        # bfloat16 sums of two ranks and of one differ a little, and so do the next layer's inputs.
        assert first.losses == pytest.approx(expected.losses, rel=2**-5), name


def test_data_parallel_ranks_decide_as_one(checkpoint_of: Callable[[str], Path]) -> None:
    generator = torch.Generator().manual_seed(1)
    halves = [torch.randint(0, 384, (3, 32), generator=generator) for _ in range(2)]
    (alone,) = run_ranks(search, 1, checkpoint_of("llama2"), "int4_awq", 1, [torch.cat(halves)])
    shared = run_ranks(search, 2, checkpoint_of("llama2"), "int4_awq", 1, halves)
    for name, expected in alone.items():
        for result in shared:
            assert result[name].losses == pytest.approx(expected.losses, rel=1e-5), name
            torch.testing.assert_close(result[name].smoothing, expected.smoothing, rtol=1e-5, atol=0.0)


def calibrate_experts(checkpoint: Path, algorithm: str) -> dict[str, tuple[int, torch.Tensor]]:
    """Calibrates a mixture of experts on two tokens: the tokens that reached each layer, and its smoothing."""
    from tests import steps

    with steps.loaded(checkpoint) as model:
        experts = {name: child for name, child in model.module.named_modules() if name.endswith("linear_fc1")}
        tokens = dict.fromkeys(experts, 0)

        def count(name: str) -> Callable[..., None]:
            def hook(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
                tokens[name] += len(inputs[0])

            return hook

        for name, child in experts.items():
            child.register_forward_pre_hook(count(name))
        quantization = QuantizationConfig(algorithm, awq_block_size=BLOCK, enable_kv_cache=False)
        state = steps.learn(model, quantization, [torch.tensor([[5, 6]])]).tensors
        return {name: (tokens[name], state[f"{name}.input_quantizer.pre_quant_scale"]) for name in experts}


def test_experts_without_tokens_are_not_smoothed(checkpoint_of: Callable[[str], Path]) -> None:
    (experts,) = run_ranks(calibrate_experts, 1, checkpoint_of("mixtral"), "int4_awq")
    idle = {name for name, (tokens, _) in experts.items() if tokens == 0}
    assert idle and idle != experts.keys()
    for name, (_, smoothing) in experts.items():
        assert bool((smoothing == 1).all()) == (name in idle), name
