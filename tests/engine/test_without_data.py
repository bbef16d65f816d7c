# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Jobs of algorithms that are not calibrated: they need no text, and give the same bytes however they are run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemo_ptq.quantization.state_header import state_file
from nemo_ptq.report.records import read_report
from nemo_ptq.report.write import CARD, REPORT
from tests.conftest import Demo
from tests.engine.test_run import arguments, digests, run_task
from tests.ranks import run_ranks


def run_twice(first: dict[str, Any], again: dict[str, Any]) -> None:
    """Runs a job, and another one from the state that the first has saved."""
    from nemo_ptq.engine.run import run_job
    from nemo_ptq.plan.rules import check_job

    job = check_job(**first, world_size=1)
    run_job(job)
    run_job(replace(check_job(**again, world_size=1), calibration_state=state_file(job.output)))


def tensors(directory: Path) -> dict[str, str]:
    return {name: digest for name, digest in digests(directory).items() if name.endswith("model.safetensors")}


@pytest.mark.parametrize("algorithm", ["fp8_dynamic", pytest.param("int8_dynamic", marks=pytest.mark.slow)])
def test_bytes_do_not_depend_on_how_a_job_is_run(algorithm: str, demo: Demo, tmp_path: Path) -> None:
    formats = {"export_format": "[compressed_tensors]" if algorithm == "int8_dynamic" else "[compressed_tensors,hf]"}
    quantization = {"evaluation_dataset_size": 4}
    alone = arguments(demo, tmp_path / "alone", algorithm=algorithm, export=formats, quantization=quantization)
    again = arguments(demo, tmp_path / "again", algorithm=algorithm, export=formats, quantization=quantization)
    run_ranks(run_twice, 1, alone, again)
    options = {"algorithm": algorithm, "export": formats, "calibration_tp": 2}
    without_text = {"calibration_dataset": str(tmp_path / "no.jsonl"), "evaluation_dataset_size": 0, "layerwise": True}
    run_ranks(run_task, 2, arguments(demo, tmp_path / "two", quantization=without_text, **options))
    expected = tensors(tmp_path / "alone")
    assert len(expected) == len(formats["export_format"].split(","))
    assert tensors(tmp_path / "again") == tensors(tmp_path / "two") == expected

    report = read_report(tmp_path / "alone" / "compressed_tensors" / REPORT)
    assert report.quality is not None and (report.quality.documents, report.quality.held_out) == (4, True)
    assert report.summary.passed and "calibrate" not in [step.name for step in report.steps]
    assert all(layer.input_sqnr_db and layer.input_amax is None for layer in report.layers)
    card = (tmp_path / "alone" / "compressed_tensors" / CARD).read_text(encoding="utf-8")
    assert f"\nvllm serve {tmp_path}/alone/compressed_tensors\n" in card
    assert "| calibrated on | nothing: all follows from the weights |" in card and "datasets:" in card
    bare = read_report(tmp_path / "two" / "compressed_tensors" / REPORT)
    assert bare.missing["quality"] == "turned off: quantization_config.evaluation_dataset_size=0"
