# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The block pipeline decides what ModelOpt's own calibration does, and the same with one block of weights at a time."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_ptq.calibration.observing import expert_of
from nemo_ptq.config import NO_QUANT, QuantizationConfig
from nemo_ptq.report.records import read_report
from nemo_ptq.report.write import REPORT
from tests.conftest import Demo
from tests.engine.test_run import arguments, run_task
from tests.files import digests
from tests.matrix import quick_first
from tests.ranks import run_ranks

QUANTIZED = ("fp8", "int8_sq", "int4_awq", "w4a8_awq", "nvfp4")
# Formats with packed tensors that can hold an algorithm.
PACKED = {
    NO_QUANT: ["trtllm", "hf", "compressed_tensors"],
    "fp8": ["trtllm", "hf", "compressed_tensors"],
    "int8_sq": ["trtllm", "compressed_tensors"],
    "int4_awq": ["trtllm", "hf", "compressed_tensors"],
    "w4a8_awq": ["trtllm", "hf"],
    "nvfp4": ["trtllm", "hf"],
}


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("decoder.layers.3.mlp.experts.local_experts.5.linear_fc1", (3, 5)),
        ("decoder.layers.3.mlp.experts.local_experts.5.linear_fc2", None),
        ("decoder.layers.3.mlp.linear_fc1", None),
        ("decoder.layers.3.mlp.router", None),
    ],
)
def test_tokens_are_counted_where_they_enter_an_expert(name: str, expert: tuple[int, int] | None) -> None:
    assert expert_of(name) == expert


def states(checkpoint: Path, algorithms: tuple[str, ...], layout: tuple[int, ...]) -> dict[str, dict[str, list[str]]]:
    """Calibrates with the pipeline and with ModelOpt, on this rank.

    Returns:
        For each algorithm the names of the entries that there are, and of those that are not the same bit for bit.
    """
    from tests import steps

    found = {}
    with steps.loaded(checkpoint, *layout) as first:
        for algorithm in algorithms:
            quantization = QuantizationConfig(algorithm, enable_kv_cache=True)
            ours = steps.learn(first, quantization).tensors
            model = steps.load_model(checkpoint, steps.CPU)
            steps.calibrate(model, quantization)
            assert model.calibration is not None
            theirs = model.calibration.tensors
            names = sorted(ours.keys() | theirs.keys())
            different = [name for name in names if not steps.same(ours.get(name), theirs.get(name))]
            found[algorithm] = {"entries": names, "different": different}
    return found


# Floored amaxes, gains that are kept minus one, biases, experts.
@pytest.mark.parametrize(
    ("model", "algorithms", "layout"),
    [
        ("llama31", QUANTIZED, (1, 1)),
        ("llama31", ("fp8", "int8_sq", "int4_awq", "w4a8_awq"), (2, 1)),
        ("nemotron", ("fp8", "int8_sq"), (1, 1)),
        ("gemma", ("w4a8_awq",), (1, 1)),
        ("mixtral", ("fp8",), (1, 1)),
        ("mixtral", ("fp8",), (1, 1, 2)),
    ],
)
def test_the_state_is_modelopts(
    model: str, algorithms: tuple[str, ...], layout: tuple[int, ...], checkpoint_of: Callable[[str], Path]
) -> None:
    for found in run_ranks(states, math.prod(layout), checkpoint_of(model), algorithms, layout):
        for algorithm in algorithms:
            assert len(found[algorithm]["entries"]) >= 8, algorithm
            assert found[algorithm]["different"] == [], algorithm


def run_layerwise(
    checkpoint: Path,
    algorithms: tuple[str, ...],
    layout: tuple[int, ...],
    root: Path,
    formats: dict[str, list[str]] = PACKED,
) -> None:
    """Exports with each algorithm in all formats that it can go to, layer by layer and not."""
    from tests import steps

    for algorithm in algorithms:
        for layerwise in (True, False):
            quantization = QuantizationConfig(algorithm, layerwise=layerwise)
            output = root / algorithm / str(layerwise)
            steps.run_job(steps.job_of(checkpoint, quantization, output, layout, formats=formats[algorithm]))


def tensors_of(directory: Path) -> dict[str, str]:
    """Digests of everything but the files that repeat the job's arguments."""
    found = digests(directory)
    return {name: digest for name, digest in found.items() if "/ptq/" not in name or name.endswith(".safetensors")}


def assert_same_exports(root: Path, algorithms: tuple[str, ...], formats: dict[str, list[str]] = PACKED) -> None:
    for algorithm in algorithms:
        first, second = (tensors_of(root / algorithm / str(layerwise)) for layerwise in (True, False))
        assert first == second, algorithm
        has_state = algorithm != NO_QUANT
        assert sum(name.endswith(".safetensors") for name in first) >= len(formats[algorithm]) * (1 + has_state)


@pytest.mark.parametrize("algorithms", quick_first([(NO_QUANT,), *((name,) for name in QUANTIZED)], [("nvfp4",)]))
def test_layer_by_layer_the_bytes_are_the_same(
    algorithms: tuple[str, ...], checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    run_ranks(run_layerwise, 1, checkpoint_of("llama31"), algorithms, (1, 1), tmp_path, timeout=600)
    assert_same_exports(tmp_path, algorithms)


def test_layer_by_layer_over_stages_and_shards(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    algorithms = ("int4_awq",)
    run_ranks(run_layerwise, 4, checkpoint_of("llama31"), algorithms, (2, 2), tmp_path, timeout=600)
    assert_same_exports(tmp_path, algorithms)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gemma", "starcoder", "nemotron", "gpt_swiglu", "starcoder2", "mixtral"])
def test_layer_by_layer_in_other_families(model: str, checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    algorithms, formats = (NO_QUANT, "fp8"), {NO_QUANT: ["trtllm"], "fp8": ["trtllm"]}
    run_ranks(run_layerwise, 2, checkpoint_of(model), algorithms, (1, 2), tmp_path, formats, timeout=600)
    assert_same_exports(tmp_path, algorithms, formats)


def weights_in_memory(checkpoint: Path, drop: bool) -> dict[str, list[int]]:
    """Places of the blocks that have weights in memory, at each visit and after the walk."""
    from nemo_ptq.checkpoint.loading import open_model
    from tests import steps

    with steps.loaded(checkpoint):
        model = open_model(checkpoint, steps.CPU)

        def in_memory() -> list[int]:
            blocks = model.blocks
            return [b.index for b in blocks if any(not m.get_parameter(own).is_meta for _, m, own in b.parameters())]

        seen: dict[str, list[int]] = {"before": in_memory()}

        class Visitor:
            def visit(self, index: int, block: object, state: object) -> None:
                seen[str(index)] = in_memory()

        steps.learn(model, QuantizationConfig("fp8"), visitors=[Visitor()], drop=drop)
        return seen | {"after": in_memory()}


def test_one_block_of_weights_is_in_memory_at_a_time(checkpoint_of: Callable[[str], Path]) -> None:
    (seen,) = run_ranks(weights_in_memory, 1, checkpoint_of("llama31"), True)
    assert seen == {"before": [], "0": [0], "1": [1], "2": [2], "3": [3], "after": []}


def test_a_tied_embedding_stays_for_the_head(checkpoint_of: Callable[[str], Path]) -> None:
    (seen,) = run_ranks(weights_in_memory, 1, checkpoint_of("llama32"), True)
    assert seen["2"] == [0, 2]
    assert 0 in seen["3"]


def test_weights_stay_where_they_fit(checkpoint_of: Callable[[str], Path]) -> None:
    (seen,) = run_ranks(weights_in_memory, 1, checkpoint_of("llama31"), False)
    assert seen["before"] == []
    assert seen["after"] == [0, 1, 2, 3]


@pytest.mark.parametrize(("tp", "pp"), [pytest.param(1, 1, marks=pytest.mark.slow), (2, 2)])
def test_layer_by_layer_the_figures_are_the_same(tp: int, pp: int, demo: Demo, tmp_path: Path) -> None:
    reports = []
    for layerwise in (True, False):
        output = tmp_path / str(layerwise)
        task = arguments(demo, output, quantization={"layerwise": layerwise}, calibration_tp=tp, calibration_pp=pp)
        run_ranks(run_task, tp * pp, task)
        reports.append(read_report(output / REPORT))
    first, second = reports
    assert first.quality is not None
    assert first.quality == second.quality
    assert first.layers == second.layers
    names = digests(tmp_path / "True")
    assert names.keys() == digests(tmp_path / "False").keys()
    assert names["rank0.safetensors"] == digests(tmp_path / "False")["rank0.safetensors"]
