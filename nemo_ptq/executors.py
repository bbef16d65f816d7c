# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Where NeMo-Run runs the job: executor factories, and an experiment that fails when one of its ranks does."""

import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Optional

from nemo_ptq.errors import PtqError

# NeMo-Run imports torch, which takes seconds: it is imported where it is needed.
if TYPE_CHECKING:
    import nemo_run as run

# Lines of a failed rank's log that the error shows.
_LOG_LINES = 15
_ROOT_CAUSE = re.compile(
    r"Root Cause.*?rank\s*:\s*(?P<rank>\d+) \(local_rank: (?P<local_rank>\d+)\).*?exitcode\s*:\s*(?P<status>[^\n]*)",
    re.DOTALL,
)


def _environment(env_vars: Optional[dict[str, str]]) -> dict[str, str]:
    """What every process gets: the user's variables, and what makes a launch work and stay readable."""
    return {
        # Finds torchrun and python in a virtual environment that is not activated.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        # NeMo-Run would have torchrun log every step that it takes.
        "LOGLEVEL": os.environ.get("LOGLEVEL", "WARNING"),
        **(env_vars or {}),
    }


def torchrun(ntasks_per_node: int = 1, env_vars: Optional[dict[str, str]] = None) -> "run.Config[run.LocalExecutor]":
    """Several processes on this machine, started by torchrun.

    Args:
        ntasks_per_node: Processes to start. `nemo llm ptq` starts as many as the calibration needs where it is not set.
        env_vars: Environment variables for the processes.
    """
    import nemo_run as run

    return run.Config(
        run.LocalExecutor, launcher="torchrun", ntasks_per_node=ntasks_per_node, env_vars=_environment(env_vars)
    )


def local(env_vars: Optional[dict[str, str]] = None) -> "run.Config[run.LocalExecutor]":
    """One process on this machine.

    Args:
        env_vars: Environment variables for the process.
    """
    import nemo_run as run

    return run.Config(run.LocalExecutor, env_vars=_environment(env_vars))


FACTORIES = (torchrun, local)


def world_size(executor: Any) -> int | None:
    """Returns the number of processes that an executor starts, None where it does not say.

    Args:
        executor: A `nemo_run.Executor`.
    """
    import nemo_run as run
    from nemo_run.core.execution.launcher import Launcher

    if isinstance(executor, run.LocalExecutor) and type(executor.get_launcher()) is Launcher:
        return 1  # without a launcher it starts one process, whatever ntasks_per_node says
    try:
        return executor.nnodes() * executor.nproc_per_node()
    except NotImplementedError:
        return None


def run_experiment(
    task: Any, executor: Any, *, name: str, plugins: Optional[list] = None, detach: bool = False
) -> None:
    """Runs a task as a NeMo-Run experiment and waits for it.

    Args:
        task: `run.Partial` of the task.
        executor: Where to run it.
        name: Name of the experiment and its job.
        plugins: NeMo-Run plugins for the job.
        detach: Return once the job is submitted, where the executor can do that.

    Raises:
        PtqError: If the job did not succeed; names the rank and gives the last lines of its log.
    """
    import nemo_run as run
    from torchx.specs.api import AppState

    experiment = run.Experiment(name, executor=executor)
    with _ended_with_the_command(experiment), experiment:
        experiment.add(task, name=name, tail_logs=True, plugins=plugins)
        experiment.run(detach=detach)
    if experiment.detach:
        return
    for job in experiment.jobs:
        if job.state == AppState.CANCELLED:
            raise PtqError(f"job {job.id} was cancelled")
        if job.state != AppState.SUCCEEDED:
            raise PtqError(describe_failure(job.id, job.state.name, Path(job.executor.job_dir)))


@contextmanager
def _ended_with_the_command(experiment: Any) -> Iterator[None]:
    """Ends the processes that run on this machine when the command is interrupted; they would outlive it."""
    import nemo_run as run

    def cancel(number: int, frame: FrameType | None) -> None:
        launched = [job for job in experiment.jobs if job.launched and isinstance(job.executor, run.LocalExecutor)]
        if not launched:
            raise KeyboardInterrupt
        for job in launched:
            experiment.cancel(job.id)

    previous = {number: signal.signal(number, cancel) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def describe_failure(job: str, state: str, job_dir: Path) -> str:
    """Says which rank of a job failed and how its log ends.

    Args:
        job: The job's name.
        state: How it ended, e.g. "FAILED".
        job_dir: NeMo-Run's directory of the job, somewhere under which its logs lie.
    """
    logs = sorted((*job_dir.rglob("combined.log"), *job_dir.rglob("*.out")), key=lambda path: path.stat().st_mtime)
    if not logs:
        return f"job {job} ended as {state} and left no log in {job_dir}"
    lines = logs[-1].read_text(errors="replace")
    cause = _ROOT_CAUSE.search(lines)
    if cause is None:
        where, shown = "", lines.splitlines()
    else:
        # torchrun puts each process's local rank before its lines.
        prefix = f"[default{cause['local_rank']}]:"
        where = f" on rank {cause['rank']} with exit code {cause['status'].strip()}"
        shown = [line.partition(prefix)[2] for line in lines.splitlines() if prefix in line]
    last = "\n".join(f"  {line}" for line in shown[-_LOG_LINES:])
    return f"job {job} ended as {state}{where}; the last lines of its log, {logs[-1]}:\n{last}"
