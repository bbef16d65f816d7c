# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""`nemo-ptq run`: the task of `nemo llm ptq`, without waiting for NeMo to be imported before it starts."""

import os
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn, Optional

import typer

from nemo_ptq.errors import ConfigError
from nemo_ptq.safe_path import VARIABLE


def run(
    arguments: Annotated[Optional[list[str]], typer.Argument(metavar="NAME=VALUE...", help="See below.")] = None,
    factory: Annotated[Optional[str], typer.Option(help="Recipe to start from; `nemo-ptq recipes` lists them.")] = None,
    yaml: Annotated[Optional[str], typer.Option(help="File with arguments to start from.")] = None,
    nproc: Annotated[
        Optional[int], typer.Option(min=1, help="Processes to start here; as many as the calibration needs if not set.")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="With run.executor=slurm: return once submitted.")] = False,
) -> None:
    """Quantize a checkpoint and export it. Takes the arguments and recipes of `nemo llm ptq`, and starts faster.

    It runs here, or with run.executor=... as a NeMo-Run experiment. Under torchrun or srun, each process is a rank.
    """
    given = arguments or []
    if detach or any(argument.startswith("run.") for argument in given):
        _run_experiment(given, factory, yaml, detach)
    else:
        _run_here(given, factory, yaml, nproc)


def _run_experiment(arguments: list[str], factory: str | None, yaml: str | None, detach: bool) -> None:
    from nemo_ptq.launch import executors
    from nemo_ptq.launch.run_context import PtqRunContext
    from nemo_ptq.task import ptq

    executors.register()
    context = PtqRunContext(name="ptq", factory=factory, yaml=yaml, detach=detach, skip_confirmation=True)
    context.cli_execute(ptq, arguments)


def _run_here(arguments: Sequence[str], factory: str | None, yaml: str | None, nproc: int | None) -> None:
    from nemo_ptq.launch import front
    from nemo_ptq.launch.arguments import read_pairs
    from nemo_ptq.launch.experiment import processes_needed
    from nemo_ptq.launch.start import start
    from nemo_ptq.parallel.environment import read_launch

    problems: list[str] = []
    try:
        arguments = _with_recipe(arguments, factory, yaml)
    except ConfigError as error:
        problems.extend(error.problems)
    task, wrong = read_pairs(arguments)
    launch = read_launch()
    is_rank = launch.world_size > 1
    processes = launch.world_size if is_rank else nproc or processes_needed(task)
    launcher = launch.launcher if is_rank else "nemo-ptq run"
    job = front.check(task, [*problems, *wrong], world_size=processes, launcher=launcher, speaks=launch.is_first)
    if launch.world_size == processes:
        start(job)
    else:
        _become_torchrun(processes)


def _with_recipe(arguments: Sequence[str], factory: str | None, yaml: str | None) -> list[str]:
    """Puts arguments behind those of a recipe, whose executor is left out: the processes are started here."""
    from nemo_ptq.launch.recipes import find_file, override, read_arguments, recipe_file

    files = [recipe_file(factory)] if factory else []
    files += [find_file(yaml)] if yaml else []
    recipe: list[str] = []
    for file in files:
        recipe = override(recipe, [name for name in read_arguments(file) if not name.startswith("run.")])
    return override(recipe, arguments)


def _become_torchrun(processes: int) -> NoReturn:
    """Replaces this process by torchrun: signals and the exit status then need nobody in between."""
    torchrun = ["-m", "nemo_ptq.launch.agent", "--standalone", f"--nproc_per_node={processes}"]
    # torchrun would look for modules in the working directory.
    environment = {**os.environ, VARIABLE: "1"}
    os.execve(sys.executable, [sys.executable, *torchrun, "-m", "nemo_ptq", *sys.argv[1:]], environment)
