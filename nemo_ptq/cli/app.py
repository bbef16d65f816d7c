# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The `nemo-ptq` console command, for work on this machine."""

import sys
import warnings

import typer

from nemo_ptq.cli.commands.doctor_command import doctor
from nemo_ptq.cli.commands.evaluate_command import evaluate
from nemo_ptq.cli.commands.export_command import export
from nemo_ptq.cli.commands.import_hf_command import import_hf
from nemo_ptq.cli.commands.plan_command import EPILOG, SETTINGS, plan
from nemo_ptq.cli.commands.recipes_command import recipes
from nemo_ptq.cli.commands.run_command import run
from nemo_ptq.cli.commands.runs_command import runs
from nemo_ptq.cli.commands.sweep_command import sweep
from nemo_ptq.cli.commands.verify_command import verify
from nemo_ptq.errors import PtqError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for command in (doctor, recipes, runs, import_hf, export, verify, evaluate):
    app.command()(command)
# What looks like an option may be a misspelt argument: our own checks say so.
for job_command in (plan, run, sweep):
    app.command(context_settings=SETTINGS, epilog=EPILOG)(job_command)


@app.callback()
def nemo_ptq() -> None:
    """Post-training quantization of NeMo checkpoints."""


def main() -> None:
    """Runs the command line; what the user can mend is one line and exit status 1."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # those of the libraries, about what they would rather have installed
    try:
        app()
    except PtqError as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(1)
