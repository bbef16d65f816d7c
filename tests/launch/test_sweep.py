# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""`nemo-ptq sweep` runs several algorithms as one experiment, and compares what came of them."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from nemo_ptq.cli import app
from nemo_ptq.errors import ConfigError, JobFailed, PtqError
from nemo_ptq.launch import experiment
from nemo_ptq.launch.sweep import recipes_of
from nemo_ptq.tracking.runs import SUCCEEDED, read_runs
from tests.conftest import Demo

BIN = Path(sys.executable).parent
SIZES = {"fp8": 500, "int4_awq": 300}


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The tasks that would have been run: int8_sq fails, the others leave a report."""
    ran: dict[str, Any] = {}

    def run_tasks(tasks: Mapping[str, Any], **_: Any) -> dict[str, PtqError]:
        ran.update(tasks)
        for name, (task, _executor) in tasks.items():
            if name in SIZES:
                report = Path(task.export_config.path) / "ptq" / "report.json"
                report.parent.mkdir(parents=True)
                report.write_text(json.dumps(report_of(SIZES[name])))
                report.with_suffix(".html").touch()
        return {name: JobFailed("job int8_sq ended as FAILED on rank 1") for name in tasks if name not in SIZES}

    monkeypatch.setattr(experiment, "run_tasks", run_tasks)
    return ran


def report_of(size: int) -> dict[str, Any]:
    summary = {"export_bytes": size * 10**6, "compression": 1000 / size, "perplexity": 7.5, "recovery": 0.995}
    steps = [
        {"name": "load", "seconds": 1.5, "peak_memory_bytes": 10**9},
        {"name": "export", "seconds": 2.0, "peak_memory_bytes": 3 * 10**9},
    ]
    return {"summary": {**summary, "kl_divergence": None}, "steps": steps}


def sweep(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["nemo-ptq", "sweep", *arguments])
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_the_recipes_of_a_model() -> None:
    assert recipes_of("llama3_8b") == {
        "fp8": "llama3_8b_fp8",
        "int8_sq": "llama3_8b_int8_sq",
        "int4_awq": "llama3_8b_int4_awq",
    }
    assert recipes_of("mixtral_8x7b") == {"fp8": "mixtral_8x7b_fp8"}
    with pytest.raises(ConfigError, match=r"--model llama3_8 has no recipes: did you mean llama3_8b\?"):
        recipes_of("llama3_8")


def test_the_problems_of_all_jobs_are_told_once(
    demo: Demo,
    tasks: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [f"nemo_checkpoint={demo.checkpoint}", f"export_config.path={tmp_path}/out", "calibration_tpp=2"]
    assert sweep(monkeypatch, "--algorithms", "fp8,int9", *arguments) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == "Error: calibration_tpp is not an option: did you mean calibration_tp?"
    assert second.startswith("Error: quantization_config.algorithm=int9 is not valid")
    assert not tasks
    assert not (tmp_path / "out").exists()


def test_each_algorithm_has_its_recipe_and_the_table_its_row(
    demo: Demo,
    tasks: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    arguments = [f"nemo_checkpoint={demo.checkpoint}", f"export_config.path={tmp_path}/out", "calibration_tp=2"]
    assert sweep(monkeypatch, "--model", "llama3_8b", *arguments) == 1
    found = {
        name: (task.quantization_config.algorithm, task.quantization_config.sq_alpha, executor.ntasks_per_node)
        for name, (task, executor) in tasks.items()
    }
    assert found == {"fp8": ("fp8", None, 2), "int8_sq": ("int8_sq", 0.85, 2), "int4_awq": ("int4_awq", None, 2)}
    printed = capsys.readouterr()
    rows = [line.split() for line in printed.out.splitlines()][-3:]
    assert rows == [
        ["fp8", "0.5", "2.00", "7.500", "0.9950", "3.5", "3"],
        ["int8_sq", "FAILED"],
        ["int4_awq", "0.3", "3.33", "7.500", "0.9950", "3.5", "3"],
    ]
    assert printed.err == "Error: int8_sq: job int8_sq ended as FAILED on rank 1\n"
    outcomes = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [outcome["failure"] for outcome in outcomes] == [None, "job int8_sq ended as FAILED on rank 1", None]
    page = (tmp_path / "out" / "sweep.html").read_text()
    for text in (str(demo.checkpoint), "0.9950", "job int8_sq ended as FAILED on rank 1", 'href="fp8/ptq/report.html"'):
        assert text in page
    assert page.count("<svg") == 1
    assert "KL divergence, nats per token of fp8" not in page  # which was not measured


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_real_sweep(demo: Demo, tmp_path: Path) -> None:
    home, out = tmp_path / "home", tmp_path / "out"
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "NEMORUN_HOME": str(home), "COLUMNS": "200"}
    del environment["NEMO_PTQ_RECORD"]
    data = [f"quantization_config.calibration_dataset={demo.calibration}"]
    size = ["quantization_config.quality=fast", "quantization_config.calibration_dataset_size=32"]
    command = ["nemo-ptq", "sweep", "--algorithms", "fp8,int8_sq", f"nemo_checkpoint={demo.checkpoint}"]
    result = subprocess.run(
        [*command, f"export_config.path={out}", *data, *size],
        capture_output=True,
        text=True,
        env=environment,
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    outcomes = json.loads((out / "sweep.json").read_text())
    assert [outcome["algorithm"] for outcome in outcomes] == ["fp8", "int8_sq"]
    assert all(0.9 < outcome["recovery"] < 1.1 for outcome in outcomes)
    runs = read_runs(home)
    assert [(run.job, run.state) for run in runs] == [("fp8", SUCCEEDED), ("int8_sq", SUCCEEDED)]
    assert len({run.id for run in runs}) == 1


def test_a_recipe_of_another_name_is_of_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["llama3_8b_fp8", "llama3_8b_int4_awq", "llama3_8b_nvfp4", "llama3_8b_of_mine"]
    monkeypatch.setattr("nemo_ptq.launch.sweep.recipe_names", lambda: names)
    assert list(recipes_of("llama3_8b")) == ["fp8", "int4_awq", "nvfp4"]
