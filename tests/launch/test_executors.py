# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Executors start what they say, and as many processes as the calibration needs."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fiddle as fdl
import nemo_run as run
import pytest

from nemo_ptq.errors import ConfigError
from nemo_ptq.launch.executors import fit, launcher_name, local, slurm, torchrun, world_size


@pytest.mark.parametrize("factory", [torchrun, local])
def test_python_and_torchrun_are_found_without_an_active_environment(factory: Callable[..., run.Config]) -> None:
    executor = fdl.build(factory(env_vars={"A": "1"}))
    assert executor.env_vars["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert executor.env_vars["A"] == "1"
    assert executor.env_vars["PYTHONSAFEPATH"] == "1"


@pytest.mark.parametrize(
    ("executor", "expected"),
    [
        (run.LocalExecutor(launcher="torchrun", ntasks_per_node=4), 4),
        (run.LocalExecutor(launcher="torchrun", ntasks_per_node=4, nodes=2), 8),
        (run.LocalExecutor(ntasks_per_node=4), 1),
        (run.SlurmExecutor(account="a", nodes=2, ntasks_per_node=8), 16),
        (run.SlurmExecutor(account="a", nodes=2, ntasks_per_node=1, gpus_per_node=8), 2),
        (run.SlurmExecutor(account="a", nodes=2, ntasks_per_node=8, launcher="torchrun"), 16),
    ],
)
def test_world_size_is_what_is_started(executor: run.Executor, expected: int) -> None:
    assert world_size(executor) == expected


@pytest.mark.parametrize(
    ("executor", "name"),
    [
        (torchrun(), "run.executor=torchrun"),
        (fdl.build(torchrun()), "run.executor=torchrun"),
        (fdl.build(local()), None),
        (slurm(), "run.executor=slurm"),
        (run.Executor(), None),
    ],
)
def test_executors_of_the_factories_are_known(executor: run.Executor | run.Config, name: str | None) -> None:
    assert launcher_name(executor) == name


def test_an_executor_that_does_not_say_has_no_world_size() -> None:
    assert world_size(run.Executor()) is None


@pytest.mark.parametrize(
    ("settings", "processes", "nodes", "tasks"),
    [
        ({}, 4, 1, 4),
        ({"gpus_per_node": 8}, 4, 1, 4),
        ({"gpus_per_node": 8}, 16, 2, 8),
        ({"gpus_per_node": 8}, 12, 2, 6),  # evenly, not 8 + 4
        ({"gpus_per_node": 8}, 9, 3, 3),
        ({"nodes": 2}, 4, 2, 2),
        ({"nodes": 2, "gpus_per_node": 8}, 16, 2, 8),
        ({"ntasks_per_node": 4}, 8, 2, 4),
        ({"ntasks_per_node": 8}, 4, 1, 8),
        ({"nodes": 3}, 4, 3, 2),  # 6 processes: the checks of the job refuse them
        ({"nodes": 2, "ntasks_per_node": 8}, 1, 2, 8),
    ],
)
def test_nodes_and_tasks_follow_the_calibration(
    settings: dict[str, int], processes: int, nodes: int, tasks: int
) -> None:
    config = slurm(**settings)
    fit(config, processes)
    assert (config.nodes, config.ntasks_per_node) == (nodes, tasks)


@pytest.mark.parametrize("settings", [{"nodes": 1}, {"nodes": 1, "ntasks_per_node": 8}])
def test_more_processes_than_gpus_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"ntasks_per_node=8 is more than .*gpus_per_node=4: .* take 2 nodes or more"):
        fit(slurm(gpus_per_node=4, **settings), 8)


def test_torchrun_is_fitted_and_one_process_is_left_alone() -> None:
    several, given, one = torchrun(), torchrun(ntasks_per_node=2), local()
    for config in (several, given, one):
        fit(config, 4)
    assert [fdl.build(config).ntasks_per_node for config in (several, given, one)] == [4, 2, 1]


def script_of(tmp_path: Path, **settings: Any) -> str:
    """The batch script that NeMo-Run makes of an executor."""
    from nemo_run.core.execution.slurm import SlurmBatchRequest

    executor = fdl.build(slurm(**settings))
    executor.assign("title_1", str(tmp_path / "experiments/title/title_1"), "ptq", "ptq")
    command = [["python -m nemo_run.core.runners.fdl_runner /nemo_run/configs/x"]]
    return SlurmBatchRequest(
        launch_cmd=["sbatch"], jobs=["ptq"], command_groups=command, executor=executor, max_retries=0, extra_env={}
    ).materialize()


def test_settings_reach_the_batch_script(tmp_path: Path) -> None:
    script = script_of(
        tmp_path,
        account="acct",
        partition="batch",
        nodes=2,
        ntasks_per_node=4,
        gpus_per_node=4,
        time="1:00:00",
        mem="0",
    )
    flags = {line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")}
    assert flags >= {
        "account=acct",
        "partition=batch",
        "nodes=2",
        "ntasks-per-node=4",
        "gpus-per-node=4",
        "time=1:00:00",
        "mem=0",
    }
    (task,) = [line for line in script.splitlines() if line.startswith("srun") and "fdl_runner" in line]
    assert "--label" in task
    assert "--kill-on-bad-exit=1" in task
    assert "container" not in script


def test_what_is_not_given_is_left_to_the_cluster(tmp_path: Path) -> None:
    script = script_of(tmp_path)
    assert not [line for line in script.splitlines() if "None" in line]
    for flag in ("account", "partition", "mem", "gpus-per-node"):
        assert f"#SBATCH --{flag}" not in script


def test_environment_variables_arrive_as_they_are(tmp_path: Path) -> None:
    values = {"lower": "1", "SPACED": "a b $HOME 'c' $$", "PLACE": "/x/nemo_run/y"}
    script = script_of(tmp_path, env_vars=values, setup_lines="export LATER=$lower")
    exports = "\n".join(line for line in script.splitlines() if line.startswith("export") and "SLURM" not in line)
    program = "import json, os; print(json.dumps(dict(os.environ)))"
    result = subprocess.run(
        ["bash", "-c", f"{exports}\n{sys.executable} -c '{program}'"], capture_output=True, text=True, check=True
    )
    environment = __import__("json").loads(result.stdout)
    assert {name: environment[name] for name in values} == values
    assert environment["LATER"] == environment["PYTHONSAFEPATH"] == "1"
    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


def test_a_preempted_job_starts_again_only_if_wanted(tmp_path: Path) -> None:
    assert "Requeue=0" in script_of(tmp_path)
    assert "Requeue=0" not in script_of(tmp_path, requeue=True)


def test_a_container_has_its_own_environment(tmp_path: Path) -> None:
    script = script_of(tmp_path, container_image="image.sqsh", container_mounts="/data:/data,/models:/models")
    (task,) = [line for line in script.splitlines() if line.startswith("srun") and "fdl_runner" in line]
    assert "--container-image image.sqsh" in task
    assert "--container-mounts /data:/data,/models:/models," in task
    assert "export PATH" not in script
    assert "export PYTHONSAFEPATH=1" in script


def test_a_tunnel() -> None:
    executor = fdl.build(slurm(tunnel="ssh://me@login1:2222", job_dir="/lustre/me"))
    assert isinstance(executor.tunnel, run.SSHTunnel)
    assert (executor.tunnel.user, executor.tunnel.host, executor.tunnel.port) == ("me", "login1", 2222)
    assert executor.tunnel.job_dir == "/lustre/me/experiments"
    assert "export PATH" not in (executor.setup_lines or "")  # which is this machine's


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"tunnel": "login1"}, "tunnel=login1 is not valid: it must be local or ssh://user@host"),
        ({"tunnel": "ssh://login1", "job_dir": "jobs"}, "job_dir=jobs is not valid: a tunnel needs an absolute path"),
        ({"tunnel": "ssh://login1"}, "job_dir=None is not valid"),
        ({"container_mounts": "/a:/a"}, "container_mounts needs a container"),
        ({"nodes": 0}, "nodes=0 is not valid: it must be a whole number of at least 1"),
        ({"ntasks_per_node": -1}, "ntasks_per_node=-1 is not valid: it must be a whole number of at least 1"),
        ({"gpus_per_node": 0}, "gpus_per_node=0 is not valid: it must be a whole number of at least 1"),
        ({"time": "4h"}, "time=4h is not a time limit of Slurm's: write HOURS:MINUTES:SECONDS or DAYS-HOURS"),
    ],
)
def test_what_cannot_work_is_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        slurm(**settings)
    assert problem in str(caught.value)


def test_torchrun_starts_at_least_one_process() -> None:
    with pytest.raises(ConfigError, match="ntasks_per_node=0 is not valid: it must be a whole number of at least 1"):
        torchrun(ntasks_per_node=0)


@pytest.mark.parametrize("time", ["90", "90:00", "04:00:00", "2-0", "2-12:30", "1-00:00:00", "UNLIMITED", 90])
def test_time_limits_are_slurms(time: Any) -> None:
    assert fdl.build(slurm(time=time)).time == time
