# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Text from outside on its way to a terminal."""

from nemo_ptq.console.text import one_line, printable, shortened


def test_what_a_terminal_would_obey_is_written_out() -> None:
    assert printable("a\x1b[31m/b\n\u202ec") == "a\\x1b[31m/b\n\\u202ec"
    assert one_line("a\nb") == "a\\nb"


def test_long_lines_keep_their_ends() -> None:
    told = shortened(f"calibration_tp={'x' * 5000} is not valid: give a number\nthe next line")
    first, second = told.split("\n")
    assert len(first) <= 1000 and second == "the next line"
    assert first.startswith("calibration_tp=xxx") and first.endswith("x is not valid: give a number")
    assert shortened("x" * 1000) == "x" * 1000
