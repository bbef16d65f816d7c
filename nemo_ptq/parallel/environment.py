# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""How a process learns its rank, from torchrun's variables or Slurm's. Needs no torch: arguments are checked before."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from nemo_ptq.errors import PtqError


@dataclass(frozen=True)
class Launch:
    """One process of a job, as its launcher describes it.

    Example: the third of four ranks, second on its node: ``Launch(rank=2, world_size=4, local_rank=1)``.

    Attributes:
        rank: Number of this process among all of the job.
        world_size: Number of processes of the job.
        local_rank: Number of this process among those on its node.
        launcher: "torchrun", "srun", or None if started without a launcher.
    """

    rank: int
    world_size: int
    local_rank: int
    launcher: str | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which speaks and writes for all."""
        return self.rank == 0


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Reads this process's place from torchrun's variables, or Slurm's; without either the process is alone.

    Slurm sets a task's variables in a batch script too, which is no task: only srun sets the number of a step.

    Args:
        environment: Environment variables.

    Raises:
        PtqError: If a variable of the launcher is not a number.
    """
    for launcher, rank, world_size, local_rank in (
        ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("srun", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    ):
        is_batch_script = launcher == "srun" and "SLURM_JOB_ID" in environment and "SLURM_STEP_ID" not in environment
        if rank in environment and world_size in environment and not is_batch_script:
            try:
                return Launch(
                    int(environment[rank]),
                    int(environment[world_size]),
                    int(environment.get(local_rank, "0")),
                    launcher,
                )
            except ValueError as error:
                raise PtqError(f"{rank}, {world_size} and {local_rank} must be whole numbers: {error}") from error
    return Launch(0, 1, 0)
