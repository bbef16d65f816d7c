# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The last line of a job: pass, fail with what to try, or why nothing is known."""

from dataclasses import replace

from nemo_ptq.report.compose import conclude, with_quality
from tests.report.examples import quality, report, unquantized


def test_a_pass() -> None:
    line, is_bad = conclude(with_quality(report(), quality(0.97)))
    assert (line, is_bad) == ("pass: recovery 0.9700, and at least 0.95 is wanted", False)


def test_a_fail_says_what_to_try() -> None:
    failed = with_quality(report(), quality(0.8))
    line, is_bad = conclude(failed)
    assert is_bad
    finding = failed.findings[0]
    assert line == (
        f"fail: recovery 0.8000, and at least 0.95 is wanted; fc2 of layer 2: {finding.problem}; try {finding.advice}"
    )
    line, is_bad = conclude(replace(failed, findings=()))
    assert is_bad and line.endswith("or quantization_config.exclude for the layers that the report shows to lose most")


def test_what_was_not_measured_is_no_verdict() -> None:
    assert conclude(report()) == ("verified, quality not measured: turned off", False)
    assert conclude(replace(unquantized(), missing={})) == ("verified", False)
