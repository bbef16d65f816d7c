# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Jobs with one path: the second is refused in one line, and what changes while a job runs is not lost."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from nemo_ptq.checkpoint.staging import reserved
from nemo_ptq.errors import PtqError
from tests.conftest import Demo
from tests.engine.test_run import arguments, run_task
from tests.ranks import run_ranks


def refusal(task: dict[str, Any]) -> str:
    """Why a job is not done on this rank."""
    from nemo_ptq.plan.rules import catalogue, paths

    # As where the other job begins between the checks of this one and its first step.
    rules = tuple(rule for rule in catalogue.RULES if rule not in (paths.output_is_not_in_use, paths.output_is_free))
    with patch.object(catalogue, "RULES", rules):
        try:
            return f"not refused: {run_task(task)}"
        except PtqError as error:
            return str(error)
        except SystemExit as ending:
            return f"silent, status {ending.code}"


def test_the_second_job_is_refused_and_only_rank_0_says_so(demo: Demo, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with reserved(output):
        before = [path.name for path in tmp_path.iterdir()]
        for resume in (False, True):
            task = arguments(demo, output, calibration_tp=2, export={"resume": resume})
            first, other = run_ranks(refusal, 2, task)
            assert first.startswith(f"{output} is being written by process ")
            assert "\n" not in first
            assert other == "silent, status 1"
        assert [path.name for path in tmp_path.iterdir()] == before


def test_a_job_that_was_checked_before_another_one_ended_is_refused(demo: Demo, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "config.json").write_text("the other job's")
    (said,) = run_ranks(refusal, 1, arguments(demo, output))
    assert said.startswith(f"export_config.path={output} exists: choose another")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def refusal_after_a_change(task: dict[str, Any], output: Path) -> str:
    """Why a job fails beside whose output a user puts something while it runs."""
    from nemo_ptq.engine import finish

    write_report = finish.write_report

    def interrupt(*report: Any) -> None:
        write_report(*report)
        (output / "notes").mkdir(parents=True)
        (output / "notes" / "today.txt").write_text("precious")

    with patch.object(finish, "write_report", interrupt):
        return refusal(task)


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_a_user_adds_while_a_job_runs_is_kept(overwrite: bool, demo: Demo, tmp_path: Path) -> None:
    output = tmp_path / "out"
    if overwrite:
        run_ranks(run_task, 1, arguments(demo, output))
    task = arguments(demo, output, export={"overwrite": overwrite})
    (said,) = run_ranks(refusal_after_a_change, 1, task, output)
    assert said.startswith(f"{output} {'was changed' if overwrite else 'appeared'} while this job ran")
    assert (output / "notes" / "today.txt").read_text() == "precious"
    assert (output / "config.json").exists() == overwrite
    # The calibration was not for nothing. A job that took long has finished blocks to go on from beside it.
    left = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".out.partial-")}
    assert left == {"out", "out.calibration.safetensors"}
