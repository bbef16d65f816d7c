# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Medians of timings, their table, and the bytes that the floor writes."""

import os
from pathlib import Path

import pytest

from benchmarks.floor import write_files
from benchmarks.side_by_side import Timing, median, table


def test_each_step_has_its_own_median() -> None:
    runs = [
        Timing({"load": 1.0, "export": 9.0}, 12.0),
        Timing({"load": 3.0, "export": 5.0}, 11.0),
        Timing({"load": 2.0, "export": 7.0}, 20.0),
    ]
    assert median(runs) == Timing({"load": 2.0, "export": 7.0}, 12.0)
    assert median(runs).rest == 3.0


def test_runs_of_other_steps_have_no_median() -> None:
    with pytest.raises(ValueError, match=r"\['load'\] and \['load', 'verify'\]"):
        median([Timing({"load": 1.0}, 2.0), Timing({"load": 1.0, "verify": 1.0}, 3.0)])


def test_the_table_has_every_step_and_what_no_step_accounts_for() -> None:
    ours = Timing({"load": 1.0, "calibrate": 2.0, "export": 1.5, "verify": 0.5}, 6.0)
    theirs = Timing({"load": 2.0, "calibrate": 4.0, "export": 2.0}, 12.0)
    floor = Timing({"load": 0.5, "calibrate": 1.0, "export": 0.75}, 2.25)
    assert table({"ours": ours, "theirs": theirs, "floor": floor}, "theirs").splitlines() == [
        "| seconds | ours | theirs | floor |",
        "|---|--:|--:|--:|",
        "| load | 1.00 | 2.00 | 0.50 |",
        "| calibrate | 2.00 | 4.00 | 1.00 |",
        "| export | 1.50 | 2.00 | 0.75 |",
        "| verify | 0.50 |  |  |",
        "| imports, start and end | 1.00 | 4.00 | 0.00 |",
        "| **in all** | **6.00** | **12.00** | **2.25** |",
        "| ratio to theirs | 0.50 | 1.00 | 0.19 |",
    ]


def test_the_floor_writes_each_size_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, fsync = [], os.fsync

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        written.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr("benchmarks.floor._CHUNK", 5)
    write_files([3, 13, 0], tmp_path)
    assert written == [3, 13, 0]
    assert list(tmp_path.iterdir()) == []
