# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""`nemo llm ptq` checks everything before it starts anything, and its exit status says how it ended."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fiddle as fdl
import nemo_run as run
import numpy as np
import pytest
from safetensors.numpy import save_file

from nemo_ptq.checkpoint.metadata import read_metadata
from nemo_ptq.checkpoint.staging import begin
from nemo_ptq.config import QuantizationConfig
from nemo_ptq.errors import JobFailed, PtqError
from nemo_ptq.export.leftover import PROGRESS
from nemo_ptq.job import Job
from nemo_ptq.launch import executors, run_context
from nemo_ptq.launch.run_context import PtqRunContext
from nemo_ptq.models.spec import ModelSpec
from nemo_ptq.plan import rules
from nemo_ptq.plan.rules import check_job
from nemo_ptq.quantization.state_entries import expected_shapes
from nemo_ptq.quantization.state_header import IN_EXPORT, StateHeader
from nemo_ptq.task import ptq
from tests.conftest import Demo


@pytest.fixture(scope="module", autouse=True)
def registered_executors() -> None:
    executors.register()


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[run.Partial, run.Executor]]:
    """The experiments that would have been run."""
    experiments: list[tuple[run.Partial, run.Executor]] = []
    monkeypatch.setattr(
        run_context, "run_experiment", lambda task, executor, **options: experiments.append((task, executor))
    )
    return experiments


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Job]]:
    """The jobs that would have been run in this process."""
    ran: list[Job] = []
    monkeypatch.setitem(sys.modules, "nemo_ptq.engine.run", SimpleNamespace(run_job=ran.append))
    yield ran


@pytest.fixture
def sound(demo: Demo, tmp_path: Path) -> list[str]:
    data = f"quantization_config.calibration_dataset={demo.calibration}"
    return [f"nemo_checkpoint={demo.checkpoint}", f"export_config.path={tmp_path}/out", data]


def execute(*arguments: str, **options: Any) -> None:
    PtqRunContext(name="ptq", **options).cli_execute(ptq, list(arguments))


def errors_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    with pytest.raises(SystemExit) as caught:
        execute(*arguments)
    assert caught.value.code == 2
    errors = capsys.readouterr().err.splitlines()
    assert all(line.startswith("Error: ") for line in errors)
    return [line.removeprefix("Error: ") for line in errors]


def test_all_problems_are_printed_one_line_each(
    sound: list[str], launched: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    errors = errors_of(
        capsys,
        *sound,
        "calibration_tpp=2",
        "calibration_tp=two",
        "quantization_config.algorithm=fp9",
        "export_config.inference_tp=3",
        "run.executor=torchrn",
        "run.exekutor=x",
    )
    starts = [
        "calibration_tpp is not an option: did you mean calibration_tp?",
        "run.exekutor=x is not an option: did you mean run.executor?",
        "run.executor=torchrn is not known: did you mean torchrun?",
        "calibration_tp='two' is not valid",
        "quantization_config.algorithm=fp9 is not known: did you mean fp8?",
        "export_config.inference_tp=3 does not divide",
    ]
    assert [error.startswith(start) for error, start in zip(errors, starts, strict=True)] == [True] * len(starts)
    assert not launched


@pytest.mark.parametrize(
    ("argument", "error"),
    [
        ("run.executor.ntasks_per_nod=2", "is not a setting of torchrun: did you mean ntasks_per_node?"),
        ("run.executor.ntasks_per_node=two", "run.executor.ntasks_per_node=two is not valid: "),
        ("run.executor.ntasks_per_node=3", "world size 3 is not a multiple of calibration_tp=2 * calibration_pp=1 = 2"),
        ("run.executor.ntasks_per_node=3", "start 2 processes (run.executor.ntasks_per_node=2)"),
    ],
)
def test_wrong_settings_of_an_executor(
    argument: str, error: str, sound: list[str], launched: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (found,) = errors_of(capsys, *sound, "calibration_tp=2", "run.executor=torchrun", argument)
    assert error in found
    assert not launched


def test_settings_without_an_executor(sound: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert errors_of(capsys, *sound, "calibration_tp=2", "run.executor.ntasks_per_node=2") == [
        "run.executor.ntasks_per_node=2 needs an executor: add run.executor=torchrun"
    ]


def test_no_executor_for_two_ranks(sound: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (error,) = errors_of(capsys, *sound, "calibration_tp=2")
    assert "start 2 processes (run.executor=torchrun run.executor.ntasks_per_node=2" in error


def test_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    errors = errors_of(capsys, "export_config.inference_tp=0")
    assert [error.partition(" is ")[0] for error in errors] == [
        "export_config.path",
        "export_config.inference_tp=0",
        "nemo_checkpoint",
    ]


def test_a_wrong_value_in_a_yaml_file_is_one_line(
    sound: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("_target_: nemo_ptq.task.ptq\ncalibration_tp: two\n")
    with pytest.raises(SystemExit) as caught:
        execute(*sound, yaml=str(file))
    assert caught.value.code == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "'two'" in error


def test_a_job_goes_to_its_executor_with_absolute_paths(
    demo: Demo, tmp_path: Path, launched: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoint").symlink_to(demo.checkpoint)
    (tmp_path / "data.txt").write_text("some text\n")
    execute(
        "model_path=checkpoint",
        "calibration_tp=2",
        "calibration_pp=2",
        "quantization_config.algorithm=int8_sq",
        "quantization_config.calibration_dataset=data.txt",
        "export_config.path=out",
        "run.executor=torchrun",
    )
    ((task, executor),) = launched
    arguments = fdl.build(task).keywords
    assert arguments["nemo_checkpoint"] == str(tmp_path / "checkpoint")
    assert arguments["quantization_config"].calibration_dataset == str(tmp_path / "data.txt")
    assert arguments["quantization_config"].algorithm == "int8_sq"
    assert arguments["export_config"].path == str(tmp_path / "out")
    assert executors.world_size(executor) == 4  # as many as the calibration needs


def write_state(directory: Path, metadata: ModelSpec) -> Path:
    """The calibration of an fp8 export of a checkpoint, of ones."""
    header = StateHeader("/then", "", metadata.identity, "llama", QuantizationConfig(), {"algorithm": "max"}, {})
    file = directory / IN_EXPORT
    file.parent.mkdir(parents=True)
    amaxes = {name: np.ones(shape, np.float32) for name, shape in expected_shapes(header, metadata).items()}
    save_file(amaxes, file, header.to_metadata())
    return file


def test_a_saved_calibration_goes_along(demo: Demo, tmp_path: Path, sound: list[str], launched: list[Any]) -> None:
    state = write_state(tmp_path / "before", read_metadata(demo.checkpoint))
    checkpoint, output, _ = sound
    execute(checkpoint, output, f"calibration_state={state}", "run.executor=torchrun")
    ((task, _),) = launched
    assert task.calibration_state == str(state)


def test_a_quantized_checkpoint_keeps_its_calibration_to_itself(
    demo: Demo, tmp_path: Path, launched: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = replace(read_metadata(demo.checkpoint), is_quantized=True)
    monkeypatch.setattr(rules.gathering, "read_metadata", lambda _: metadata)
    monkeypatch.setattr(rules.gathering, "read_model", lambda _, allowed: None)
    checkpoint = tmp_path / "quantized"
    (checkpoint / "weights" / "modelopt_state").mkdir(parents=True)
    write_state(checkpoint, metadata)
    execute(f"nemo_checkpoint={checkpoint}", f"export_config.path={tmp_path}/out", "run.executor=torchrun")
    ((task, _),) = launched
    job = check_job(**fdl.build(task).keywords, world_size=1)  # as each rank does
    assert job.calibration_state == checkpoint / IN_EXPORT
    assert job.arguments["calibration_state"] is None


def test_containers_must_see_every_file(
    sound: list[str], tmp_path: Path, launched: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tokenizer").mkdir()
    for file in ("tokenizer_config.json", "tokenizer.json"):
        (tmp_path / "tokenizer" / file).write_text('{"model": {"vocab": {}}}')
    fp8 = {"num_bits": [4, 3]}
    quantizers = {"default": {"enable": False}, "*weight_quantizer": fp8, "*input_quantizer": fp8}
    (tmp_path / "own.json").write_text(json.dumps({"quant_cfg": quantizers, "algorithm": "max"}))
    (tmp_path / "data.txt").write_text("some text\n")
    options = {
        "tokenizer_path": tmp_path / "tokenizer",
        "quantization_config.algorithm": tmp_path / "own.json",
        "quantization_config.calibration_dataset": tmp_path / "data.txt",
    }
    slurm = ["run.executor=slurm", "run.executor.container_image=x"]
    errors = errors_of(capsys, *sound, *(f"{option}={path}" for option, path in options.items()), *slurm)
    named = ["nemo_checkpoint", "export_config.path", *options]
    assert [error.partition(" make ")[2].partition("=")[0] for error in errors] == named
    assert not launched


def test_the_users_number_of_tasks_is_kept(sound: list[str], launched: list[Any]) -> None:
    execute(*sound, "run.executor=torchrun", "run.executor.ntasks_per_node=2")
    ((_, executor),) = launched
    assert executor.ntasks_per_node == 2


def test_slurm_takes_the_nodes_that_the_calibration_needs(sound: list[str], launched: list[Any]) -> None:
    settings = {"account": "acct", "gpus_per_node": 2, "env_vars.a": "b c", "container_image": "x", "qos": "high"}
    arguments = [f"run.executor.{name}={value}" for name, value in settings.items()]
    mounts = "run.executor.container_mounts=/:/"
    execute(*sound, "calibration_tp=2", "calibration_pp=2", "run.executor=slurm", *arguments, mounts)
    ((_, executor),) = launched
    assert isinstance(executor, run.SlurmExecutor)
    assert (executor.nodes, executor.ntasks_per_node, executor.gpus_per_node) == (2, 2, 2)
    assert (executor.account, executor.qos, executor.container_mounts) == ("acct", "high", ["/:/"])
    assert "export a='b c'" in str(executor.setup_lines)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["nodes=3"], "world size 6 is not a multiple of calibration_tp=2 * calibration_pp=2 = 4"),
        (["nodes=3"], "start 4 processes (run.executor.nodes * run.executor.ntasks_per_node = 4)"),
        (["nodes=1", "gpus_per_node=2"], "ntasks_per_node=4 is more than run.executor.gpus_per_node=2"),
        (["ntask_per_node=1"], "run.executor.ntask_per_node is not a setting of slurm: did you mean ntasks_per_node?"),
        (["tunnel=login1"], "run.executor.tunnel=login1 is not valid: it must be local or ssh://user@host"),
        (["container_image=x"], "does not make nemo_checkpoint="),
    ],
)
def test_what_slurm_would_refuse_later(
    arguments: list[str], error: str, sound: list[str], launched: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [f"run.executor.{argument}" for argument in arguments]
    found, *_ = errors_of(capsys, *sound, "calibration_tp=2", "calibration_pp=2", "run.executor=slurm", *settings)
    assert error in found
    assert not launched


@pytest.mark.parametrize("executor", ["local", "torchrun"])
def test_what_ends_with_the_command_cannot_be_left(
    executor: str, sound: list[str], launched: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        execute(*sound, f"run.executor={executor}", detach=True)
    assert "--detach needs an executor that can be left, such as slurm" in capsys.readouterr().err
    assert not launched
    execute(*sound, "run.executor=slurm", detach=True)
    assert launched


@pytest.mark.parametrize("setting", ["env_vars.A=0x1", "env_vars={'A': '0x1'}"])
def test_environment_variables_are_added(setting: str, sound: list[str], launched: list[Any]) -> None:
    execute(*sound, "run.executor=torchrun", f"run.executor.{setting}")
    ((_, executor),) = launched
    assert executor.env_vars["A"] == "0x1"
    assert "PATH" in executor.env_vars


def test_environment_variables_of_an_executor_without_any(sound: list[str], launched: list[Any]) -> None:
    @run.cli.factory(target=run.Executor)
    def bare_executor_of_this_test() -> run.Config[run.LocalExecutor]:
        return run.Config(run.LocalExecutor)

    execute(*sound, "run.executor=bare_executor_of_this_test", "run.executor.env_vars.A=1")
    ((_, executor),) = launched
    assert executor.env_vars == {"A": "1"}


def test_a_dry_run_starts_nothing(sound: list[str], launched: list[Any], jobs: list[Job]) -> None:
    execute(*sound, dryrun=True)
    execute(*sound, "run.executor=torchrun", dryrun=True)
    assert not launched
    assert not jobs


def test_a_config_is_written_instead_of_run(sound: list[str], tmp_path: Path, jobs: list[Job]) -> None:
    file = tmp_path / "job.yaml"
    execute(*sound, "quantization_config.sq_alpha=0.8", to_yaml=str(file))
    assert "sq_alpha: 0.8" in file.read_text()
    assert not jobs


def test_a_config_is_read_from_a_file(sound: list[str], tmp_path: Path, jobs: list[Job]) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("_target_: nemo_ptq.task.ptq\nquantization_config:\n  sq_alpha: 0.8\n  algorithm: int8_sq\n")
    execute(*sound, "quantization_config.sq_alpha=0.7", yaml=str(file))
    ((algorithm, alpha),) = [(job.quantization.algorithm, job.quantization.sq_alpha) for job in jobs]
    assert (algorithm, alpha) == ("int8_sq", 0.7)


def test_without_an_executor_the_job_runs_here(sound: list[str], tmp_path: Path, jobs: list[Job]) -> None:
    execute(*sound, "export_config.inference_tp=2")
    (job,) = jobs
    assert (job.output, job.export.inference_tp) == (tmp_path / "out", 2)


def test_a_job_that_fails_exits_with_status_1(
    sound: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise PtqError("job ptq ended as FAILED on rank 1")

    monkeypatch.setattr(run_context, "run_experiment", fail)
    with pytest.raises(SystemExit) as caught:
        execute(*sound, "run.executor=local")
    assert caught.value.code == 1
    assert capsys.readouterr().err == "Error: job ptq ended as FAILED on rank 1\n"


def test_a_job_that_fails_in_this_process_exits_with_status_1(
    sound: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(job: Job) -> None:
        raise PtqError("no space left")

    monkeypatch.setitem(sys.modules, "nemo_ptq.engine.run", SimpleNamespace(run_job=fail))
    with pytest.raises(SystemExit) as caught:
        execute(*sound)
    assert caught.value.code == 1
    assert capsys.readouterr().err == "Error: no space left\n"


@pytest.mark.parametrize(
    ("error", "blocks", "left"),
    [(JobFailed("killed"), 0, 0), (JobFailed("killed"), 3, 1), (PtqError("who knows"), 0, 1)],
)
def test_a_job_that_was_killed_leaves_what_can_be_continued(
    error: PtqError,
    blocks: int,
    left: int,
    sound: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        journal = begin(tmp_path / "out").journal
        journal.mkdir()
        (journal / PROGRESS).write_text(json.dumps({"next_block": blocks}))
        raise error

    monkeypatch.setattr(run_context, "run_experiment", fail)
    with pytest.raises(SystemExit):
        execute(*sound, "run.executor=torchrun")
    assert len(list(tmp_path.iterdir())) == left
    assert ("3 finished blocks are kept: repeat the command" in capsys.readouterr().err) == bool(blocks)


def test_plan_only_prints_the_plan_and_starts_nothing(
    sound: list[str], launched: list[Any], jobs: list[Job], capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, status in (((), 0), (("calibration_tp=3",), 1)):
        with pytest.raises(SystemExit) as ended:
            execute(*sound, "plan_only=true", "plan_device=B200", "run.executor=torchrun", *arguments)
        assert ended.value.code == status
        printed = capsys.readouterr().out
        assert ("✗" in printed) == bool(status)
        assert "B200" in printed
    assert not launched and not jobs
