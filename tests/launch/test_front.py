# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What all front doors do alike: every problem at once, a plan in place of a job, and how a command ends."""

from pathlib import Path

import pytest

from nemo_ptq.config import ExportConfig, QuantizationConfig
from nemo_ptq.errors import ConfigError, PtqError
from nemo_ptq.launch import front


def test_problems_of_spelling_come_before_those_of_the_job(tmp_path: Path) -> None:
    arguments = {
        "nemo_checkpoint": str(tmp_path / "nowhere"),
        "quantization_config": QuantizationConfig("fp9"),
        "export_config": ExportConfig(str(tmp_path / "out")),
    }
    with pytest.raises(ConfigError) as caught:
        front.check(arguments, ["calib_tp is not an option"], world_size=1)
    first, *others = caught.value.problems
    assert first == "calib_tp is not an option"
    assert any(problem.startswith("quantization_config.algorithm=fp9 is not known") for problem in others)
    assert any("nowhere does not exist" in problem for problem in others)


def test_no_plan_is_made_of_what_is_spelled_wrongly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = {"nemo_checkpoint": str(tmp_path), "plan_only": True}
    with pytest.raises(ConfigError, match="calib_tp is not an option"):
        front.check(arguments, ["calib_tp is not an option"], world_size=1)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("error", "status", "lines"),
    [
        (ConfigError(["a=1 is wrong", "b=2 too"]), 2, "Error: A=1 is wrong\nError: b=2 too\n"),
        (PtqError("a disk is full"), 1, "Error: A disk is full\n"),
    ],
)
def test_an_error_ends_a_command(error: PtqError, status: int, lines: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        front.end_with(error, lambda problem: "A" + problem[1:] if problem.startswith("a") else problem)
    assert ended.value.code == status
    assert capsys.readouterr().err == lines
