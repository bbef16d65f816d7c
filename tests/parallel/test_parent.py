# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A rank ends when what has started it was killed, and only then."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemo_ptq.parallel.parent import LAUNCHER, end_with_parent, name_of

# A launcher starts an agent, the agent a rank, which says its number and waits. Each of them does nothing else.
RANK = """
import os, time
from nemo_ptq.parallel.parent import end_with_parent
end_with_parent()
print(os.getpid(), flush=True)
time.sleep(600)
"""
AGENT = f"""
import os, subprocess, sys, time
print(os.getpid(), flush=True)
subprocess.run([sys.executable, "-c", {RANK!r}])
"""
LAUNCHING = f"""
import os, subprocess, sys
from nemo_ptq.parallel.parent import LAUNCHER, name_of
environment = {{**os.environ, LAUNCHER: name_of(os.getpid())}} if sys.argv[1] == "named" else os.environ
print(os.getpid(), flush=True)
subprocess.run([sys.executable, "-c", {AGENT!r}], env=environment)
"""


def lives(pid: int) -> bool:
    return not name_of(pid).endswith("None")


def ends(pid: int) -> bool:
    """Whether a process ends within a minute."""
    deadline = time.monotonic() + 60
    while lives(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not lives(pid)


@pytest.mark.parametrize(
    ("killed", "named", "elastic", "rank_ends"),
    [
        ("agent", False, True, True),
        ("launcher", True, True, True),
        ("launcher", True, False, True),
        ("launcher", False, True, False),  # a shell that has started torchrun with nohup
        ("agent", False, False, False),  # a shell that has started the rank itself
    ],
)
def test_a_rank_ends_with_what_has_started_it(killed: str, named: bool, elastic: bool, rank_ends: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RUN_ID"}
    if elastic:
        environment["TORCHELASTIC_RUN_ID"] = "1"
    command = [sys.executable, "-c", LAUNCHING, "named" if named else "-"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as launcher:
        assert launcher.stdout is not None
        pids = dict(
            zip(("launcher", "agent", "rank"), (int(launcher.stdout.readline()) for _ in range(3)), strict=True)
        )
        try:
            os.kill(pids[killed], signal.SIGKILL)
            if rank_ends:
                assert ends(pids["rank"])
            else:
                time.sleep(3)  # more than it waits between two looks
                assert lives(pids["rank"])
        finally:
            for pid in pids.values():
                if lives(pid):
                    os.kill(pid, signal.SIGKILL)


def test_a_launcher_on_another_host_is_not_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []
    monkeypatch.setattr("threading.Thread.start", lambda thread: started.append(thread))
    end_with_parent({LAUNCHER: "another 1 1"})
    end_with_parent({})
    assert started == []
    end_with_parent({LAUNCHER: f"{socket.gethostname()} 1 1"})
    assert len(started) == 1


def test_a_number_that_was_given_again_is_another_process() -> None:
    name = name_of(os.getpid())
    host, pid, began = name.split()
    assert (host, int(pid)) == (socket.gethostname(), os.getpid())
    assert int(began) == int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
