# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A model that loses more than the user allows: the job fails, and nothing is put in place unless asked."""

import io
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from nemo_ptq.config import ExportConfig, QuantizationConfig
from nemo_ptq.console.reporter import Reporter
from nemo_ptq.engine.finish import finish, say_conclusion
from nemo_ptq.engine.reservation import reserve
from nemo_ptq.errors import PtqError, RecoveryError
from nemo_ptq.export.leftover import PROGRESS
from nemo_ptq.job import Job
from nemo_ptq.report.compose import with_quality
from nemo_ptq.report.records import read_report
from nemo_ptq.report.write import REPORT
from tests.conftest import Demo
from tests.plan.models import LLAMA_8B
from tests.ranks import run_ranks
from tests.report.examples import quality, report

WORSE, BETTER = with_quality(report(), quality(0.8)), with_quality(report(), quality(0.97))


def job_of(output: Path, **export: Any) -> Job:
    settings = ExportConfig(str(output), export_format="trtllm", **export)
    return Job(output, LLAMA_8B, output, QuantizationConfig("int4_awq"), settings, "llama")


def end(job: Job, monkeypatch: pytest.MonkeyPatch, found: Any = WORSE) -> tuple[str | None, list[str]]:
    """Ends a job whose files are sound; returns the error, and what was said."""
    monkeypatch.setattr("nemo_ptq.engine.finish.verify", lambda _, checksums: [])
    said, failure = io.StringIO(), None
    reporter = Reporter(True, Console(file=said, width=2000))
    try:
        with reserve(job, reporter) as staging:
            staging.files.mkdir(exist_ok=True)
            journal = staging.journal
            journal.mkdir(parents=True, exist_ok=True)
            (journal / PROGRESS).write_text('{"next_block": 3}')  # which is no use any more
            done = finish(job, staging, {"trtllm": {}}, lambda *_: found, reporter)
        say_conclusion(job, done, reporter)
    except RecoveryError as error:
        failure = str(error)
    return failure, said.getvalue().splitlines()


@pytest.fixture
def measured() -> Any:
    asked = replace(WORSE.summary, required_recovery=0.9)
    return replace(WORSE, summary=asked)


def test_below_it_nothing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: Any) -> None:
    output = tmp_path / "out"
    error, _ = end(job_of(output, min_recovery=0.9), monkeypatch, measured)
    assert error is not None
    assert error.startswith("export_config.min_recovery=0.9: fail: recovery 0.8000, at least 0.9 required; fc2 of")
    assert error.endswith(f"{output} was not made; export_config.keep_failed=true makes it all the same")
    assert list(tmp_path.iterdir()) == []


def test_what_is_asked_for_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: Any) -> None:
    output = tmp_path / "out"
    error, said = end(job_of(output, min_recovery=0.9, keep_failed=True), monkeypatch, measured)
    assert error is not None and error.endswith(f"{output} is kept, as export_config.keep_failed=true says")
    assert said[-2] == f"{output} is ready" and said[-1].startswith("fail: recovery 0.8000")
    assert output.is_dir()


@pytest.mark.parametrize(
    ("export", "found", "line"),
    [
        ({}, WORSE, "fail: recovery 0.8000"),
        ({}, BETTER, "pass: recovery 0.9700"),
        ({"min_recovery": 0.9}, BETTER, "pass"),
    ],
)
def test_otherwise_the_last_line_says_what_the_report_says(
    export: dict[str, Any], found: Any, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error, said = end(job_of(tmp_path / "out", **export), monkeypatch, found)
    assert error is None and said[-1].startswith(line)
    assert (tmp_path / "out").is_dir()


def run_all(demo: Demo, exports: list[ExportConfig]) -> list[tuple[str | None, list[str]]]:
    """Runs a job for each; returns the error, and what was said."""
    from nemo_ptq.engine.run import run_job
    from nemo_ptq.plan.rules import check_job

    outcomes: list[tuple[str | None, list[str]]] = []
    for export in exports:
        quantization = QuantizationConfig(
            "nvfp4",
            calibration_dataset="builtin",
            calibration_dataset_size=8,
            calibration_batch_size=8,
            calibration_seq_len=32,
        )
        job = check_job(
            nemo_checkpoint=str(demo.checkpoint), quantization_config=quantization, export_config=export, world_size=1
        )
        failure = None
        with redirect_stdout(io.StringIO()) as said:
            try:
                run_job(job)
            except PtqError as error:
                failure = str(error)
        outcomes.append((failure, said.getvalue().splitlines()))
    return outcomes


@pytest.mark.slow
def test_what_is_lost_decides(demo: Demo, tmp_path: Path) -> None:
    strict, kept, lenient = (str(tmp_path / name) for name in ("strict", "kept", "lenient"))
    exports = [
        ExportConfig(strict, min_recovery=1.0),
        ExportConfig(kept, min_recovery=1.0, keep_failed=True),
        ExportConfig(lenient, min_recovery=0.1),
    ]
    ((failed, failed_and_kept, passed),) = run_ranks(run_all, 1, demo, exports)

    error, said = failed
    assert error is not None and error.startswith("export_config.min_recovery=1.0: fail: recovery 0.")
    assert error.endswith(f": {strict} was not made; export_config.keep_failed=true makes it all the same")
    assert "try " in error
    assert not Path(strict).exists() and not list(tmp_path.glob(".strict*"))
    assert (tmp_path / "strict.calibration.safetensors").exists()
    assert f"the calibration is kept in {strict}.calibration.safetensors" in said[-1]

    error, said = failed_and_kept
    assert error is not None and error.endswith(f": {kept} is kept, as export_config.keep_failed=true says")
    assert said[-2] == f"{kept} is ready" and said[-1].startswith("fail: recovery 0.")
    summary = read_report(Path(kept) / REPORT).summary
    assert summary.passed is False and summary.required_recovery == 1.0

    error, said = passed
    assert error is None
    assert said[-1].startswith("pass: recovery 0.") and said[-1].endswith("at least 0.1 required")
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] and (Path(lenient) / REPORT).exists()
