# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""An experiment whose rank fails is a failure, and ends with the command that started it."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import nemo_run as run
import pytest

from nemo_ptq.errors import JobFailed, PtqError
from nemo_ptq.launch.executors import local, slurm, torchrun
from nemo_ptq.launch.experiment import describe_failure, processes_needed, run_experiment, run_tasks
from nemo_ptq.launch.front import status_of
from nemo_ptq.parallel.parent import name_of

_TASK = """
import os, sys, time
from pathlib import Path

def work(directory: str, failing_rank: int = -1, seconds: float = 0.0) -> None:
    rank = os.environ.get("RANK", "0")
    Path(directory, rank).write_text(os.environ.get("WORLD_SIZE", "1"))
    Path(directory, "launcher").write_text(os.environ["NEMO_PTQ_LAUNCHER"])
    if int(rank) == failing_rank:
        sys.exit(f"rank {rank} cannot go on")
    time.sleep(seconds)
    Path(directory, rank + ".done").touch()
"""


@pytest.fixture
def task_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with a module that the ranks can import, in a NeMo-Run home of its own."""
    (tmp_path / "task_of_test.py").write_text(_TASK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    previous = run.config.get_nemorun_home()
    run.config.set_nemorun_home(str(tmp_path / "nemo_run"))
    yield tmp_path
    run.config.set_nemorun_home(previous)
    sys.modules.pop("task_of_test", None)


def launch(directory: Path, executor: run.Config, **arguments: float) -> None:
    from task_of_test import work

    task = run.Partial(work, directory=str(directory), **arguments)
    run_experiment(task, executor, name="test")


def test_torchrun_runs_every_rank(task_module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    launch(task_module, torchrun(ntasks_per_node=2))
    assert {file.name: file.read_text() for file in task_module.glob("[0-9]")} == {"0": "2", "1": "2"}


def test_local_runs_one_process(task_module: Path) -> None:
    launch(task_module, local())
    assert {file.name: file.read_text() for file in task_module.glob("[0-9]*")} == {"0": "1", "0.done": ""}
    # So that it ends with this process, however that ends.
    assert (task_module / "launcher").read_text() == name_of(os.getpid())


def test_a_rank_that_fails_ends_the_others_and_is_named(task_module: Path) -> None:
    with pytest.raises(JobFailed) as caught:
        launch(task_module, torchrun(ntasks_per_node=2), failing_rank=1, seconds=300)
    assert time.time() - (task_module / "1").stat().st_mtime < 30
    assert "job test ended as FAILED on rank 1 with exit code 1" in str(caught.value)
    assert str(caught.value).splitlines()[-1].strip() == "rank 1 cannot go on"
    assert not list(task_module.glob("*.done"))


def test_a_command_that_is_ended_ends_its_ranks(task_module: Path) -> None:
    def interrupt() -> None:
        while not (task_module / "1").exists():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(JobFailed, match="job test was cancelled") as caught:
        launch(task_module, torchrun(ntasks_per_node=2), seconds=300)
    assert status_of(caught.value) == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is handler
    assert not list(task_module.glob("*.done"))


def two_tasks(directory: Path, **arguments: float) -> dict[str, tuple[run.Partial, run.Config]]:
    from task_of_test import work

    for name in ("first", "second"):
        (directory / name).mkdir()
    first = run.Partial(work, directory=str(directory / "first"), **arguments)
    return {"first": (first, local()), "second": (run.Partial(work, directory=str(directory / "second")), local())}


def test_several_tasks_run_one_after_the_other_whatever_becomes_of_them(task_module: Path) -> None:
    failures = run_tasks(two_tasks(task_module, failing_rank=0), name="test")
    assert failures.keys() == {"first"}
    assert "rank 0 cannot go on" in str(failures["first"])
    assert (task_module / "second" / "0.done").exists()
    assert (task_module / "first" / "0").stat().st_mtime < (task_module / "second" / "0").stat().st_mtime


def test_a_command_that_is_ended_starts_no_further_task(task_module: Path) -> None:
    def interrupt() -> None:
        while not (task_module / "first" / "0").exists():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run_tasks(two_tasks(task_module, seconds=300), name="test")
    assert not (task_module / "first" / "0.done").exists()
    assert not (task_module / "second" / "0").exists()


def test_the_end_of_a_failed_ranks_log_is_shown(tmp_path: Path) -> None:
    log = tmp_path / "nemo_run" / "job" / "0" / "combined.log"
    log.parent.mkdir(parents=True)
    lines = [f"[default{index % 2}]:line {index}" for index in range(100)]
    cause = "Failures:\n[1]:\n  rank      : 0 (local_rank: 0)\n  exitcode  : -15 (pid: 2)\n"
    root = "Root Cause (first observed failure):\n[0]:\n  rank      : 9 (local_rank: 1)\n"
    status = "  exitcode  : -9 (pid: 3)  (SIGKILL)\n"
    log.write_text("\n".join(lines) + "\n" + cause + root + status)
    first, *shown = describe_failure("ptq", "FAILED", tmp_path).splitlines()
    assert first.startswith("job ptq ended as FAILED on rank 9 with exit code -9 (pid: 3)  (SIGKILL)")
    assert str(log) in first
    assert shown == [f"  line {index}" for index in range(71, 100, 2)]


def test_a_log_without_a_summary_is_shown_as_it_ends(tmp_path: Path) -> None:
    (tmp_path / "log.out").write_text("a\nb\n")
    assert describe_failure("ptq", "FAILED", tmp_path).splitlines()[1:] == ["  a", "  b"]


def test_a_job_without_a_log_is_told(tmp_path: Path) -> None:
    assert describe_failure("ptq", "UNKNOWN", tmp_path) == f"job ptq ended as UNKNOWN and left no log in {tmp_path}"


def test_as_many_processes_as_the_calibration_needs() -> None:
    assert processes_needed({"calibration_tp": 4, "calibration_pp": 2, "calibration_ep": 3}) == 24
    assert processes_needed({}) == 1
    assert processes_needed({"calibration_tp": "two"}) == 1  # the checks of the job refuse it


def test_slurm_where_there_is_none(task_module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/bin/without/slurm:/bin" if not Path("/bin/sbatch").exists() else str(task_module))
    with pytest.raises(PtqError, match="there is no sbatch on PATH"):
        launch(task_module, slurm())
