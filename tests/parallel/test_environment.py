# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A process finds its place among the ranks from its launcher's variables."""

import pytest

from nemo_ptq.errors import PtqError
from nemo_ptq.parallel.environment import Launch, read_launch

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
TASK = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}
# As in a script that sbatch runs with --ntasks 4.
BATCH_SCRIPT = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("environment", "launch"),
    [
        ({}, Launch(0, 1, 0)),
        (TORCHRUN, Launch(5, 8, 1, "torchrun")),
        (TASK, Launch(3, 4, 1, "srun")),
        ({**BATCH_SCRIPT, **TORCHRUN}, Launch(5, 8, 1, "torchrun")),
        ({**TASK, **TORCHRUN}, Launch(5, 8, 1, "torchrun")),  # srun torchrun ...
        (BATCH_SCRIPT, Launch(0, 1, 0)),
        ({"RANK": "1"}, Launch(0, 1, 0)),
    ],
)
def test_the_launchers_variables(environment: dict[str, str], launch: Launch) -> None:
    assert read_launch(environment) == launch


def test_a_variable_that_is_no_number() -> None:
    with pytest.raises(PtqError, match="RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers"):
        read_launch({**TORCHRUN, "RANK": "first"})
