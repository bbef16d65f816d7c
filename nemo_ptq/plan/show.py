# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A plan as one table, with a tick or a cross on each line that can be right or wrong."""

import sys
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nemo_ptq.config import NO_QUANT
from nemo_ptq.console.text import one_line
from nemo_ptq.plan.files import FileSize
from nemo_ptq.plan.memory import StepMemory
from nemo_ptq.plan.planning import Plan

# Rank files that are listed one by one.
_FILES_SHOWN = 8
_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))

# Section, whether it is right (None: it cannot be wrong), what, figure.
Row = tuple[str, bool | None, str, str]


def _decimal(value: float, unit: str) -> str:
    for size, prefix in _UNITS:
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.0f} {unit}"


def _binary(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 else "under 1 s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _model(plan: Plan) -> Iterator[Row]:
    spread = plan.parallelism
    sizes = f"TP {spread.tp} x PP {spread.pp}" + (f" x EP {spread.ep}" if spread.ep > 1 else "")
    yield "model", None, plan.model, f"{plan.parameters / 1e9:,.3f} billion parameters, {plan.layers} layers"
    if plan.algorithm != NO_QUANT:
        since = "" if plan.fast_because is None else f", since {plan.fast_because}"
        yield "model", None, "quality", f"{plan.quality}{since}"
    yield "model", None, "calibration", f"{plan.algorithm}, {sizes} on {spread.ranks} x {plan.device.name}"


def _rules(plan: Plan) -> Iterator[Row]:
    for rule in plan.rules:
        yield "rules", rule.problem is None, rule.problem or rule.says, ""


def _memory(plan: Plan) -> Iterator[Row]:
    for step in plan.memory:
        fits = step.device <= plan.device.usable if not plan.device.is_cpu else None
        yield "memory of a rank", fits, step.step, f"{_binary(step.device)}: {_parts(step)}"
    where = "all ranks and their libraries" if plan.device.is_cpu else "the largest step"
    for mode in plan.modes:
        usable = f"{_binary(mode.needs)} of {_binary(plan.device.usable)} that {plan.device.name} can give"
        if mode is plan.chosen:
            yield "memory of a rank", mode.fits, f"{where}, {mode.name}", usable
        else:
            yield "memory of a rank", None, f"{where}, were it {mode.name}", usable


def _parts(step: StepMemory) -> str:
    parts = {
        "weights": step.weights,
        "waiting hidden states": step.states,
        "activations": step.activations,
        "Gram matrices": step.statistics,
        "buffers": step.buffers,
    }
    shown = [", ".join(f"{name} {_binary(size)}" for name, size in parts.items() if size)]
    shown += [f"on the host {_binary(step.host)}"] if step.host else []
    return "; ".join(part for part in shown if part)


def _files(plan: Plan) -> Iterator[Row]:
    ranks = [file for file in plan.files if "rank" in file.name]
    others = [file for file in plan.files if file not in ranks]
    if len(ranks) > _FILES_SHOWN:
        sizes = sorted({file.bytes for file in ranks})
        name = f"{ranks[0].name} to {ranks[-1].name}"
        yield "files", None, name, f"{len(ranks)} files of {' or '.join(f'{size:,}' for size in sizes[:3])} bytes"
    else:
        for file in ranks:
            yield "files", None, file.name, _size(file)
    for file in others:
        yield "files", None, file.name, _size(file)
    if plan.files:
        yield "files", None, "all", _decimal(sum(file.bytes for file in plan.files), "B")


def _size(file: FileSize) -> str:
    return f"{'' if file.exact else 'about '}{file.bytes:,} bytes"


def _servers(plan: Plan) -> Iterator[Row]:
    for line in plan.servers:
        known = f"{line.outcome} ({line.known_by})" if line.known_by else line.outcome
        yield "servers", None, f"{line.server}, {line.format}", f"{known}{': ' if line.note else ''}{line.note}"


def _work(plan: Plan) -> Iterator[Row]:
    if plan.flops:
        yield "time, about", None, "operations", _decimal(plan.flops, "FLOP")
    for step, seconds in plan.seconds.items():
        yield "time, about", None, step, _time(seconds)
    for mode in plan.modes:
        name = f"all, {mode.name}" if mode is plan.chosen else f"all, were it {mode.name}"
        total = _time(sum(mode.seconds.values()))
        yield "time, about", None, name, f"{total}, reading {_decimal(mode.read_bytes, 'B')} of weights"


def show_plan(plan: Plan, console: Console | None = None) -> None:
    """Prints a plan.

    Args:
        plan: The plan.
        console: Where to; standard output unless a test says otherwise. Rich turns colours off by itself where the
            output is not a terminal or ``NO_COLOR`` is set.
    """
    console = console or Console(file=sys.stdout, highlight=False, soft_wrap=True, emoji=False)
    ticks = ("✓", "✗") if console.encoding.lower().startswith("utf") else ("ok", "NO")
    sections = (_model, _rules, _memory, _files, _servers, _work)
    rows = [
        (name, right, one_line(what), one_line(figure))
        for section in sections
        for name, right, what, figure in section(plan)
    ]
    if console.is_terminal:
        console.print(_table(rows, ticks), soft_wrap=False)
    else:
        # For a log or another program: a line for each row, however long.
        for section, right, what, figure in rows:
            tick = " " if right is None else ticks[not right]
            console.print(f"{tick} {section}: {what}{': ' if figure else ''}{figure}", markup=False)
    for suggestion in plan.suggestions:
        console.print(f"suggestion: {one_line(suggestion)}", style="yellow", markup=False)
    verdict = "the job fits and keeps every rule" if plan.ok else "the job cannot run like this"
    console.print(f"{ticks[not plan.ok]} {verdict}", style="green" if plan.ok else "bold red", markup=False)


def _table(rows: list[Row], ticks: tuple[str, str]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    section = ""
    for name, right, what, figure in rows:
        if name != section:
            table.add_row("", Text(name, style="bold"), "")
            section = name
        tick = Text("") if right is None else Text(ticks[not right], style="green" if right else "bold red")
        style = "red" if right is False else ""
        table.add_row(tick, Text(what, style="" if figure else style), Text(figure, style=style))
    return table
