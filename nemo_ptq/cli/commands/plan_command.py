# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""`nemo-ptq plan`: what a job needs, before it starts."""

import json
from typing import Annotated, Optional

import typer

from nemo_ptq.options import describe_options
from nemo_ptq.plan.devices import CPU, GPUS, device_named

SETTINGS = {"ignore_unknown_options": True}
"""Options of the job that begin with a dash are read with the script's flags, not by typer."""


def epilog() -> str:
    """Lists the arguments of a job; called once plugins are loaded, which add to what there is."""
    return "\n\n".join(["Arguments of the job, as name=value:", "\b\n" + describe_options()])


def plan(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="ARGUMENTS",
            help="Those of `nemo llm ptq`, as name=value, or of nemo_ptq.script, as --flags; the checkpoint's "
            "directory may stand alone.",
        ),
    ],
    device: Annotated[
        Optional[str],
        typer.Option(
            help=f"What each rank runs on: {', '.join(GPUS)}, or {CPU}. (default: plan_device, which is H100)"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Show what a job will need, without starting it: memory, file sizes, time, and whether it keeps every rule.

    Reads the checkpoint's metadata only. Exit status 1 if the job does not fit or breaks a rule, 2 if its
    arguments or the checkpoint cannot be read.
    """
    from nemo_ptq.launch import front
    from nemo_ptq.launch.flags import read_arguments
    from nemo_ptq.plan import show_plan

    chosen = None if device is None else device_named(device, "--device")
    planned = front.plan(read_arguments(arguments), world_size=None, device=chosen)
    if as_json:
        typer.echo(json.dumps(planned.as_dict(), indent=2))
    else:
        show_plan(planned)
    raise front.Planned(planned)
