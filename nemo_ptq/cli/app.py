# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The `nemo-ptq` console command, for work on this machine."""

import inspect
import re
import sys
import warnings
from collections.abc import Callable

import typer

from nemo_ptq.cli.commands.convert_command import convert
from nemo_ptq.cli.commands.doctor_command import doctor
from nemo_ptq.cli.commands.evaluate_command import evaluate
from nemo_ptq.cli.commands.export_command import export
from nemo_ptq.cli.commands.import_hf_command import import_hf
from nemo_ptq.cli.commands.plan_command import SETTINGS, epilog, plan
from nemo_ptq.cli.commands.recipes_command import recipes
from nemo_ptq.cli.commands.run_command import run
from nemo_ptq.cli.commands.runs_command import runs
from nemo_ptq.cli.commands.sweep_command import sweep
from nemo_ptq.cli.commands.verify_command import verify
from nemo_ptq.console.interrupts import end_at_once
from nemo_ptq.console.output import written_output
from nemo_ptq.errors import PtqError
from nemo_ptq.parallel.environment import read_launch
from nemo_ptq.plugins import load_plugins

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
# What looks like an option of these may be a misspelt argument: our own checks say so.
_JOB_COMMANDS = (plan, run, sweep)


def _help(command: Callable[..., None]) -> str:
    """A command's docstring with one line for each paragraph, which the terminal wraps."""
    return re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.cleandoc(command.__doc__ or ""))


# In the order of their use, which the help has.
for command in (plan, run, verify, evaluate, export, convert, import_hf, sweep, recipes, runs, doctor):
    app.command(help=_help(command), context_settings=SETTINGS if command in _JOB_COMMANDS else None)(command)


@app.callback()
def nemo_ptq(context: typer.Context) -> None:
    """Post-training quantization of NeMo, Megatron and Hugging Face checkpoints."""
    load_plugins()
    commands: dict[str, typer.core.TyperCommand] = getattr(context.command, "commands", {})
    for command in _JOB_COMMANDS:
        commands[command.__name__].epilog = epilog()


def main() -> None:
    """Runs the command line; what the user can fix is a line each, and the exit status is that of launch/front.py."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # those of the libraries, about what they would rather have installed
    try:
        end_at_once(speaks=read_launch().world_size == 1)
        with written_output():
            app()
    except PtqError as error:
        from nemo_ptq.launch.front import end_with  # what only an error needs

        end_with(error)
