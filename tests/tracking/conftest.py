# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Runs to be tracked."""

import json
from pathlib import Path

import pytest

from nemo_ptq.config import ExportConfig, QuantizationConfig
from nemo_ptq.job import Job
from nemo_ptq.plan.rules import check_job
from tests.conftest import Demo

SUMMARY = {"model": "LlamaConfig", "recovery": 0.995, "perplexity": 7.5, "export_bytes": 1234, "passed": True}
STEPS = [
    {"name": "load", "seconds": 1.5, "peak_memory_bytes": 1000},
    {"name": "pack and write", "seconds": 0.5, "peak_memory_bytes": 2000},
]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """NeMo-Run's home, in which runs are recorded."""
    monkeypatch.setenv("NEMORUN_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NEMO_PTQ_RECORD")
    return tmp_path / "home"


@pytest.fixture
def job(demo: Demo, tmp_path: Path) -> Job:
    export = ExportConfig(path=str(tmp_path / "out"))
    quantization = QuantizationConfig(calibration_dataset="builtin")
    return check_job(
        nemo_checkpoint=demo.checkpoint, quantization_config=quantization, export_config=export, world_size=1
    )


def write_output(directory: Path) -> None:
    """Makes an exported directory, as far as records look at it."""
    (directory / "ptq").mkdir(parents=True)
    (directory / "rank0.safetensors").write_bytes(bytes(100))
    (directory / "ptq" / "manifest.json").write_text("{}")
    (directory / "ptq" / "report.html").write_text("<html></html>")
    (directory / "ptq" / "report.json").write_text(json.dumps({"summary": SUMMARY, "steps": STEPS}))
