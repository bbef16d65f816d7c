# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What the user sees: plain lines in a log, a live bar on a terminal, nothing from the other ranks."""

import io

import pytest
from rich.console import Console

from nemo_ptq.console import reporter
from nemo_ptq.console.reporter import Reporter


class Clock:
    """Time that passes when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(reporter.time, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def make_reporter(enabled: bool = True, terminal: bool = False) -> tuple[Reporter, io.StringIO]:
    output = io.StringIO()
    return Reporter(enabled, Console(file=output, force_terminal=terminal, width=200, highlight=False)), output


def test_lines_are_printed_as_they_are() -> None:
    speaker, output = make_reporter()
    speaker.say("loaded [bold]weights[/bold] from /a[1]")
    speaker.warn("3 of 8 experts saw no token")
    assert output.getvalue() == "loaded [bold]weights[/bold] from /a[1]\nwarning: 3 of 8 experts saw no token\n"


def test_a_word_between_colons_is_no_picture(capsys: pytest.CaptureFixture[str]) -> None:
    Reporter(True).say("owner/name:train: 512 samples")
    assert capsys.readouterr().out == "owner/name:train: 512 samples\n"


def test_what_a_terminal_would_obey_is_written_out() -> None:
    speaker, output = make_reporter(terminal=True)
    speaker.say("reading /a\x1b]0;title\x07\x9b2J\u202eb\udcff")
    assert output.getvalue() == "reading /a\\x1b]0;title\\x07\\x9b2J\\u202eb\\udcff\n"


def test_other_ranks_are_silent() -> None:
    speaker, output = make_reporter(enabled=False, terminal=True)
    speaker.say("hello")
    speaker.warn("careful")
    with speaker.step("load"), speaker.progress("calibration", 4) as progress:
        progress.advance(4, 100)
    assert output.getvalue() == ""


def test_colours_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured, output = make_reporter(terminal=True)
    coloured.warn("careful")
    assert "\x1b[33m" in output.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    plain, output = make_reporter(terminal=True)
    plain.warn("careful")
    assert output.getvalue() == "warning: careful\n"


def test_a_verdict_has_a_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for is_bad, colour in ((False, "32m"), (True, "31m")):
        coloured, output = make_reporter(terminal=True)
        coloured.judge("the verdict", is_bad)
        assert colour in output.getvalue()
        plain, output = make_reporter()
        plain.judge("the verdict", is_bad)
        assert output.getvalue() == "the verdict\n"


def test_steps_are_timed(clock: Clock) -> None:
    speaker, output = make_reporter()
    with speaker.step("load"):
        clock.now += 2.345
    assert output.getvalue() == "load: 2.3 s\n"


def test_a_step_that_fails_is_not_reported_as_done(clock: Clock) -> None:
    speaker, output = make_reporter()
    with pytest.raises(RuntimeError), speaker.step("load"):
        raise RuntimeError
    assert output.getvalue() == ""


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end(clock: Clock) -> None:
    speaker, output = make_reporter()
    with speaker.progress("calibration", 16) as progress:
        for _ in range(4):
            clock.now += 6.0
            progress.advance(4, 1200)
    assert output.getvalue().splitlines() == [
        "calibration: 8/16 samples, 0.7 samples/s, 200 tokens/s, 12 s left",
        "calibration: 16/16 samples, 0.7 samples/s, 200 tokens/s",
    ]


def test_units_without_tokens_have_one_rate(clock: Clock) -> None:
    speaker, output = make_reporter()
    with speaker.progress("export", 2, "blocks") as progress:
        clock.now += 1.0
        progress.advance(2)
    assert output.getvalue() == "export: 2/2 blocks, 2.0 blocks/s\n"


def test_a_terminal_gets_a_bar_that_leaves_nothing_behind() -> None:
    speaker, output = make_reporter(terminal=True)
    with speaker.progress("calibration", 8) as progress:
        progress.advance(4, 100)
        progress.advance(4, 100)
    shown = output.getvalue()
    assert "calibration" in shown
    assert "8/8" in shown
    assert "tokens/s" in shown
    assert shown.endswith("\x1b[2K")
