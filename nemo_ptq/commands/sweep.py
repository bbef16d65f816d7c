# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""`nemo-ptq sweep`: several algorithms over one checkpoint, and what each of them costs."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from nemo_ptq.errors import ConfigError, PtqError

_PATH = "export_config.path="
# Heads of the comparison's columns: the field of an outcome, and how it is written.
_COLUMNS: Mapping[str, tuple[str, Callable[[Any], str]]] = {
    "size, GB": ("export_bytes", lambda value: f"{value / 1e9:.3g}"),
    "times smaller": ("compression", lambda value: f"{value:.2f}"),
    "perplexity": ("perplexity", lambda value: f"{value:.3f}"),
    "recovery": ("recovery", lambda value: f"{value:.4f}"),
    "KL, nats": ("kl_divergence", lambda value: f"{value:.4f}"),
    "seconds": ("seconds", lambda value: f"{value:.1f}"),
    "peak GB": ("peak_memory_bytes", lambda value: f"{value / 1e9:.3g}"),
}


def sweep(
    arguments: Annotated[Optional[list[str]], typer.Argument(metavar="NAME=VALUE...", help="See below.")] = None,
    model: Annotated[
        Optional[str], typer.Option(help="Sweep over the recipes of a model, e.g. llama3_8b, each with its settings.")
    ] = None,
    algorithms: Annotated[
        Optional[str], typer.Option(help="Which ones, with commas between. [default: fp8,int8_sq,int4_awq]")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="With run.executor=slurm: return once submitted.")] = False,
) -> None:
    """Run several algorithms over one checkpoint as one NeMo-Run experiment, and compare them.

    export_config.path is the directory in which each has its own; the comparison is left there too.
    """
    from nemo_ptq.sweep import ALGORITHMS, read_outcome, recipes_of, run_sweep

    given = arguments or []
    paths = [argument.removeprefix(_PATH) for argument in given if argument.startswith(_PATH)]
    try:
        if not paths:
            raise ConfigError([f"{_PATH[:-1]} is missing: name the directory to make"])
        directory = Path(paths[-1]).expanduser().absolute()
        recipes: dict[str, str | None] = {**recipes_of(model)} if model else dict.fromkeys(ALGORITHMS)
        if algorithms:
            recipes = {name: recipes.get(name) for name in algorithms.split(",")}
        shared = [argument for argument in given if not argument.startswith(_PATH)]
        failures = run_sweep(shared, recipes, directory, detach)
    except ConfigError as error:
        for problem in error.problems:
            typer.echo(f"Error: {problem}", err=True)
        raise typer.Exit(2) from error
    if detach:
        return
    outcomes = [read_outcome(name, directory / name, failures.get(name)) for name in recipes]
    _show(outcomes)
    (directory / "sweep.json").write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=2) + "\n")
    if failures:
        raise PtqError("\n".join(f"{name}: {failure}" for name, failure in failures.items()))


def _show(outcomes: Sequence[Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("algorithm")
    for head in _COLUMNS:
        table.add_column(head, justify="right")
    for outcome in outcomes:
        values = [(getattr(outcome, field), write) for field, write in _COLUMNS.values()]
        texts = ["" if value is None else write(value) for value, write in values]
        table.add_row(outcome.algorithm, *(["FAILED", *[""] * (len(texts) - 1)] if outcome.failure else texts))
    Console(highlight=False).print(table)
