# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Ranks end with what has started them, also where it was killed without a chance to end them.

That is torchrun's agent, a rank's parent, and a command that launches a job through NeMo-Run on this machine, which
names itself in :data:`LAUNCHER`. A process that a shell has started is left alone: it may outlive the shell.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

LAUNCHER = "NEMO_PTQ_LAUNCHER"
"""The variable in which a job finds the command that has launched it, as :func:`name_of` names it."""
# Seconds between two looks, and those that a rank has to tidy up.
_INTERVAL, _GRACE = 1.0, 30.0
# States of a process in /proc: a zombie, and one that is being removed.
_DEAD = ("Z", "X")


def name_of(pid: int) -> str:
    """Names a process for good: its host, its number, and when it began, since numbers are given again."""
    return f"{socket.gethostname()} {pid} {_began(pid)}"


def _began(pid: int) -> str | None:
    """When a process began, in clock ticks since the machine's start; None where it has ended."""
    try:
        # What follows the command's name, which may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in _DEAD else fields[19]


def _lives(name: str) -> bool:
    pid = int(name.split()[1])
    return name == name_of(pid)


def end_with_parent(environment: Mapping[str, str] = os.environ) -> None:
    """Has this process end, by SIGTERM and half a minute later by SIGKILL, when what has started it is gone.

    Args:
        environment: Environment variables.
    """
    watched = [name_of(os.getppid())] if "TORCHELASTIC_RUN_ID" in environment else []
    launcher = environment.get(LAUNCHER, "")
    if launcher.split(" ")[0] == socket.gethostname():
        watched.append(launcher)
    if watched:
        threading.Thread(target=_watch, args=(watched,), daemon=True, name="parent").start()


def _watch(names: Sequence[str]) -> None:
    while all(map(_lives, names)):
        time.sleep(_INTERVAL)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE)
    os.kill(os.getpid(), signal.SIGKILL)
