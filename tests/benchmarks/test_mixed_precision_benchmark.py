# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What is predicted of a layer is what happens when it is quantized, and more bits lose less: on a tiny Llama."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.mixed_precision import at_random, loss_of_choice
from benchmarks.quality import Benchmark, as_served
from nemo_ptq.calibration.error_learner import ErrorLearner
from nemo_ptq.calibration.rounding_learner import RoundingLearner
from nemo_ptq.calibration.streams import Stream
from nemo_ptq.checkpoint.blocks import parameters_of
from nemo_ptq.checkpoint.metadata import read_metadata
from nemo_ptq.config import QuantizationConfig
from nemo_ptq.engine.choosing import choice_of, ways_to_quantize
from nemo_ptq.export.calibrated import CalibratedLayers
from nemo_ptq.export.mixing import LayerGroup, layer_groups
from nemo_ptq.parallel.ranks import Parallelism

AUTO = QuantizationConfig("auto", "balanced", effective_bits=6.0, awq_block_size=64)
FIRST = "decoder.layers.0."


def tokens(samples: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(96, (samples, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Benchmark:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.1)).eval()
    directory = tmp_path_factory.mktemp("llama")
    model.save_pretrained(directory)
    with torch.inference_mode():
        return Benchmark.of(model, read_metadata(Path(directory)), tokens(48, 32, 1).split(4), list(tokens(6, 64, 2)))


@pytest.fixture(scope="module")
def groups(benchmark: Benchmark) -> list[LayerGroup]:
    return layer_groups(AUTO, benchmark.shape, ["compressed_tensors"])


@pytest.fixture(scope="module")
def errors(benchmark: Benchmark, groups: list[LayerGroup]) -> dict[str, dict[str, float]]:
    before = [parameter.clone() for parameter in benchmark.llama.module.parameters()]
    ways = ways_to_quantize(groups, AUTO, "llama")
    learner = ErrorLearner(benchmark.llama, Parallelism(), Stream(benchmark.batches), ways)
    with torch.inference_mode():
        for block in benchmark.llama.blocks:
            assert learner.learn(block, False) == {}
    assert all(map(torch.equal, before, benchmark.llama.module.parameters()))
    return dict(learner.errors)


def changed(benchmark: Benchmark, name: str, option: str) -> float:
    """The mean relative squared change behind the first block when one layer of it is calibrated and served."""
    way = ways_to_quantize([LayerGroup((name,), 1, (option,))], AUTO, "llama")[(name,)][option]
    streams = [Stream(benchmark.batches) for _ in range(4)]
    embedding, block = benchmark.llama.blocks[:2]
    learner = RoundingLearner(
        benchmark.llama,
        Parallelism(),
        *streams[:2],
        {name: way.rounder},
        (),
        {name: way.scheme},
        lambda _, scale: scale,
        False,
    )
    for each in (embedding, block):
        state = learner.learn(each, False)
        benchmark.llama.advance(each, streams[2])
    benchmark.llama.advance(embedding, streams[3])
    layers = CalibratedLayers(
        parameters_of([block]), dict(state), {name: way.scheme}, False, rounded=learner.rounded.get
    )
    with as_served(block, layers, True):
        benchmark.llama.advance(block, streams[3])
    exact, found = (torch.cat([states.flatten(0, 1) for states in stream.hidden]) for stream in streams[2:])
    return float(((found - exact).square().sum(-1) / exact.square().sum(-1)).mean())


def test_what_is_predicted_of_a_layer_happens(benchmark: Benchmark, errors: dict[str, dict[str, float]]) -> None:
    first = {name: measured for name, measured in errors.items() if name.startswith(FIRST)}
    assert len(errors) == 8 and len(first) == 4
    with torch.inference_mode():
        for name, measured in first.items():
            assert measured.keys() == {"fp8", "int4_awq", "nvfp4"}
            for option, error in measured.items():
                assert error == pytest.approx(changed(benchmark, name, option), rel=0.02), (name, option)


def test_more_bits_lose_less(
    benchmark: Benchmark, groups: list[LayerGroup], errors: dict[str, dict[str, float]]
) -> None:
    losses, predicted = [], []
    with torch.inference_mode():
        for bits in (4.25, 6.0, 8.0, 12.0):
            asked = replace(AUTO, effective_bits=bits)
            algorithms, record = choice_of(groups, errors, asked)
            predicted.append(record.error)
            losses.append(loss_of_choice(benchmark, asked, algorithms).divergence)
    assert predicted == sorted(predicted, reverse=True)
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] / 3


def test_chance_says_nothing(errors: dict[str, dict[str, float]]) -> None:
    found = at_random(errors, 1)
    assert found == at_random(errors, 1) != at_random(errors, 2)
    assert {name: measured.keys() for name, measured in found.items()} == {
        name: measured.keys() for name, measured in errors.items()
    }
