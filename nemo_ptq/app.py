# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The `nemo-ptq` console command, for work on this machine."""

import sys
import warnings
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


def main() -> None:
    """Runs the command line; what the user can mend is one line and exit status 1."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # those of the libraries, about what they would rather have installed
    try:
        app()
    except PtqError as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(1)
