# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A model that loses more than the user allows: the job fails, and nothing is put in place unless asked."""

import io
from contextlib import redirect_stdout
from pathlib import Path

from nemo_ptq.config import ExportConfig, QuantizationConfig
from nemo_ptq.errors import PtqError
from nemo_ptq.report.records import read_report
from nemo_ptq.report.write import REPORT
from tests.conftest import Demo
from tests.ranks import run_ranks


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
    assert said[-1].startswith("pass: recovery 0.") and said[-1].endswith("and at least 0.1 is wanted")
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] and (Path(lenient) / REPORT).exists()
