# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The last line of a job: pass, fail with what to try, or why nothing is known. Figures that come later."""

from dataclasses import replace
from pathlib import Path

from nemo_ptq.report.compose import conclude, with_quality, with_tasks
from nemo_ptq.report.page import render_card, render_page
from nemo_ptq.report.records import TaskFigure, read_report, to_json
from tests.report.examples import quality, report, unquantized


def test_a_pass() -> None:
    line, is_bad = conclude(with_quality(report(), quality(0.97)))
    assert (line, is_bad) == ("pass: recovery 0.9700, at least 0.95 required", False)


def test_a_fail_says_what_to_try() -> None:
    failed = with_quality(report(), quality(0.8))
    line, is_bad = conclude(failed)
    assert is_bad
    finding = failed.findings[0]
    assert line == (
        f"fail: recovery 0.8000, at least 0.95 required; fc2 of layer 2: {finding.problem}; try {finding.advice}"
    )
    for quality_of_job, way_out in (
        ("fast", "quantization_config.quality=balanced, another algorithm"),
        ("balanced", "quantization_config.quality=max, another algorithm"),
        ("max", "another algorithm"),
    ):
        summary = replace(failed.summary, quality=quality_of_job)
        line, is_bad = conclude(replace(failed, findings=(), summary=summary))
        assert is_bad and f"required; try {way_out}, or quantization_config.exclude" in line


def test_what_was_not_measured_is_no_verdict() -> None:
    assert conclude(report()) == ("verified, quality not measured: turned off", False)
    assert conclude(replace(unquantized(), missing={})) == ("verified", False)


def test_figures_of_tasks_take_the_place_of_those_of_the_same_tasks(tmp_path: Path) -> None:
    first = [TaskFigure("arc_easy", "acc", 0.5, 0.01, 0.52, 100), TaskFigure("piqa", "acc", 0.7, documents=50, shots=5)]
    again = [TaskFigure("arc_easy", "acc", 0.6, documents=200), TaskFigure("arc_easy", "acc_norm", 0.61, documents=200)]
    found = with_tasks(with_tasks(report(), first), again)
    assert found.tasks == (first[1], *again)
    (tmp_path / "report.json").write_text(to_json(found))
    assert read_report(tmp_path / "report.json").tasks == found.tasks
    card = render_card(with_tasks(report(), first))
    assert "| arc_easy | acc | 0.5000 | 0.0100 | 0.5200 | 100 |" in card
    assert "| piqa, 5 shots | acc | 0.7000 |  |  | 50 |" in card
    assert "<td>piqa, 5 shots</td><td>acc</td><td>0.7000</td>" in render_page(found)
    assert "lm-evaluation-harness" not in render_card(report())
