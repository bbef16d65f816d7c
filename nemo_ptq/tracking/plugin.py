# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The NeMo-Run plugin that tells a job which experiment it belongs to. Importing it imports NeMo-Run."""

from dataclasses import dataclass
from typing import Any

import nemo_run as run

from nemo_ptq.tracking.runs import EXPERIMENT_ID, JOB_DIR

# NeMo-Run puts a Slurm job's directory in place of this, or mounts it there in a container.
_SLURM_JOB_DIR = "/nemo_run"


@dataclass(kw_only=True)
class RunRecord(run.Plugin):
    """Puts the record of a run into its experiment's job directory. `nemo llm ptq` adds it to every experiment."""

    def setup(self, task: Any, executor: run.Executor) -> None:
        """Sets the variables from which the task knows its experiment.

        Args:
            task: The task.
            executor: The executor of its job.
        """
        job_dir = _SLURM_JOB_DIR if isinstance(executor, run.SlurmExecutor) else executor.job_dir
        executor.env_vars = {**executor.env_vars, EXPERIMENT_ID: self.experiment_id, JOB_DIR: job_dir}
