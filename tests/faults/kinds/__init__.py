# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Kinds of faults. Each is a function of the lab, a place of its own and a random number generator."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.faults.kinds import commands, damage, disks, hostile, processes
from tests.faults.lab import Lab, Verdict


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Attributes:
        inject: Does one fault of it.
        says: What it is, for the table.
        count: How many of them the campaign has.
    """

    inject: Callable[[Lab, Path, Random], Verdict]
    says: str
    count: int

    @property
    def name(self) -> str:
        """The function's name."""
        return self.inject.__name__


KINDS = (
    Kind(damage.nemo_file, "a file of a NeMo checkpoint is damaged, missing, or not a regular file", 150),
    Kind(damage.hugging_face_file, "the same with a Hugging Face directory", 100),
    Kind(damage.setting, "config.json has an invalid value", 100),
    Kind(damage.export_file, "a file of an export is damaged: `nemo-ptq verify`", 200),
    Kind(damage.saved_calibration, "a saved calibration is damaged: `nemo-ptq export`", 80),
    Kind(hostile.code_in_context, "a NeMo context names code to call", 60),
    Kind(hostile.pickled_code, "a pickle of a checkpoint holds code", 40),
    Kind(hostile.data_set, "a data set is invalid", 60),
    Kind(commands.argument, "an option has an invalid value", 60),
    Kind(commands.console, "the terminal is full, closed or limited to ASCII", 20),
    Kind(processes.killed_job, "kill -9 of a job, resident and layer-wise; another run goes on", 60),
    Kind(processes.interrupted_job, "SIGINT or SIGTERM to a job", 40),
    Kind(processes.interrupted_launch, "SIGINT, SIGTERM or SIGKILL to a launcher of one or two ranks", 20),
    Kind(processes.pair_of_jobs, "two jobs with one output", 30),
    Kind(disks.file_limit, "files may not grow further (RLIMIT_FSIZE)", 50),
    Kind(disks.full_disk, "the disk is full", 40),
    Kind(disks.failing_write, "the n-th write fails: no space, or an I/O error", 60),
)
