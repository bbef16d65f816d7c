# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What rank 0 tells the user: plain lines where nobody watches a terminal, a live progress bar where somebody does."""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nemo_ptq.console.stopwatch import Step, Stopwatch
from nemo_ptq.console.text import printable

# Seconds between two plain progress lines.
_LINE_INTERVAL = 10.0


class Reporter:
    """Prints steps and progress for one process; every rank but the first stays silent.

    Args:
        enabled: Whether this process prints anything.
        console: Where to; standard output unless a test says otherwise. Rich turns colours and live bars off by
            itself when the output is not a terminal or ``NO_COLOR`` is set.
    """

    def __init__(self, enabled: bool, console: Console | None = None) -> None:
        self.enabled = enabled
        self._stopwatch = Stopwatch()
        self._is_full = False
        self._console = console or Console(file=sys.stdout, highlight=False, soft_wrap=True, emoji=False)

    def say(self, message: str) -> None:
        """Prints one line."""
        self._print(printable(message))

    def warn(self, message: str) -> None:
        """Prints one line that the user should not miss."""
        self._print(f"warning: {printable(message)}", "yellow")

    def judge(self, message: str, is_bad: bool) -> None:
        """Prints one line with a verdict: green, or red if it is bad."""
        self._print(printable(message), "bold red" if is_bad else "green")

    def _print(self, line: str, style: str | None = None) -> None:
        if not self.enabled or self._is_full:
            return
        try:
            self._console.print(line, style=style, markup=False)
            self._console.file.flush()
        except OSError as error:
            # A log that has no room is no reason to lose hours of work.
            self._is_full = True
            print(f"warning: the job goes on, but its log cannot be written: {error.strerror}", file=sys.stderr)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Times a step and prints its name and duration when it ends."""
        with self._stopwatch.measure(name):
            yield
        self.say(f"{name}: {self.steps[-1].seconds:.1f} s")

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Times a part of a step that other steps take turns with; :meth:`say_steps` tells of it at the end."""
        with self._stopwatch.accumulate(name):
            yield

    def say_steps(self, names: Iterable[str]) -> None:
        """Prints the durations of steps that ran in parts."""
        for step in self.steps:
            if step.name in names:
                self.say(f"{step.name}: {step.seconds:.1f} s")

    @property
    def steps(self) -> list[Step]:
        """The steps of this process that have ended."""
        return self._stopwatch.steps

    @contextmanager
    def progress(self, name: str, total: int, unit: str = "samples") -> Iterator["Progression"]:
        """Follows a long step.

        Args:
            name: Name of the step.
            total: Total number of units.
            unit: Name of the unit.
        """
        if self.enabled and self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=self._console, transient=True) as bar:
                yield Progression(self, name, total, unit, bar)
        else:
            yield Progression(self, name, total, unit, None)


class Progression:
    """The state of one :meth:`Reporter.progress`: counts units and tokens, and shows their rates."""

    def __init__(self, reporter: Reporter, name: str, total: int, unit: str, bar: Progress | None) -> None:
        self._reporter, self._name, self._total, self._unit, self._bar = reporter, name, total, unit, bar
        self._start = self._last_line = time.perf_counter()
        self._done = self._tokens = 0
        self._task = bar.add_task(name, total=total, rate="") if bar is not None else None

    def advance(self, units: int, tokens: int = 0) -> None:
        """Counts ``units`` more units, which together held ``tokens`` tokens."""
        self._done += units
        self._tokens += tokens
        now = time.perf_counter()
        elapsed = max(now - self._start, 1e-9)
        rate = f"{self._done / elapsed:,.1f} {self._unit}/s"
        if self._tokens:
            rate += f", {self._tokens / elapsed:,.0f} tokens/s"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=units, rate=rate)
        elif self._done >= self._total or now - self._last_line > _LINE_INTERVAL:
            self._last_line = now
            left = (self._total - self._done) * elapsed / self._done
            self._reporter.say(
                f"{self._name}: {self._done}/{self._total} {self._unit}, {rate}"
                + (f", {left:.0f} s left" if left > 0 else "")
            )
