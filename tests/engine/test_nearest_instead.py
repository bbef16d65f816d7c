# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Quality "max" falls back to nearest codes where these come nearer on held-out samples: files, report and words."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nemo_ptq.config import ExportConfig, QuantizationConfig
from nemo_ptq.engine.reexport import run_reexport
from nemo_ptq.plan.rules import check_job
from nemo_ptq.report.records import read_report
from nemo_ptq.report.write import REPORT
from nemo_ptq.verify.checks import verify
from tests.engine.test_resume import impatient
from tests.files import digests
from tests.ranks import run_ranks

CALIBRATION: dict[str, Any] = {
    "calibration_dataset": "builtin",
    "calibration_dataset_size": 32,
    "calibration_batch_size": 8,
    "calibration_seq_len": 64,
}


@contextmanager
def nearest_is_better() -> Iterator[None]:
    """Has the comparison of the models end for rounding to nearest; that of blocks is what it is."""
    from unittest.mock import patch

    from nemo_ptq.calibration.held_out import HeldOutError
    from nemo_ptq.calibration.rounding_learner import RoundingLearner

    def compare(learner: RoundingLearner) -> None:
        learner.found = HeldOutError(0.2, 0.3), HeldOutError(0.1, 0.2)

    with patch.object(RoundingLearner, "_compare_models", compare):
        yield


def run_all(checkpoint: Path, root: Path, qualities: list[str]) -> str:
    """Runs a job of each quality in this process; returns what is said."""
    from nemo_ptq.engine.run import run_job

    with redirect_stdout(io.StringIO()) as said, nearest_is_better(), impatient():
        for quality in qualities:
            quantization = QuantizationConfig("fp8", quality=quality, evaluation_dataset_size=2, **CALIBRATION)
            export = ExportConfig(str(root / quality), export_format=["compressed_tensors", "trtllm"])
            run_job(
                check_job(
                    nemo_checkpoint=str(checkpoint),
                    quantization_config=quantization,
                    export_config=export,
                    world_size=1,
                )
            )
    return said.getvalue()


def test_the_files_are_written_again(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    (said,) = run_ranks(run_all, 1, checkpoint_of("llama31"), tmp_path, ["fast", "max"])
    assert "held-out samples: 0.2000 (worst 0.3000); rounded to nearest throughout: 0.1000 (worst 0.2000), which" in (
        " ".join(said.split())
    )
    assert "all layers are rounded to nearest" in " ".join(said.split())
    directory = tmp_path / "max" / "compressed_tensors"
    for name in ("compressed_tensors", "trtllm"):
        assert [check for check in verify(tmp_path / "max" / name) if not check.ok] == []
    report = read_report(directory / REPORT)
    assert {layer.rounding for layer in report.layers} == {"nearest"}
    assert report.quality is not None
    assert "max; all layers rounded to nearest" in (directory / "ptq" / "README.md").read_text()
    assert not list(tmp_path.glob(".max*"))

    # FP8 has one way to round a weight to nearest, which is that of quality "fast".
    ours, fast = (load_file(tmp_path / name / "compressed_tensors" / "model.safetensors") for name in ("max", "fast"))
    weights = [name for name in fast if name.endswith(("_proj.weight", "_proj.weight_scale"))]
    assert len(weights) == 28
    assert all(torch.equal(ours[name].float(), fast[name].float()) for name in weights)

    again = tmp_path / "again"
    export = ExportConfig(str(again), export_format="compressed_tensors")
    run_reexport(check_job(world_size=1, calibration_state=directory, export_config=export))
    before, after = digests(directory), digests(again)
    assert [file for file in before if file.endswith(".safetensors") and before[file] != after[file]] == []


@pytest.mark.slow
def test_over_shards_and_stages(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    run_ranks(run_sharded, 4, checkpoint_of("llama31"), tmp_path, timeout=600)
    directory = tmp_path / "out"
    assert [check for check in verify(directory) if not check.ok] == []
    assert {layer.rounding for layer in read_report(directory / REPORT).layers} == {"nearest"}


def run_sharded(checkpoint: Path, root: Path) -> None:
    from nemo_ptq.engine.run import run_job

    quantization = QuantizationConfig("int8_sq", quality="max", evaluation_dataset_size=0, **CALIBRATION)
    job = check_job(
        nemo_checkpoint=str(checkpoint),
        quantization_config=quantization,
        export_config=ExportConfig(str(root / "out"), export_format="compressed_tensors"),
        world_size=4,
        calibration_tp=2,
        calibration_pp=2,
    )
    with nearest_is_better():
        run_job(job)
