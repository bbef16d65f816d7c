# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The common part of all front doors, after they have read their arguments: plan or check, and report problems.

The doors are :func:`nemo_ptq.ptq`, `python -m nemo_ptq.script`, `nemo llm ptq` and the commands of `nemo-ptq`. They
differ only in the spelling of arguments and in what starts the processes. Their exit status is 0, :data:`FAILED` or
:data:`WRONG`.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from nemo_ptq.console.text import one_line, printable, shortened
from nemo_ptq.errors import ConfigError, JobFailed, PtqError
from nemo_ptq.job import Job
from nemo_ptq.plan import Plan, plan_job, show_plan
from nemo_ptq.plan.devices import Device
from nemo_ptq.plan.rules import check_job
from nemo_ptq.plugins import load_plugins

FAILED = 1
"""Exit status of a job that has failed, and of a plan of one that does not fit or breaks a rule."""
WRONG = 2
"""Exit status of a command whose arguments are wrong: nothing has been started."""


class Planned(SystemExit):
    """Ends a command that was asked for a plan, once it is shown.

    Attributes:
        plan: The plan.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__(0 if plan.ok else FAILED)
        self.plan = plan


def plan(
    arguments: Mapping[str, Any], *, world_size: int | None, launcher: str | None = None, device: Device | None = None
) -> Plan:
    """Plans a job; see :func:`nemo_ptq.plan.plan_job`.

    Raises:
        ConfigError: If an option has an invalid value, or the checkpoint cannot be read.
        PtqError: If a plugin cannot be imported.
    """
    load_plugins()
    return plan_job(arguments, world_size=world_size, launcher=launcher, device=device)


def check(
    arguments: Mapping[str, Any],
    problems: Sequence[str] = (),
    *,
    world_size: int | None,
    launcher: str | None = None,
    speaks: bool = True,
) -> Job:
    """Checks the arguments of a job, or shows its plan where `plan_only` is among them.

    Args:
        arguments: Those of :func:`nemo_ptq.task.ptq` that were given, by name.
        problems: Problems with their spelling.
        world_size: Processes that will run the job; None where that is not known.
        launcher: What starts them, as for :func:`~nemo_ptq.plan.rules.check_job`.
        speaks: Whether this process shows the plan.

    Returns:
        The job to start.

    Raises:
        ConfigError: With every problem.
        Planned: If a plan was asked for.
        PtqError: If a plugin cannot be imported.
    """
    if arguments.get("plan_only") is True and not problems:
        planned = plan(arguments, world_size=world_size, launcher=launcher)
        if speaks:
            show_plan(planned)
        raise Planned(planned)
    load_plugins()
    try:
        job = check_job(**arguments, world_size=world_size, launcher=launcher)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    if problems:
        raise ConfigError(problems)
    return job


def status_of(error: PtqError) -> int:
    """The exit status of a command that ends with an error."""
    if isinstance(error, JobFailed) and error.ended_by:
        return 128 + error.ended_by  # as a shell expects it
    return WRONG if isinstance(error, ConfigError) else FAILED


def problems_of(error: PtqError) -> list[str]:
    """The message of an error, for a terminal: each problem with the arguments in one line."""
    if isinstance(error, ConfigError):
        return [shortened(one_line(problem)) for problem in error.problems]
    return [shortened(printable(error))]


def end_with(error: PtqError, spell: Callable[[str], str] = str) -> NoReturn:
    """Ends a command with an error, a line for each problem.

    Args:
        error: The error.
        spell: Puts the spelling of this command in place of the options that a problem names.
    """
    for problem in problems_of(error):
        print(f"Error: {spell(problem)}", file=sys.stderr, flush=True)
    sys.exit(status_of(error))
