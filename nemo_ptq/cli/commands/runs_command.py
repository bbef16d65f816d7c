# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""`nemo-ptq runs`: what has been run, and what came of it."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

# Whoever reads a pipe wants one line for each run.
_WIDTH_OF_A_PIPE = 10_000


def runs(
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole records as JSON.")] = False,
    last: Annotated[int, typer.Option(help="How many to show, the latest last; 0 shows all.")] = 20,
) -> None:
    """List past runs, launched through NeMo-Run or directly."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from nemo_ptq.console.text import one_line
    from nemo_ptq.tracking.runs import nemo_run_home, read_runs

    home = nemo_run_home()
    found = read_runs(home)[-last:]
    if as_json:
        typer.echo(json.dumps([asdict(run) for run in found], indent=2))
        return
    if not found:
        typer.echo(f"no runs in {home}")
        return
    table = Table(box=None, pad_edge=False)
    for name in ("id", "job", "model", "algorithm", "state", "recovery", "size", "path"):
        table.add_column(name, overflow="fold")
    for run in found:
        recovery, size = run.metrics.get("recovery"), run.metrics.get("export_bytes")
        cells = (
            run.id,
            run.job,
            run.model,
            run.algorithm,
            run.state,
            "" if recovery is None else f"{recovery:.4f}",
            "" if size is None else _readable(size),
            run.path,
        )
        # What a record holds is no markup.
        table.add_row(*(Text(one_line(cell)) for cell in cells))
    console = Console(highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = _WIDTH_OF_A_PIPE
    console.print(table)


def _readable(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
