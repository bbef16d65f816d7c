# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""`nemo-ptq run` is the task of `nemo llm ptq`, sooner: the same arguments, checks and recipes."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.startup import seconds_to_first_line
from nemo_ptq.cli import app
from nemo_ptq.job import Job
from nemo_ptq.launch import run_context, start
from tests.conftest import Demo


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs that would have been run in this process."""
    ran: list[Job] = []
    monkeypatch.setattr(start, "start", ran.append)
    return ran


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that would have taken this process's place."""
    executed: list[list[str]] = []

    def execve(path: str, command: list[str], environment: Any) -> None:
        assert environment["PYTHONSAFEPATH"] == "1"  # whatever lies in the working directory
        executed.append(command)

    monkeypatch.setattr(os, "execve", execve)
    return executed


@pytest.fixture
def sound(demo: Demo, tmp_path: Path) -> list[str]:
    return [f"nemo_checkpoint={demo.checkpoint}", f"export_config.path={tmp_path}/out"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["nemo-ptq", "run", *arguments])
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_the_first_line_comes_at_once(demo: Demo, tmp_path: Path) -> None:
    assert seconds_to_first_line(["nemo-ptq", "run"], str(tmp_path)) < 6


def test_a_job_for_one_process_runs_in_this_one(
    sound: list[str], jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["quantization_config.sq_alpha=0.7", "quantization_config.enable_kv_cache=off"]
    assert run(monkeypatch, *sound, *settings, "quantization_config.algorithm=int8_sq") == 0
    (job,) = jobs
    assert job.output == tmp_path / "out"
    assert (job.quantization.algorithm, job.quantization.sq_alpha) == ("int8_sq", 0.7)
    assert job.quantization.enable_kv_cache is False


def test_arguments_come_after_those_of_a_recipe(
    sound: list[str], jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    for option in (["--factory", "llama3_70b_int8_sq"], ["--yaml", "recipes/llama3_70b_int8_sq.yaml"]):
        changed = ["calibration_tp=1", "export_config.inference_tp=1"]
        assert run(monkeypatch, *option, *sound, *changed) == 0
    assert jobs[0] == jobs[1]
    assert jobs[0].quantization.sq_alpha == 0.85


def test_all_problems_at_once(
    sound: list[str], jobs: list[Job], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = ["--factory", "llama3_8b_fp9", "--legacy-ckpt", "calibration_tpp=2", "calibration_tp=two", "devices+=1"]
    assert run(monkeypatch, *wrong, *sound, "export_config.inference_tp=3") == 2
    errors = [line.removeprefix("Error: ") for line in capsys.readouterr().err.splitlines()]
    starts = [
        "llama3_8b_fp9 is not a recipe: did you mean llama3_8b_fp8?",
        "--legacy-ckpt is not an option: did you mean legacy_ckpt?",
        "calibration_tpp is not an option: did you mean calibration_tp?",
        "devices+=1 is for `nemo llm ptq`",
        "calibration_tp='two' is not valid",
        "export_config.inference_tp=3 does not divide",
    ]
    assert [error.startswith(start) for error, start in zip(errors, starts, strict=True)] == [True] * len(starts)
    assert not jobs


@pytest.mark.parametrize(
    ("arguments", "processes"), [(["calibration_tp=2"], 2), (["calibration_tp=2", "--nproc", "4"], 4)]
)
def test_torchrun_takes_over_for_several_processes(
    arguments: list[str],
    processes: int,
    sound: list[str],
    jobs: list[Job],
    commands: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert run(monkeypatch, *sound, *arguments) == 0
    (command,) = commands
    assert f"--nproc_per_node={processes}" in command
    assert command[-len(arguments) - 4 :] == ["nemo_ptq", "run", *sound, *arguments]
    assert not jobs


def test_wrong_numbers_of_processes(
    sound: list[str], commands: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *sound, "calibration_tp=2", "--nproc", "3") == 2
    error = capsys.readouterr().err
    assert "world size 3 is not a multiple of calibration_tp=2" in error
    assert "start 2 processes (--nproc 2)" in error
    assert not commands


def test_a_rank_runs_the_job(
    sound: list[str], jobs: list[Job], commands: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(monkeypatch, *sound, "calibration_tp=2") == 0
    assert [job.calibration_tp for job in jobs] == [2]
    assert not commands


def test_an_executor_makes_it_an_experiment(sound: list[str], jobs: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[Any] = []
    monkeypatch.setattr(run_context, "run_experiment", lambda task, executor, **_: launched.append(executor))
    assert run(monkeypatch, *sound, "calibration_tp=2", "run.executor=torchrun") == 0
    assert [executor.ntasks_per_node for executor in launched] == [2]
    assert not jobs


def test_an_executor_that_does_not_exist(
    sound: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *sound, "run.executor=torchrn") == 2
    assert "run.executor=torchrn is not known: did you mean torchrun?" in capsys.readouterr().err
