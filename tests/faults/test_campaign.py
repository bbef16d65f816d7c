# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A short campaign, and that a campaign notices what it looks for."""

from pathlib import Path
from random import Random

import pytest

from tests.faults.campaign import KINDS, Result, faults, run, table, write
from tests.faults.kinds import damage
from tests.faults.lab import Ended, Lab

QUICK = ("nemo_file", "hugging_face_file", "export_file", "saved_calibration", "code_in_context", "data_set")


@pytest.mark.timeout(600)
def test_a_few_faults_of_the_quick_kinds(tmp_path: Path) -> None:
    results = run(tmp_path / "work", seed=1, share=0.001, names=QUICK)
    assert {result.kind for result in results} == set(QUICK)
    assert [problem for result in results for problem in result.problems] == []
    assert run(tmp_path / "work", seed=1, share=0.001, names=QUICK) == results  # it goes on with what is there


def test_there_are_a_thousand() -> None:
    assert len(list(faults(1.0, ()))) >= 1000
    assert len({kind.name for kind in KINDS}) == len(KINDS)


def test_a_fault_can_be_made_again(tmp_path: Path) -> None:
    said = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file.json").write_text('{"some": "text"}' * 9)
        said.append(damage._damaged(tmp_path / name, Random("0"), lambda _: damage._SHAPES))
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("ended", "problem"),
    [
        (Ended(None, "", 60.0), "hangs"),
        (Ended(1, "Traceback (most recent call last):\n  ...\nKeyError: 1\n", 1.0), "traceback"),
        (Ended(1, "", 1.0), "without a word"),
        (Ended(1, "x" * 3000, 1.0), "2,000 characters"),
    ],
)
def test_what_no_command_may_do_is_noticed(ended: Ended, problem: str) -> None:
    assert problem in "".join(ended.problems)


def test_results_that_differ_are_noticed(tmp_path: Path) -> None:
    lab = Lab(tmp_path / "lab")
    lab.expected = {"hf/model.safetensors": "0" * 64}
    (tmp_path / "out/hf").mkdir(parents=True)
    (tmp_path / "out/hf/model.safetensors").write_text("other")
    done = Ended(0, "ready", 1.0)
    assert "taken for success, and hf/model.safetensors differ" in lab.judge("", done, tmp_path / "out").problems
    refused = Ended(1, "Error: no", 1.0)
    assert "left what looks like an export" in lab.judge("", refused, tmp_path / "out").problems
    (tmp_path / ".out.partial-1").mkdir()
    assert "left .out.partial-1" in lab.judge("", refused, tmp_path / "out").problems


def test_the_table_has_its_place(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text((Path(__file__).parents[2] / "docs/reliability.md").read_text())
    fine, wrong = Result("nemo_file", 0, "", "refused", [], 1.0), Result("data_set", 0, "", "refused", ["x"], 1.0)
    for _ in range(2):  # a second time it takes the place of the first
        write(document, [fine, wrong])
        assert document.read_text().count("| **all** | 2 | 2 |  |  |  |  | 1 |") == 1
    assert table([fine, wrong]) in document.read_text()
