# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The `nemo-ptq` console command, for work on this machine."""

import json
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from nemo_ptq.errors import PtqError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def nemo_ptq() -> None:
    """Post-training quantization of NeMo checkpoints."""


@app.command()
def import_hf(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Hugging Face directory.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="NeMo checkpoint to make.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the NeMo checkpoint at OUT.")] = False,
) -> None:
    """Make a NeMo 2.0 checkpoint from a Hugging Face directory, on a CPU and without running code from it."""
    from nemo_ptq.checkpoint.huggingface import import_hf as run

    typer.echo(f"Wrote {run(str(source), str(output), overwrite)}")


@app.command()
def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Exported directory.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON.")] = False,
) -> None:
    """Check an exported directory as its readers would read it; exit status 1 if a check fails."""
    from nemo_ptq.verify.checks import verify as run

    checks = run(directory, load_tokenizer=True)
    if as_json:
        typer.echo(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        for check in checks:
            mark = typer.style("ok  ", fg="green") if check.ok else typer.style("FAIL", fg="red", bold=True)
            typer.echo(f"{mark}  {check.name}: {check.detail}")
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


def main() -> None:
    """Runs the command line; what the user can mend is one line and exit status 1."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # those of the libraries, about what they would rather have installed
    try:
        app()
    except PtqError as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(1)
