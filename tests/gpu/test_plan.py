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
from tests.plan.synthetic import make_llama
from tests.plan.test_memory import TOLERANCE, planned_peak, settings, write_texts

pytestmark = pytest.mark.gpu


def run_apart(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function in a process of its own that is started, not forked: CUDA does not survive a fork."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def run_job_on_gpu(checkpoint: Path, output: Path, quantization: QuantizationConfig) -> int:
    import torch

    from nemo_ptq.engine import run_job
    from nemo_ptq.preflight import check_job

    run_job(
        check_job(
            world_size=1,
            nemo_checkpoint=str(checkpoint),
            quantization_config=quantization,
            export_config=ExportConfig(str(output)),
        )
    )
    return torch.cuda.max_memory_allocated()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("synthetic") / "433M"
    run_apart(make_llama, "433M", directory)
    return directory


@pytest.mark.parametrize("algorithm", ["fp8", "int8_sq", "int4_awq"])
def test_a_jobs_peak_is_the_planned_one(checkpoint: Path, tmp_path: Path, algorithm: str) -> None:
    plan = make_plan(read_metadata(checkpoint), settings(algorithm), ExportConfig("OUT"), device="H100")
    quantization = settings(algorithm, write_texts(tmp_path / "texts.jsonl"))
    measured = run_apart(run_job_on_gpu, checkpoint, tmp_path / "out", quantization)
    print(f"{algorithm}: planned {planned_peak(plan) / 2**20:.0f} MiB, measured {measured / 2**20:.0f} MiB")
    assert planned_peak(plan) == pytest.approx(measured, rel=TOLERANCE)
