# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""`nemo-ptq sweep`: several algorithms over one checkpoint, and what each of them costs."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from nemo_ptq.errors import ConfigError, PtqError

_PATH, _CHECKPOINTS = "export_config.path=", ("nemo_checkpoint=", "model_path=")


def sweep(
    arguments: Annotated[Optional[list[str]], typer.Argument(metavar="NAME=VALUE...", help="See below.")] = None,
    model: Annotated[
        Optional[str], typer.Option(help="Sweep over the recipes of a model, e.g. llama3_8b, each with its settings.")
    ] = None,
    algorithms: Annotated[
        Optional[str], typer.Option(help="Algorithms, separated by commas. (default: fp8,int8_sq,int4_awq)")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="With run.executor=slurm: return once submitted.")] = False,
) -> None:
    """Run several algorithms on one checkpoint as a NeMo-Run experiment, and compare them.

    Each export goes into its own subdirectory of export_config.path, and the comparison beside them.
    """
    from nemo_ptq.launch.sweep import DEFAULT_ALGORITHMS, read_outcome, recipes_of, run_sweep

    given = arguments or []
    paths = [argument.removeprefix(_PATH) for argument in given if argument.startswith(_PATH)]
    if not paths:
        raise ConfigError([f"{_PATH[:-1]} is missing: name the directory to make"])
    directory = Path(os.path.abspath(os.path.expanduser(paths[-1])))
    recipes: dict[str, str | None] = {**recipes_of(model)} if model else dict.fromkeys(DEFAULT_ALGORITHMS)
    if algorithms:
        recipes = {name: recipes.get(name) for name in algorithms.split(",")}
    shared = [argument for argument in given if not argument.startswith(_PATH)]
    failures = run_sweep(shared, recipes, directory, detach)
    if detach:
        return
    from nemo_ptq.report.sweep_page import render_sweep

    outcomes = [read_outcome(name, directory / name, failures.get(name)) for name in recipes]
    _show(outcomes)
    checkpoint = next((word.partition("=")[2] for word in shared if word.startswith(_CHECKPOINTS)), "")
    page = render_sweep(checkpoint, outcomes, directory)
    (directory / "sweep.html").write_text(page, encoding="utf-8")
    (directory / "sweep.json").write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=2) + "\n")
    if failures:
        raise PtqError("\n".join(f"{name}: {failure}" for name, failure in failures.items()))


def _show(outcomes: Sequence[Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from nemo_ptq.console.text import one_line
    from nemo_ptq.report.outcomes import COLUMNS

    table = Table(box=None, pad_edge=False)
    table.add_column("algorithm")
    for head in COLUMNS:
        table.add_column(head, justify="right")
    for outcome in outcomes:
        table.add_row(*(Text(one_line(text)) for text in (outcome.algorithm, *outcome.texts())))
    Console(highlight=False, emoji=False).print(table)
