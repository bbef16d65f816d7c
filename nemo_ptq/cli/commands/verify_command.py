# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""`nemo-ptq verify`: the checks of an exported directory, one line for each."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from nemo_ptq.console.text import printable


def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Exported directory.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON.")] = False,
) -> None:
    """Check an exported directory as its readers would read it; exit status 1 if a check fails.

    If DIR is not an export itself, the exports in its subdirectories are checked, such as those of several formats.
    """
    from nemo_ptq.console.quiet import transformers_without_torch
    from nemo_ptq.verify.checks import verify as run
    from nemo_ptq.verify.manifest import exports_below

    transformers_without_torch()
    checks = [
        replace(check, name=f"{export.name}: {check.name}")
        for export in exports_below(directory)
        for check in run(export, load_tokenizer=True)
    ] or run(directory, load_tokenizer=True)
    if as_json:
        typer.echo(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        # Rich leaves colours out where the output is not a terminal or NO_COLOR is set.
        console = Console(highlight=False, soft_wrap=True, emoji=False)
        for check in checks:
            mark = Text("ok  ", "green") if check.ok else Text("FAIL", "bold red")
            console.print(mark.append(f"  {check.name}: {printable(check.detail)}", "default not bold"))
    if not all(check.ok for check in checks):
        raise typer.Exit(1)
