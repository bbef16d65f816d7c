# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Another export from a saved calibration: the same bytes, no data, and one line where it cannot be."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nemo_ptq.cli.app import app
from nemo_ptq.config import ExportConfig, QuantizationConfig
from nemo_ptq.errors import ConfigError, PtqError
from nemo_ptq.export.formats import FORMATS
from nemo_ptq.plan.rules import check_job
from nemo_ptq.quantization.state_header import read_header, state_file
from nemo_ptq.report.write import FILES
from nemo_ptq.verify.checks import verify
from tests.conftest import Demo
from tests.engine.test_run import arguments, assert_same_tensors, refuse_config, run_task
from tests.files import digests
from tests.matrix import quick_first
from tests.ranks import RankFailed, run_ranks


@pytest.fixture(scope="module")
def exported(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export that was calibrated on two ranks."""
    output = tmp_path_factory.mktemp("exported") / "out"
    run_ranks(run_task, 2, arguments(demo, output, algorithm="int8_sq", calibration_tp=2))
    return output


def again(state: Path, output: Path, **changes: Any) -> dict[str, Any]:
    export = changes.pop("export", {})
    return {"calibration_state": str(state), "export_config": ExportConfig(path=str(output), **export), **changes}


def run_command(words: list[str]) -> tuple[int, str]:
    result = CliRunner().invoke(app, words)
    return result.exit_code, f"{result.output}{result.exception or ''}"


def assert_same_export(direct: Path, again: Path) -> None:
    left, right = digests(direct), digests(again)
    # The manifest names the arguments, which differ, and so does the report, which has measured nothing on text.
    different = {name for name in left.keys() | right.keys() if left.get(name) != right.get(name)}
    assert different <= {"ptq/manifest.json", *map(str, FILES)}
    assert all(check.ok for check in verify(again, load_tokenizer=True))


def test_the_same_bytes_come_out(exported: Path, tmp_path: Path) -> None:
    ((code, text),) = run_ranks(run_command, 1, ["export", str(exported), str(tmp_path / "again")])
    assert code == 0, text
    assert "calibrate:" not in text
    assert_same_export(exported, tmp_path / "again")


@pytest.mark.parametrize(
    "algorithm",
    quick_first(("fp8", "int8_sq", "int4_awq", "w4a8_awq", "nvfp4"), ("int8_sq",)),
)
def test_hugging_face_directories_have_the_same_bytes(demo: Demo, algorithm: str, tmp_path: Path) -> None:
    formats = [format for format in ("hf", "compressed_tensors") if algorithm not in FORMATS[format].refused]
    export = {"export_format": formats}
    run_ranks(run_task, 2, arguments(demo, tmp_path / "out", algorithm=algorithm, calibration_tp=2, export=export))
    for format in formats:
        words = ["export", str(tmp_path / "out" / format), str(tmp_path / format), "--format", format]
        ((code, text),) = run_ranks(run_command, 1, words)
        assert code == 0, text
        assert_same_export(tmp_path / "out" / format, tmp_path / format)


def test_another_layout_has_the_same_tensors(exported: Path, tmp_path: Path) -> None:
    state = exported / "ptq" / "calibration.safetensors"
    export = {"inference_tp": 2, "inference_pp": 2}
    run_ranks(run_task, 4, again(state, tmp_path / "again", export=export, calibration_tp=2, calibration_pp=2))
    assert_same_tensors(exported, tmp_path / "again")
    assert len(list((tmp_path / "again").glob("rank*.safetensors"))) == 4


def test_a_failed_export_keeps_its_calibration(demo: Demo, tmp_path: Path) -> None:
    run_ranks(refuse_config, 1, arguments(demo, tmp_path / "out", algorithm="int4_awq"))
    kept = tmp_path / "out.calibration.safetensors"
    assert [path.name for path in tmp_path.iterdir()] == [kept.name]
    run_ranks(run_task, 1, again(kept, tmp_path / "out"))
    assert all(check.ok for check in verify(tmp_path / "out", load_tokenizer=True))
    assert state_file(tmp_path / "out").read_bytes() == kept.read_bytes()


def die_after_the_walk(task: dict[str, Any]) -> None:
    """Rank 1 dies once the calibration is whole, while the other one verifies."""
    import os
    import time
    from unittest.mock import patch

    from nemo_ptq.task import ptq

    kept = Path(f"{task['export_config'].path}.calibration.safetensors")

    def die(*_: Any) -> None:
        while not kept.exists() or not kept.stat().st_size:
            time.sleep(0.01)
        os._exit(3)

    if os.environ["RANK"] == "1":
        with patch("nemo_ptq.engine.run.calibration_kept", die):
            ptq(**task)
    ptq(**task)


def test_a_lost_rank_leaves_the_calibration(demo: Demo, tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match="rank 1 died"):
        run_ranks(die_after_the_walk, 2, arguments(demo, tmp_path / "out", calibration_tp=2))
    assert read_header(tmp_path / "out.calibration.safetensors").quantization.algorithm == "fp8"


def test_the_job_is_that_of_the_calibration(demo: Demo, exported: Path, tmp_path: Path) -> None:
    job = check_job(**again(exported, tmp_path / "out"), world_size=1)
    assert job.checkpoint == demo.checkpoint
    assert job.quantization.algorithm == "int8_sq"
    assert job.calibration_state == exported / "ptq" / "calibration.safetensors"
    # What NeMo-Run fills in is no wish of the user's.
    assert job == check_job(**again(exported, tmp_path / "out"), quantization_config=QuantizationConfig(), world_size=1)


def problems_of(task: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        check_job(**task, world_size=1)
    return "\n".join(caught.value.problems)


def test_what_does_not_fit_is_one_line(demo: Demo, exported: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(demo.checkpoint, other)
    for file, groups in {
        "model.yaml": "num_query_groups: {}",
        "io.json": '"value": {}, "paths": ["<root>.model.config.num_query_groups"]',
    }.items():
        context = other / "context" / file
        assert groups.format(4) in context.read_text()
        context.write_text(context.read_text().replace(groups.format(4), groups.format(8)))
    out = tmp_path / "out"
    assert "was made of another model (num_query_groups 4, not 8)" in problems_of(
        again(exported, out, nemo_checkpoint=str(other))
    )
    wish = QuantizationConfig("int8_sq", sq_alpha=0.9)
    assert problems_of(again(exported, out, quantization_config=wish)) == (
        "quantization_config.sq_alpha=0.9 with a calibration_state that was made with 0.8: leave it out, or calibrate "
        "without calibration_state"
    )
    assert "nothing is calibrated" in problems_of(again(exported, out, forward_loop=print))
    assert "holds no calibration state" in problems_of(again(exported / "rank0.safetensors", out))
    assert "cannot be read" in problems_of(again(demo.checkpoint, out))


def test_the_command_speaks_of_its_own_flags(exported: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["export", str(exported), str(exported), "--inference-tp", "3"])
    assert isinstance(result.exception, PtqError)
    text = str(result.exception)
    assert "--inference-tp=3 does not divide" in text
    assert f"OUT={exported} exists: choose another, or set --overwrite to replace it" in text


def test_a_state_of_another_version_is_refused(exported: Path, tmp_path: Path) -> None:
    data = state_file(exported).read_bytes()
    assert b'\\"version\\": 1' in data
    (tmp_path / "state.safetensors").write_bytes(data.replace(b'\\"version\\": 1', b'\\"version\\": 2'))
    with pytest.raises(ConfigError, match="is of another nemo_ptq"):
        read_header(tmp_path / "state.safetensors")


def test_headers_survive_the_file(exported: Path) -> None:
    header = read_header(state_file(exported))
    assert header.model["num_layers"] > 0
    assert json.loads(json.dumps(header.to_metadata())) == header.to_metadata()
    assert replace(header, weights="") != header
