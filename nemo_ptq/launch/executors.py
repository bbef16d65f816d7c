# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Where NeMo-Run runs the job: factories for `run.executor=...`, and how many processes an executor starts."""

import getpass
import os
import re
import shlex
import sys
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, Union
from urllib.parse import urlsplit

from nemo_ptq.errors import ConfigError
from nemo_ptq.launch.containers import docker, kubeflow, seen_in_container, skypilot
from nemo_ptq.safe_path import VARIABLE

# NeMo-Run imports torch, which takes seconds: it is imported where it is needed.
if TYPE_CHECKING:
    import nemo_run as run

# NeMo-Run's placeholder for a job's directory. Without a container it is replaced wherever it stands in the script.
PLACEHOLDER = "/nemo_run"
# Values that sbatch takes for --time: minutes, optionally with seconds or hours, or days with the remaining time.
_TIME_LIMIT = re.compile(r"(\d+-)?\d+(:\d+){0,2}|infinite|unlimited", re.IGNORECASE)


def _path() -> str:
    """A PATH that finds torchrun and python in a virtual environment that is not activated."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def _environment(env_vars: Optional[dict[str, str]]) -> dict[str, str]:
    """Environment variables of every process on this machine: those that a readable launch needs, and the user's."""
    # NeMo-Run would have torchrun log every step that it takes, and look for modules in the working directory.
    return {
        "PATH": _path(),
        "LOGLEVEL": os.environ.get("LOGLEVEL", "WARNING"),
        VARIABLE: "1",
        **(env_vars or {}),
    }


def torchrun(
    ntasks_per_node: Optional[int] = None, env_vars: Optional[dict[str, str]] = None
) -> "run.Config[run.LocalExecutor]":
    """Several processes on this machine, started by torchrun.

    Args:
        ntasks_per_node: Processes to start. None: as many as the calibration needs.
        env_vars: Environment variables for the processes.

    Raises:
        ConfigError: If a setting cannot work.
    """
    import nemo_run as run

    if problems := _size_problems(ntasks_per_node=ntasks_per_node):
        raise ConfigError(problems)
    return run.Config(
        run.LocalExecutor,
        launcher="torchrun",
        env_vars=_environment(env_vars),
        **_given(ntasks_per_node=ntasks_per_node),
    )


def local(env_vars: Optional[dict[str, str]] = None) -> "run.Config[run.LocalExecutor]":
    """One process on this machine.

    Args:
        env_vars: Environment variables for the process.
    """
    import nemo_run as run

    return run.Config(run.LocalExecutor, env_vars=_environment(env_vars))


def slurm(
    account: Optional[str] = None,
    partition: Optional[str] = None,
    nodes: Optional[int] = None,
    ntasks_per_node: Optional[int] = None,
    gpus_per_node: Optional[int] = None,
    time: str = "04:00:00",
    mem: Optional[str] = None,
    container_image: Optional[str] = None,
    container_mounts: Optional[Union[list[str], str]] = None,
    env_vars: Optional[dict[str, str]] = None,
    setup_lines: Optional[str] = None,
    job_dir: Optional[str] = None,
    tunnel: str = "local",
    requeue: bool = False,
) -> "run.Config[run.SlurmExecutor]":
    """A Slurm job: sbatch submits it, and srun starts one process for each rank.

    Args:
        account: Slurm's account.
        partition: Slurm's partition.
        nodes: Nodes of the job. None: as many as the calibration needs.
        ntasks_per_node: Processes on each node, one for each GPU. None: as many as the calibration needs.
        gpus_per_node: GPUs of each node. None: none are asked for, and the model is calibrated on CPUs.
        time: Limit of the run time, e.g. "04:00:00".
        mem: Memory of each node, e.g. "64G"; "0" is all of it.
        container_image: Image that the processes run in, on clusters with Pyxis. None: they run as the command does,
            in the same Python environment.
        container_mounts: Paths that the container sees, as "/on/the/node:/in/the/container" with commas between.
        env_vars: Environment variables for the processes.
        setup_lines: Shell commands that the batch script runs first, e.g. to load modules.
        job_dir: Directory for scripts and logs, which all nodes see. None: where NeMo-Run keeps experiments,
            NEMORUN_HOME or ~/.nemo_run.
        tunnel: "local" on a machine with Slurm's commands, else "ssh://user@host" of one.
        requeue: Let Slurm start the job again, from its beginning, when it is preempted or a node fails.

    Raises:
        ConfigError: If a setting cannot work.
    """
    import nemo_run as run

    problems = _size_problems(nodes=nodes, ntasks_per_node=ntasks_per_node, gpus_per_node=gpus_per_node)
    address = urlsplit(tunnel)
    is_local = tunnel == "local"
    if not is_local and (address.scheme != "ssh" or not address.hostname or address.path.strip("/")):
        problems.append(f"tunnel={tunnel} is not valid: it must be local or ssh://user@host")
    if not is_local and not (job_dir or "").startswith("/"):
        problems.append(f"job_dir={job_dir} is not valid: a tunnel needs an absolute path on the cluster")
    if not _TIME_LIMIT.fullmatch(str(time)):
        problems.append(f"time={time} is not a time limit of Slurm's: write HOURS:MINUTES:SECONDS or DAYS-HOURS")
    if container_mounts and not container_image:
        problems.append("container_mounts needs a container: add run.executor.container_image")
    if problems:
        raise ConfigError(problems)

    variables = {VARIABLE: "1", **({} if container_image or not is_local else {"PATH": _path()})}
    lines = [
        # NeMo-Run submits with --requeue.
        *([] if requeue else ["scontrol update JobId=$SLURM_JOB_ID Requeue=0"]),
        # Nobody watches the pseudo-terminal that it asks for, and it has Python flush its lines anyway.
        "unset SLURM_UNBUFFEREDIO",
        # NeMo-Run's own env_vars would be in upper case and without quotes.
        *(_export(name, str(value)) for name, value in {**variables, **(env_vars or {})}.items()),
        *([setup_lines] if setup_lines else []),
    ]
    experiments = os.path.join(os.path.abspath(job_dir), "experiments") if job_dir else ""
    mounts = container_mounts.split(",") if isinstance(container_mounts, str) else container_mounts
    return run.Config(
        run.SlurmExecutor,
        account=account,  # NeMo-Run's class has no default for it
        job_name_prefix="nemo_ptq.",
        time=time,
        setup_lines="\n".join(lines),
        packager=run.Config(run.Packager),  # the code is on the nodes already: nothing is copied
        srun_args=["--label"],  # which rank wrote a line
        tunnel=(
            run.Config(run.LocalTunnel, job_dir=experiments)
            if is_local
            else run.Config(
                run.SSHTunnel,
                host=address.hostname,
                user=address.username or getpass.getuser(),
                job_dir=experiments,
                **_given(port=address.port),
            )
        ),
        **_given(
            partition=partition,
            nodes=nodes,
            ntasks_per_node=ntasks_per_node,
            gpus_per_node=gpus_per_node,
            mem=mem,
            container_image=container_image,
            container_mounts=mounts,
        ),
    )


def register() -> None:
    """Makes the factories known to NeMo-Run, by their names: `run.executor=torchrun`."""
    import nemo_run as run

    for factory in (torchrun, local, slurm, docker, kubeflow, skypilot):
        run.cli.factory(factory, target=run.Executor)


def _size_problems(**sizes: Any) -> list[str]:
    return [
        f"{name}={size} is not valid: it must be a whole number of at least 1"
        for name, size in sizes.items()
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1)
    ]


def _given(**settings: Any) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def _export(name: str, value: str) -> str:
    # Quotes keep a value that contains NeMo-Run's placeholder as it is.
    quoted = shlex.quote(value).replace(PLACEHOLDER, f"{PLACEHOLDER[:5]}''{PLACEHOLDER[5:]}")
    return f"export {name}={quoted}"


def fit(config: "run.Config[run.Executor]", processes: int) -> None:
    """Sets how many nodes an executor takes and how many processes each starts, where the user has not said.

    Args:
        config: The executor; those that start one process, or are of a kind that is not known, stay as they are.
        processes: Processes that the calibration needs.

    Raises:
        ConfigError: If there would be more processes than GPUs, or more nodes than the executor can start.
    """
    import nemo_run as run

    kind, given = config.__fn_or_cls__, config.__arguments__
    if kind is run.LocalExecutor and not given.get("launcher"):
        return
    names = _counts().get(kind)
    if names is None:
        return
    nodes, tasks, gpus = (given.get(name) for name in names)
    if kind is run.DockerExecutor and gpus == -1:  # all, however many
        gpus = None
    if is_single := kind in (run.DockerExecutor, run.KubeflowExecutor):
        # There is one container, and NeMo-Run does not tell the pods of a TrainJob where the first one is.
        if nodes not in (None, 1):
            raise ConfigError([f"run.executor.num_nodes={nodes} is not possible here: torchrun starts one pod alone"])
        nodes, tasks = 1, tasks or processes
    if nodes is None:
        most = tasks or gpus or processes
        # Nodes that share the processes evenly, if there are such.
        nodes = next(n for n in count(-(-processes // most)) if tasks or processes % n == 0)
    if tasks is None:
        tasks = -(-processes // nodes)
    if gpus is not None and tasks > gpus:
        fix = f"{tasks} GPUs" if is_single else f"{-(-processes // gpus)} nodes or more"
        raise ConfigError(
            [
                f"run.executor.{names[1]}={tasks} is more than run.executor.{names[2]}={gpus}: each process "
                f"needs a GPU of its own, so take {fix}"
            ]
        )
    settings = dict(zip(names, (nodes, tasks), strict=False))
    for name in filter(None, settings):
        setattr(config, name, settings[name])


def _counts() -> dict[Any, tuple[str, str, str]]:
    """Each executor's settings for its nodes, the processes on each, and their GPUs."""
    import nemo_run as run

    slurms = ("nodes", "ntasks_per_node", "gpus_per_node")
    return {
        run.LocalExecutor: slurms,
        run.SlurmExecutor: slurms,
        run.DockerExecutor: ("", "ntasks_per_node", "num_gpus"),
        run.KubeflowExecutor: ("num_nodes", "nprocs_per_node", "gpus_per_node"),
        run.SkypilotExecutor: ("num_nodes", "torchrun_nproc_per_node", "gpus_per_node"),
    }


# The setting for the paths that a container sees, and how a path is added to it.
_MOUNTS = {
    "DockerExecutor": ("volumes", "{0}:{0}"),
    "KubeflowExecutor": ("claims", "CLAIM:{0}"),
    "SkypilotExecutor": ("file_mounts", "{0}"),
}


def unmounted(executor: Any, paths: Mapping[str, Path | None]) -> list[str]:
    """Finds paths that an executor's container would not see.

    Args:
        executor: A `nemo_run.Executor`.
        paths: Absolute paths that the job needs, by the option that names them; None where it needs none.

    Returns:
        A problem for each path.
    """
    seen = seen_in_container(executor)
    setting, fix = "container_mounts", "{0}:{0}"
    if seen is not None:
        setting, fix = _MOUNTS[type(executor).__name__]
    elif getattr(executor, "container_image", None):
        # "/on/the/node:/in/the/container:flags", or one path that is both.
        seen = [Path(([*mount.split(":"), mount])[1]) for mount in executor.container_mounts]
    else:
        return []
    return [
        f"run.executor.{setting} does not make {option}={path} visible in the container: add {fix.format(path)}"
        for option, path in paths.items()
        if path is not None and not any(path.is_relative_to(mount) for mount in seen)
    ]


def launcher_name(executor: Any) -> str | None:
    """Returns the factory whose settings say how many processes an executor starts, None where there is none.

    Args:
        executor: A `nemo_run.Executor`, or the configuration of one.

    Example:
        >>> launcher_name(torchrun())
        'run.executor=torchrun'
    """
    import nemo_run as run

    kind = getattr(executor, "__fn_or_cls__", type(executor))
    if kind is run.SlurmExecutor:
        return "run.executor=slurm"
    if kind in (run.DockerExecutor, run.KubeflowExecutor):
        return "run.executor=docker" if kind is run.DockerExecutor else "run.executor=kubeflow"
    return "run.executor=torchrun" if kind is run.LocalExecutor and executor.launcher else None


def world_size(executor: Any) -> int | None:
    """Returns the number of processes that an executor starts, None where it does not say.

    Args:
        executor: A `nemo_run.Executor`.
    """
    import nemo_run as run
    from nemo_run.core.execution.launcher import Launcher

    if isinstance(executor, run.LocalExecutor | run.SlurmExecutor) and type(executor.get_launcher()) is Launcher:
        # Without a launcher one process starts here, whatever ntasks_per_node is, and srun starts ntasks_per_node
        # processes.
        return 1 if isinstance(executor, run.LocalExecutor) else executor.nodes * executor.ntasks_per_node
    try:
        return executor.nnodes() * executor.nproc_per_node()
    except NotImplementedError:
        return None
