# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Injects faults one after the other, keeps what came of each, and sums it up."""

import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from random import Random

from tests.faults.kinds import KINDS, Kind, disks
from tests.faults.lab import PATIENCE, Lab

_BEGIN, _END = "<!-- What make test-faults found: -->\n", "<!-- . -->\n"
OUTCOMES = ("refused", "unharmed", "ended", "resumed", "left out")


@dataclass(frozen=True)
class Result:
    """What came of one fault.

    Attributes:
        kind: Name of its kind.
        number: Which of its kind it is: with the seed, that makes it again.
        fault: What was done.
        outcome: One of :data:`OUTCOMES`.
        problems: What must not be.
        seconds: How long it took.
    """

    kind: str
    number: int
    fault: str
    outcome: str
    problems: Sequence[str]
    seconds: float


def faults(share: float, names: Sequence[str]) -> Iterator[tuple[Kind, int]]:
    """The faults of a campaign: of each kind a share, at least one; no kind but those that are named, if any are."""
    for kind in KINDS:
        if not names or kind.name in names:
            for number in range(ceil(kind.count * share)):
                yield kind, number


def run(root: Path, seed: int, share: float, names: Sequence[str]) -> list[Result]:
    """Runs a campaign, or goes on with one that was cut short.

    Args:
        root: Where it works; `results.jsonl` there has what was found so far.
        seed: Chooses the faults.
        share: Of the full number of each kind.
        names: Kinds; none for all.

    Returns:
        What came of all of them.
    """
    root.mkdir(parents=True, exist_ok=True)
    log = root / "results.jsonl"
    results = [Result(**json.loads(line)) for line in log.read_text().splitlines()] if log.exists() else []
    known = {(result.kind, result.number) for result in results}
    left = [(kind, number) for kind, number in faults(share, names) if (kind.name, number) not in known]
    if not left:
        return results
    for entry in root.iterdir():  # of a campaign that was killed
        if entry != log:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    lab = Lab(root)
    if any(kind.inject is disks.failing_write for kind, _ in left):
        lab.preload_shim()
    lab.prepare()
    with log.open("a", buffering=1) as stream:
        for kind, number in left:
            results.append(_inject(lab, kind, number, seed))
            stream.write(json.dumps(asdict(results[-1])) + "\n")
            _say(results[-1])
    return results


def _remove(place: Path) -> None:
    """Removes a fault's directory, which ranks of a launcher that was killed may be tidying up still."""
    deadline = time.monotonic() + PATIENCE
    while place.exists():
        try:
            shutil.rmtree(place)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _inject(lab: Lab, kind: Kind, number: int, seed: int) -> Result:
    place, start = lab.place(), time.monotonic()
    try:
        verdict = kind.inject(lab, place, Random(f"{seed} {kind.name} {number}"))
    finally:
        _remove(place)
    problems = [*verdict.problems, *lab.inputs_problems()]
    return Result(kind.name, number, verdict.fault, verdict.outcome, problems, round(time.monotonic() - start, 1))


def _say(result: Result) -> None:
    print(f"{result.kind} {result.number}: {result.outcome}, {result.fault!r} ({result.seconds:.1f} s)", flush=True)
    for problem in result.problems:
        print(f"    PROBLEM {problem}", flush=True)


def table(results: Sequence[Result]) -> str:
    """The results as a table in Markdown."""
    lines = [
        "| what happens | faults | refused | same result | ended | resumed | left out | problems |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for kind in KINDS:
        of_kind = [result for result in results if result.kind == kind.name]
        if of_kind:
            lines.append(_row(kind.says, of_kind))
    return "\n".join([*lines, _row("**all**", results)]) + "\n"


def write(document: Path, results: Sequence[Result]) -> None:
    """Puts the table into its place in a document."""
    before, _, rest = document.read_text().partition(_BEGIN)
    document.write_text(f"{before}{_BEGIN}\n{table(results)}\n{_END}{rest.partition(_END)[2]}")


def _row(says: str, results: Sequence[Result]) -> str:
    outcomes = Counter(result.outcome for result in results)
    problems = sum(bool(result.problems) for result in results)
    counts = (len(results), *(outcomes[outcome] for outcome in OUTCOMES), problems)
    return f"| {says} | {' | '.join(str(count or '') for count in counts[:-1])} | {counts[-1]} |"
