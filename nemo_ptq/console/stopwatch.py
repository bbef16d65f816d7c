# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What a step costs on this rank: its time, and the most memory that it needed."""

import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# See proc(5): writing 5 sets the peak that /proc/self/status calls VmHWM back to what is resident now.
_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass(frozen=True)
class Step:
    """One step of a job.

    Attributes:
        name: Name of the step.
        seconds: Duration.
        peak_memory_bytes: The most memory that was in use at a time: allocated by torch on a rank with a GPU, resident
            in main memory on one without.
    """

    name: str
    seconds: float
    peak_memory_bytes: int


@dataclass
class Stopwatch:
    """Measures steps, one after the other.

    Attributes:
        steps: The steps measured so far; a failed step is not among them.
    """

    steps: list[Step] = field(default_factory=list)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Measures what runs in a ``with`` block as one step."""
        _reset_peak()
        start = time.perf_counter()
        yield
        self.steps.append(Step(name, time.perf_counter() - start, _peak()))

    @contextmanager
    def accumulate(self, name: str) -> Iterator[None]:
        """Adds what runs in a ``with`` block to the step of this name, which may have run in parts before."""
        _reset_peak()
        start = time.perf_counter()
        yield
        seconds, peak = time.perf_counter() - start, _peak()
        for place, step in enumerate(self.steps):
            if step.name == name:
                self.steps[place] = Step(name, step.seconds + seconds, max(step.peak_memory_bytes, peak))
                return
        self.steps.append(Step(name, seconds, peak))


def _cuda() -> Any:
    """torch.cuda if this process uses a GPU; torch is not imported for the question."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def _reset_peak() -> None:
    if cuda := _cuda():
        cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):  # Some containers forbid it: the peak is then that of all steps so far.
        _CLEAR_REFS.write_text("5")


def _peak() -> int:
    if cuda := _cuda():
        return cuda.max_memory_allocated()
    for line in _STATUS.read_text().splitlines() if _STATUS.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def slowest(of_ranks: Sequence[Sequence[Step]]) -> list[Step]:
    """Merges the steps of all ranks: for each the longest time and the largest peak of any rank.

    Args:
        of_ranks: The steps of each rank. A rank may lack some: a job that is resumed calibrates nothing on a pipeline
            stage whose blocks are all finished.

    Returns:
        Every step that some rank has, in the order of the rank with the most.
    """
    by_name: dict[str, list[Step]] = {}
    for steps in sorted(of_ranks, key=len, reverse=True):
        for step in steps:
            by_name.setdefault(step.name, []).append(step)
    return [
        Step(name, max(step.seconds for step in steps), max(step.peak_memory_bytes for step in steps))
        for name, steps in by_name.items()
    ]
