# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""`nemo-ptq doctor`: what works on this machine, one line for each thing."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def doctor(
    directory: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where exports are to go.")] = Path("."),
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check this machine, and say how to fix what does not work; exit status 1 if jobs cannot run."""
    from nemo_ptq.cli.doctor import examine

    findings = examine(directory)
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            if finding.ok is None:
                mark = "-"
            else:
                color = "green" if finding.ok else "red" if finding.needed else "yellow"
                mark = typer.style("✓" if finding.ok else "✗", fg=color)
            typer.echo(f"{mark} {finding.name}: {finding.detail}")
            if finding.ok is False:
                typer.echo(f"    {finding.fix}")
    if any(finding.needed and finding.ok is False for finding in findings):
        raise typer.Exit(1)
