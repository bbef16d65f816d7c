# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""An export straight from the checkpoint's files has the bytes of the engine's, in every format, for every family."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_ptq.config import NO_QUANT, ExportConfig, QuantizationConfig
from nemo_ptq.errors import ConfigError
from nemo_ptq.preflight import check_job
from nemo_ptq.report.write import FILES
from tests.matrix import ALGORITHMS, ROWS
from tests.ranks import run_ranks

FORMATS = ("trtllm", "hf", "compressed_tensors")
MODELS = [model for row in ROWS for model in row.models]
QUANTIZED = tuple(algorithm for algorithm in ALGORITHMS if algorithm != NO_QUANT)
# Norms that are kept minus one and a tied embedding; one layer for queries, keys and values; experts.
QUICK = [("llama31", QUANTIZED), ("gemma", ("int8_sq",)), ("starcoder", ("fp8",)), ("mixtral", ("fp8",))]


def possible_formats(checkpoint: Path, algorithm: str, output: Path) -> list[str]:
    """The formats that can hold a model quantized with an algorithm."""
    found = []
    for name in FORMATS:
        try:
            check_job(world_size=1, **arguments(checkpoint, algorithm, [name], output))
        except ConfigError:
            continue
        found.append(name)
    return found


def arguments(checkpoint: Path, algorithm: str, formats: list[str], output: Path) -> dict[str, Any]:
    return {
        "nemo_checkpoint": str(checkpoint),
        "quantization_config": QuantizationConfig(algorithm, enable_kv_cache=algorithm in ("fp8", "int4_awq")),
        "export_config": ExportConfig(path=str(output), export_format=formats, inference_tp=1),
        "forward_loop": print,
    }


def export_twice(checkpoint: Path, algorithms: tuple[str, ...], directory: Path) -> list[str]:
    """Calibrates and exports with the engine, then again from the state. Returns the files that differ."""
    from nemo_ptq import engine
    from nemo_ptq.calibration.forward import forward_batches
    from nemo_ptq.console import Reporter
    from nemo_ptq.reexport import is_possible, run_reexport
    from nemo_ptq.runtime import process_groups
    from tests import steps
    from tests.test_engine import digests

    def loop(module: Any) -> None:
        for _ in forward_batches(module, steps.random_batches()):
            pass

    different, silent = [], Reporter(enabled=False)
    for algorithm in algorithms:
        output, again = directory / algorithm, directory / f"{algorithm}-again"
        formats = possible_formats(checkpoint, algorithm, output)
        if not formats:
            continue
        job = check_job(world_size=1, **arguments(checkpoint, algorithm, formats, output))
        with process_groups(steps.read_launch(), steps.CPU, tensor_parallel=1, pipeline_parallel=1):
            model = engine.load(job, steps.CPU)
            engine.calibrate(model, job.quantization, job.decoder, loop, silent)
            engine.export(model, job, silent)
        export = ExportConfig(path=str(again), export_format=formats)
        repeated = check_job(world_size=1, calibration_state=output, export_config=export)
        assert is_possible(repeated, 1)
        run_reexport(repeated)
        found, expected = digests(again), digests(output)
        names = {name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)}
        different += [f"{algorithm}: {name}" for name in sorted(names) if not _tells_of_the_job(name)]
    return different


def _tells_of_the_job(name: str) -> bool:
    return name.endswith(("ptq/manifest.json", *map(str, FILES)))


@pytest.mark.parametrize(("model", "algorithms"), QUICK)
def test_the_bytes_are_the_engines(
    model: str, algorithms: tuple[str, ...], checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    assert run_ranks(export_twice, 1, checkpoint_of(model), algorithms, tmp_path) == [[]]


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_the_bytes_are_the_engines_for_every_cell(
    model: str, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    assert run_ranks(export_twice, 1, checkpoint_of(model), QUANTIZED, tmp_path) == [[]]
