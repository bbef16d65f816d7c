# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Quality "max" on batches that are held out: which those are, what counts, and that the better rounding is kept."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.llama import Llama
from nemo_ptq.calibration.gptq import InverseFactor, Rounded
from nemo_ptq.calibration.held_out import HeldOutError, held_out_places, sample_errors
from nemo_ptq.calibration.nearest_learner import NearestLearner
from nemo_ptq.calibration.observing import linear_shards
from nemo_ptq.calibration.residual import residual_of
from nemo_ptq.calibration.rounded_layer import ELSEWHERE, RoundedLayer
from nemo_ptq.calibration.rounders import Fp8, Int4, Int8, Rounder
from nemo_ptq.calibration.rounding_learner import RoundingLearner
from nemo_ptq.calibration.streams import Stream
from nemo_ptq.checkpoint.blocks import Block
from nemo_ptq.config import QuantizationConfig
from nemo_ptq.export.calibrated import algorithm_scheme
from nemo_ptq.parallel.ranks import Parallelism, Ranks


def test_one_batch_in_eight_is_held_out() -> None:
    assert [sorted(held_out_places(batches)) for batches in (0, 1, 2, 7, 8, 17)] == [[], [], [1], [6], [7], [7, 15]]


def test_the_error_of_a_sample_is_relative_to_each_token() -> None:
    exact = torch.tensor([[[3.0, 4.0], [1.0, 0.0]], [[300.0, 400.0], [0.0, 2.0]]])  # (sequence, batch, hidden size)
    found = exact + torch.tensor([[[0.0, 5.0], [0.0, 0.0]], [[50.0, 0.0], [0.0, 2.0]]])
    torch.testing.assert_close(sample_errors(found, exact), torch.tensor([(1 + 0.01) / 2, (0 + 1) / 2]))


def test_the_worst_sample_counts_as_much_as_the_mean() -> None:
    even, uneven = (HeldOutError.of(torch.tensor(errors), Parallelism()) for errors in ([0.2, 0.2], [0.0, 0.3]))
    assert (even.mean, uneven.mean) == pytest.approx((0.2, 0.15))
    assert even.is_less(uneven) and not uneven.is_less(even)
    nothing = HeldOutError.of(torch.zeros(0), Parallelism())
    assert not nothing.is_less(nothing)


# --- a model ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama() -> Llama:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        initializer_range=0.1,
    )
    return Llama(LlamaForCausalLM(config).eval())


@dataclass(frozen=True)
class Careless(Int4):
    """Rounds well to nearest, and badly by what the data shows."""

    def round(self, weight: torch.Tensor, factor: InverseFactor, ranks: Ranks) -> Rounded:
        is_unit = torch.equal(factor.upper, torch.eye(len(factor.upper)))
        return super().round(weight if is_unit else -weight, factor, ranks)


@dataclass(frozen=True)
class Backwards(Int8):
    """The same of INT8, which has pre-quantization scales."""

    def round(self, weight: torch.Tensor, factor: InverseFactor, ranks: Ranks) -> Rounded:
        is_unit = torch.equal(factor.upper, torch.eye(len(factor.upper)))
        return super().round(weight if is_unit else -weight, factor, ranks)


def learner(llama: Llama, rounder: Rounder, batches: int, algorithm: str = "int4_awq") -> RoundingLearner:
    tokens = torch.randint(96, (8 * batches, 32), generator=torch.Generator().manual_seed(1)).split(8)
    scheme = algorithm_scheme(QuantizationConfig(algorithm, awq_block_size=64))
    names = [name for block in llama.blocks for name in linear_shards(block, Parallelism())]
    return RoundingLearner(
        llama,
        Parallelism(),
        Stream(tokens),
        Stream(tokens),
        dict.fromkeys(names, rounder),
        names,
        dict.fromkeys(names, scheme),
        lambda _, scale: scale,
        False,
        is_max=True,
    )


@pytest.mark.parametrize(("rounder", "batches", "nearest"), [(Int4, 9, []), (Careless, 9, [1, 2]), (Careless, 1, [])])
def test_the_better_rounding_is_kept(llama: Llama, rounder: Any, batches: int, nearest: list[int]) -> None:
    learned = learner(llama, rounder(64), batches)
    for block in llama.blocks:
        learned.learn(block, False)
    assert learned.nearest == nearest
    weight = llama.blocks[2].modules["decoder.layers.1.mlp.linear_fc2"].get_parameter("weight")
    found = learned.rounded["decoder.layers.1.mlp.linear_fc2"]
    read = found.codes.float() * found.scale.repeat_interleave(64, 1)
    is_near = float((read - weight).square().sum()) < 0.2 * float(weight.square().sum())
    assert is_near == (rounder is Int4 or bool(nearest))
    learned.learn(Block(3, -1, {}), True)
    assert (learned.found is None) == (batches == 1)
    if learned.found is not None:
        ours, plain = learned.found
        # Where each block is rounded to nearest, so is the model.
        assert (ours == plain) if nearest else ours.is_less(plain)


@pytest.mark.parametrize(
    ("rounder", "algorithm"), [(Careless(64), "int4_awq"), (Backwards(), "int8_sq")], ids=["int4_awq", "int8_sq"]
)
def test_the_job_falls_back_to_the_model_that_was_compared(llama: Llama, rounder: Any, algorithm: str) -> None:
    learned = learner(llama, rounder, 9, algorithm)
    with torch.no_grad():
        found = [(learned.learn(block, False), dict(learned.rounded)) for block in llama.blocks]
        assert learned.nearest == [1, 2]
        state = {name: value for entries, _ in found for name, value in entries.items()}
        nearest = NearestLearner(Parallelism(), learned.rounders, state, learned.counts)
        for block, (entries, rounded) in zip(llama.blocks, found, strict=True):
            again = nearest.learn(block, False)
            assert again.keys() == entries.keys()
            assert nearest.rounded.keys() == rounded.keys()
            for name, weight in rounded.items():
                assert torch.equal(nearest.rounded[name].codes, weight.codes)
                assert torch.equal(nearest.rounded[name].scale, weight.scale)
    assert nearest.nearest == [1, 2]


def rounded_weights(llama: Llama, follows: bool, moves: bool) -> dict[str, torch.Tensor]:
    """Codes in FP8 with quality "balanced", by the layers' names."""
    learned = learner(llama, Fp8(), 4, "fp8")
    moved = learned.moved if moves else ()
    learned = replace(learned, reference=learned.reference if follows else None, moved=moved, is_max=False)
    found = {}
    for block in llama.blocks:
        learned.learn(block, False)
        found |= {name: weight.codes.float() for name, weight in learned.rounded.items()}
    return found


def test_the_unquantized_model_is_followed_for_weights_that_are_moved_alone(llama: Llama) -> None:
    alone, beside, moved = (rounded_weights(llama, *case) for case in ((False, False), (True, False), (True, True)))
    assert len(alone) == 8 and all(torch.equal(alone[name], beside[name]) for name in alone)
    assert [name for name in alone if not torch.equal(alone[name], moved[name])]


class Mlp(torch.nn.Module):
    """A module whose last layer is a linear one, and which counts how often it computes what comes before."""

    def __init__(self, last: torch.nn.Module) -> None:
        super().__init__()
        self.last, self.times = last, 0

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        self.times += 1
        found: torch.Tensor = self.last(states.relu())[0]
        return found


def test_what_has_entered_a_layer_is_kept_of_the_calibration_batches_alone(llama: Llama) -> None:
    block, name = llama.blocks[1], "decoder.layers.0.mlp.linear_fc2"
    module, linear = block.modules[name], linear_shards(block, Parallelism())[name]
    mlp = Mlp(module)
    layer = RoundedLayer(module, linear, llama, is_moved=True, ended=mlp)
    layer.serve({}, algorithm_scheme(QuantizationConfig("int4_awq", awq_block_size=64)))
    states = torch.randn(3, 5, 128, generator=torch.Generator().manual_seed(2))
    expected = [states[index].relu() @ linear.weight.T for index in range(3)]
    with torch.no_grad():
        for place, times in ((0, 1), (ELSEWHERE, 2), (ELSEWHERE, 3)):
            layer.place = place
            torch.testing.assert_close(mlp(states[times - 1]), expected[times - 1])
            assert mlp.times == times
        layer.place = 0  # which is known, whatever is given
        torch.testing.assert_close(mlp(states[2])[0], expected[0])
        assert mlp.times == 3
        layer.forget([0])
        torch.testing.assert_close(mlp(states[2]), expected[2])
    layer.restore()
    assert "forward" not in vars(mlp)


def test_the_model_s_error_is_the_divergence_of_what_the_held_out_samples_come_to(llama: Llama) -> None:
    learned = learner(llama, Int4(64), 9)
    with torch.no_grad():
        for block in llama.blocks:
            learned.learn(block, False)
        learned.learn(Block(3, -1, {}), True)
        exact, found = (
            llama.logits(stream.hidden[7]).log_softmax(-1) for stream in (learned.reference, learned.quantized)
        )
    samples = (exact.exp() * (exact - found)).sum(-1).mean(1)
    assert learned.found is not None
    ours = learned.found[0]
    assert (ours.mean, ours.worst) == pytest.approx((float(samples.mean()), float(samples.max())))


def test_layers_that_write_into_the_residual_stream_are_compared_with_it(llama: Llama) -> None:
    block = llama.blocks[1]
    streams = {name: residual_of(name, block.modules, llama) for name in block.modules}
    start = "decoder.layers.0."
    assert {name.removeprefix(start) for name, found in streams.items() if found is not None} == {
        "self_attention.linear_proj",
        "mlp.linear_fc2",
    }
    sandwich = {**block.modules, f"{start}post_mlp_layernorm": torch.nn.Identity()}
    assert residual_of(f"{start}mlp.linear_fc2", sandwich, llama) is None
    residual = streams[f"{start}self_attention.linear_proj"]
    assert residual is not None
    generator = torch.Generator().manual_seed(2)
    exact, given = torch.randn(2, 4, 3, 64, generator=generator)
    with torch.no_grad():
        llama.layer(block, exact)
        residual.keep()
        llama.layer(block, given)
    lack, counts = residual.compare(0)
    torch.testing.assert_close(lack, (exact - given).reshape(12, 64))
    torch.testing.assert_close(counts.flatten(), exact.reshape(12, 64).square().mean(1).rsqrt())
    for found in streams.values():
        if found is not None:
            found.restore()
