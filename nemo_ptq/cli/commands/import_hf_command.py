# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""`nemo-ptq import-hf`: a Hugging Face directory becomes a NeMo checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from nemo_ptq.console.text import printable


def import_hf(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Hugging Face directory.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="NeMo checkpoint to make.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the NeMo checkpoint at OUT.")] = False,
) -> None:
    """Convert a Hugging Face directory to a NeMo 2.0 checkpoint, on a CPU and without running code from it."""
    from nemo_ptq.checkpoint.huggingface.importer import import_hf as run

    typer.echo(f"Wrote {printable(run(str(source), str(output), overwrite))}")
