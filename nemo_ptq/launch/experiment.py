# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A NeMo-Run experiment that fails when one of its ranks does, and ends with the command that started it."""

import os
import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from types import FrameType
from typing import Any, Optional

from nemo_ptq.errors import JobFailed, PtqError
from nemo_ptq.launch import slurm
from nemo_ptq.launch.executors import PLACEHOLDER, fit
from nemo_ptq.parallel.parent import LAUNCHER, name_of

# Lines of a failed rank's log that the error shows.
_LOG_LINES = 15
_ROOT_CAUSE = re.compile(
    r"Root Cause.*?rank\s*:\s*(?P<rank>\d+) \(local_rank: (?P<local_rank>\d+)\).*?exitcode\s*:\s*(?P<status>[^\n]*)",
    re.DOTALL,
)
_PARALLEL_SIZES = ("calibration_tp", "calibration_pp", "calibration_ep")


def processes_needed(arguments: Mapping[str, Any]) -> int:
    """Returns how many processes a task's arguments ask for, 1 where they are not valid."""
    sizes = [arguments.get(size, 1) for size in _PARALLEL_SIZES]
    return prod(sizes) if all(isinstance(size, int) and size > 0 for size in sizes) else 1


def run_experiment(
    task: Any, executor: Any, *, name: str, plugins: Optional[list] = None, detach: bool = False
) -> None:
    """Runs a task as a NeMo-Run experiment and waits for it. An interrupt ends the job as well, also on Slurm.

    Args:
        task: `run.Partial` of the task.
        executor: Where to run it: an executor, or the result of a factory of :mod:`nemo_ptq.launch.executors`.
        name: Name of the experiment and its job.
        plugins: NeMo-Run plugins for the job.
        detach: Return once the job is submitted, where the executor can do that.

    Raises:
        JobFailed: If the job did not succeed; names the rank and gives the last lines of its log.
        PtqError: If the job could not be started, or its outcome is not known.
    """
    for failure in run_tasks({name: (task, executor)}, name=name, plugins=plugins, detach=detach).values():
        raise failure


def run_tasks(
    tasks: Mapping[str, tuple[Any, Any]], *, name: str, plugins: Optional[list] = None, detach: bool = False
) -> dict[str, PtqError]:
    """Runs tasks as the jobs of one NeMo-Run experiment: on Slurm side by side, elsewhere one after the other.

    Args:
        tasks: For each job's name its task and its executor, as for :func:`run_experiment`; the executors are of one
            kind.
        name: Name of the experiment.
        plugins: NeMo-Run plugins for each job.
        detach: Return once the jobs are submitted, where the executor can do that.

    Returns:
        By name, why a job did not succeed.

    Raises:
        PtqError: If a job could not be started.
    """
    import fiddle as fdl
    import nemo_run as run

    executors = {}
    for job_name, (task, executor) in tasks.items():
        if isinstance(executor, run.Config):
            fit(executor, processes_needed(task.__arguments__))
            executor = fdl.build(executor)
        if isinstance(executor, run.LocalExecutor):
            executor.env_vars[LAUNCHER] = name_of(os.getpid())  # it ends with this command in any case
        executors[job_name] = executor
    first = next(iter(executors.values()))
    on_slurm = isinstance(first, run.SlurmExecutor)
    if on_slurm:
        slurm.check_reachable(first.tunnel, is_followed=not detach)
    experiment = _make_experiment(name, first)
    failures: dict[str, PtqError] = {}
    with _ended_with_the_command(experiment) as interrupts:
        with experiment:
            for job_name, (task, _) in tasks.items():
                experiment.add(task, executors[job_name], name=job_name, tail_logs=True, plugins=plugins)
            _submit(experiment, detach, sequential=len(tasks) > 1 and not on_slurm)
            if interrupts:
                _end_all(experiment)  # the interrupt may have come before there was a job to end
        for index, job in enumerate(experiment.jobs):
            if getattr(experiment, "detach", False):  # not set where jobs ran one after the other
                follow = f"nemo experiment logs {experiment._id} {index}"
                print(f"job {job.id} goes on; to see its log: {follow}", flush=True)
                continue
            try:
                _judge(job, ended_by=next(iter(interrupts), None))
            except PtqError as error:
                failures[job.id] = error
    return failures


def _make_experiment(name: str, executor: Any) -> Any:
    """Makes the experiment where the executor finds it."""
    import nemo_run as run
    from nemo_run.config import get_nemorun_home

    if not isinstance(executor, run.SlurmExecutor):
        return run.Experiment(name, executor=executor)
    home = Path(get_nemorun_home())
    experiments = Path(executor.tunnel.job_dir or home / "experiments")
    if re.search(rf"[\s,]|{PLACEHOLDER}", str(experiments / name)):
        raise PtqError(
            f"{experiments / name} cannot be a job's directory: NeMo-Run's scripts cannot do with spaces, commas or "
            f"{PLACEHOLDER} in it; name another with run.executor.job_dir"
        )
    if not isinstance(executor.tunnel, run.LocalTunnel):
        return run.Experiment(name, executor=executor)  # which copies itself through the tunnel
    if experiments.name != "experiments":
        raise PtqError(f"the tunnel's job_dir={experiments} must end in /experiments: NeMo-Run puts the job there")
    experiment = run.Experiment(name, executor=executor, base_dir=str(experiments.parent))
    link = home / "experiments" / name / experiment._id
    if link.parent.resolve() != (experiments / name).resolve():
        # Where `nemo experiment` looks for it.
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(experiment._exp_dir)
    return experiment


def _submit(experiment: Any, detach: bool, sequential: bool) -> None:
    """Starts an experiment's jobs.

    Raises:
        PtqError: If Slurm does not take it.
    """
    from invoke.exceptions import UnexpectedExit

    try:
        experiment.run(detach=detach, sequential=sequential)
    except UnexpectedExit as error:
        reasons = error.result.stderr.strip().splitlines() or [str(error)]
        raise PtqError(f"the job was not submitted: {'; '.join(reasons)}") from error


@contextmanager
def _ended_with_the_command(experiment: Any) -> Iterator[Sequence[int]]:
    """Ends an experiment's jobs when the command is interrupted; they would outlive it.

    Yields:
        The signals that have come so far. A second one ends the command at once.
    """
    interrupts: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)
        if len(interrupts) == 1:
            _end_all(experiment)
        # NeMo-Run would start the next one of several jobs.
        if len(experiment.jobs) != 1 or len(interrupts) > 1:
            raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupts
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _end_all(experiment: Any) -> None:
    for job in experiment.jobs:
        if job.launched:
            _end(experiment, job)


def _end(experiment: Any, job: Any) -> None:
    if _is_slurm(job):
        slurm_job = _slurm_job(job)
        print(f"cancelling Slurm's job {slurm_job.id}", flush=True)
        slurm_job.cancel()  # NeMo-Run's cancel does nothing until the accounting knows the job
    else:
        experiment.cancel(job.id)


def _is_slurm(job: Any) -> bool:
    import nemo_run as run

    return isinstance(job.executor, run.SlurmExecutor)


def _slurm_job(job: Any) -> slurm.SlurmJob:
    executor = job.executor
    return slurm.SlurmJob(
        id=job.handle.rpartition("/")[2],
        name=job.id,
        slurm_name=executor.job_details.job_name,
        directory=executor.job_details.folder,
        tunnel=executor.tunnel,
        time=executor.time,
    )


def _judge(job: Any, ended_by: int | None) -> None:
    """Raises if a job that has ended did not succeed.

    Args:
        job: NeMo-Run's job.
        ended_by: The signal that has ended the command, and the job with it; None for none. NeMo-Run then says that the
            job was cancelled, or that it failed if its ranks were gone before NeMo-Run looked.
    """
    from torchx.specs.api import AppState

    if _is_slurm(job):
        ending = (slurm_job := _slurm_job(job)).wait()
        if ending != slurm.SUCCESS:
            described = slurm_job.describe(ending)
            raise PtqError(described) if ending == slurm.UNKNOWN else JobFailed(described, ended_by)
    elif job.state == AppState.SUCCEEDED:
        return
    elif job.state == AppState.CANCELLED or ended_by:
        raise JobFailed(f"job {job.id} was cancelled", ended_by)
    else:
        raise JobFailed(describe_failure(job.id, job.state.name, Path(job.executor.job_dir)))


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
