# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A command that is told to end says so in a line, ends with the status that a shell expects, and tidies up."""

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import os, signal, sys, time, weakref
from nemo_ptq.console.interrupts import end_at_once, tidying_up

speaks = "silent" not in sys.argv
end_at_once(speaks)
class Thing:
    pass


if "callback" in sys.argv:
    thing = Thing()
    # The signal comes while Python clears an object away, and drops what is raised there.
    watch = weakref.ref(thing, lambda _: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(0.1)))
    with tidying_up(speaks):
        try:
            print("ready", flush=True)
            sys.stdin.readline()
            del thing
            time.sleep(60)
        finally:
            print("tidied up", flush=True)
elif "replaced" in sys.argv:
    with tidying_up(speaks):
        try:
            print("ready", flush=True)
            sys.stdin.readline()
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)
            except SystemExit:  # as compiled code does that reports an error of its own
                raise ValueError("not a matrix") from None
        finally:
            print("tidied up", flush=True)
elif "job" in sys.argv:
    with tidying_up(speaks):
        try:
            print("ready", flush=True)
            time.sleep(60)
        finally:
            print("tidied up", flush=True)
else:
    print("ready", flush=True)
    time.sleep(60)
"""


def ended(number: signal.Signals, *words: str) -> tuple[int, str, str]:
    """Status, output and errors of the program that gets a signal as soon as it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    output, errors = process.communicate(timeout=30)
    return process.returncode, output, errors


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_ends_with_a_line(number: signal.Signals, status: int) -> None:
    assert ended(number) == (status, "", f"Error: ended by {number.name}\n")
    assert ended(number, "job") == (status, "tidied up\n", f"Error: ended by {number.name}\n")


@pytest.mark.parametrize("how", ["callback", "replaced"])
def test_a_signal_is_not_lost_where_its_exception_is(how: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], input="\n", capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == (143, "ready\ntidied up\n", "Error: ended by SIGTERM\n")


def test_of_several_ranks_their_launcher_speaks() -> None:
    assert ended(signal.SIGTERM, "silent") == (143, "", "")
    assert ended(signal.SIGTERM, "silent", "job") == (143, "tidied up\n", "")
