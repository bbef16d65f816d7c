# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A file system without room is a line; any other error of the system is a defect, and stays what it is."""

import errno
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from nemo_ptq.config import ExportConfig, QuantizationConfig
from nemo_ptq.errors import PtqError
from nemo_ptq.job import Job
from nemo_ptq.launch.start import start
from nemo_ptq.plan.rules import check_job
from tests.conftest import Demo


@pytest.mark.parametrize(
    ("number", "file", "said"),
    [
        (errno.ENOSPC, None, "out cannot be written: No space left on device; free some"),
        (errno.EFBIG, "/data/rank0", "/data/rank0 cannot be written: File too large; free some"),
        (errno.EACCES, "/data/rank0", "/data/rank0 cannot be written: Permission denied; choose another"),
        (errno.ENOENT, "/data/rank0", None),
    ],
)
def test_a_full_disk_is_a_line(
    number: int, file: str | None, said: str | None, demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(job: Job) -> None:
        raise OSError(number, os.strerror(number), file)

    monkeypatch.setitem(sys.modules, "nemo_ptq.engine.run", SimpleNamespace(run_job=fail))
    quantization = QuantizationConfig(calibration_dataset=str(demo.calibration))
    export = ExportConfig(str(tmp_path / "out"))
    job = check_job(
        nemo_checkpoint=demo.checkpoint, quantization_config=quantization, export_config=export, world_size=1
    )
    with pytest.raises(PtqError if said else FileNotFoundError, match=said):
        start(job)
