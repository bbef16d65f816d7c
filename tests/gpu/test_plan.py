# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Planned peaks of a GPU's memory are what torch's allocator has handed out, within 15 %."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from nemo_ptq.checkpoint.metadata import read_metadata
from nemo_ptq.config import ExportConfig, QuantizationConfig
from nemo_ptq.plan import make_plan
from nemo_ptq.report.records import read_report
from nemo_ptq.report.write import REPORT
from tests.plan.synthetic import make_llama
from tests.plan.test_memory import TOLERANCE, planned_peak, settings, write_texts

pytestmark = pytest.mark.gpu


def run_apart(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function in a process of its own that is started, not forked: CUDA does not survive a fork."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def run_job(checkpoint: Path, output: Path, quantization: QuantizationConfig) -> None:
    from nemo_ptq.engine import run as engine
    from nemo_ptq.plan.rules import check_job

    engine.run_job(
        check_job(
            world_size=1,
            nemo_checkpoint=str(checkpoint),
            quantization_config=quantization,
            export_config=ExportConfig(str(output)),
        )
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("synthetic") / "433M"
    run_apart(make_llama, "433M", directory)
    return directory


@pytest.mark.parametrize("layerwise", [False, True], ids=["resident", "layer-wise"])
@pytest.mark.parametrize("algorithm", ["fp8", "int8_sq", "int4_awq"])
def test_a_jobs_peak_is_the_planned_one(checkpoint: Path, tmp_path: Path, algorithm: str, layerwise: bool) -> None:
    quantization = settings(algorithm, write_texts(tmp_path / "texts.jsonl"), layerwise)
    plan = make_plan(read_metadata(checkpoint), quantization, ExportConfig("OUT"), device="H100")
    run_apart(run_job, checkpoint, tmp_path / "out", quantization)
    # Each step sets torch's peak back, so that nobody but the report knows the largest. It is written before the last.
    measured = {step.name: step.peak_memory_bytes for step in read_report(tmp_path / "out" / REPORT).steps}
    planned = {step.step: step.device for step in plan.memory}
    for name, peak in measured.items():
        print(
            f"{algorithm} {plan.mode}, {name}: planned {planned[name] / 2**20:.0f} MiB, measured {peak / 2**20:.0f} MiB"
        )
    assert measured.keys() == planned.keys() - {"verify"}
    assert planned_peak(plan) == pytest.approx(max(measured.values()), rel=TOLERANCE)
