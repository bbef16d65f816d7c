# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Standard output that is full is a line, and no traceback; a job's log that fills up is no reason to lose the job."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from nemo_ptq.console.output import written_output
from nemo_ptq.console.reporter import Reporter

COMMAND = "from nemo_ptq.cli.app import main; main()"


@pytest.mark.parametrize("words", [["recipes"], ["runs"], ["--help"]])
def test_a_command_whose_output_is_full(words: list[str], tmp_path: Path) -> None:
    environment = {**os.environ, "NEMORUN_HOME": str(tmp_path)}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, *words], stdout=full, stderr=subprocess.PIPE, text=True, env=environment
        )
    assert done.stderr == "Error: the output cannot be written: No space left on device\n"
    assert done.returncode == 1


def test_a_reader_that_has_seen_enough(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", COMMAND, "recipes"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.stderr == ""


def test_output_that_is_closed_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it after `>&-`
    with written_output():
        print("nobody reads this")
        Console().print("nor this")


def test_a_job_goes_on_without_its_log(capsys: pytest.CaptureFixture[str]) -> None:
    with open("/dev/full", "w") as full:
        reporter = Reporter(True, Console(file=full))
        for _ in range(3):
            reporter.say("a step")
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
    said = "warning: the job goes on, but its log cannot be written: No space left on device\n"
    assert capsys.readouterr().err == said
