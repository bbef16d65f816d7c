# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""check_job(): turns the user's arguments into a job that can run, or reports every problem with them."""

from pathlib import Path
from typing import Any

from nemo_ptq.config import CUSTOM
from nemo_ptq.errors import ConfigError
from nemo_ptq.job import Job
from nemo_ptq.plan.files import space_problem, weight_files
from nemo_ptq.plan.rules.catalogue import findings
from nemo_ptq.plan.rules.gathering import gather, with_derived
from nemo_ptq.tracking.trackers import absolute_address

# Arguments that a job takes over unchanged.
_AS_GIVEN = (
    "calibration_tp",
    "calibration_pp",
    "calibration_ep",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "forward_loop",
    "tokenizer_path",
    "legacy_ckpt",
    "trust_checkpoint",
)


def check_job(*, world_size: int | None, launcher: str | None = None, **arguments: Any) -> Job:
    """Checks all arguments of the main job against each other, the checkpoint, the data and the launcher.

    Args:
        world_size: Processes that run the job, or will; None where that is not known.
        launcher: What starts them, for a fix to name: "torchrun", "srun", "nemo-ptq run", "run.executor=torchrun",
            "run.executor=slurm"; None for something else.
        **arguments: Those of :func:`nemo_ptq.task.ptq`, with its defaults. `plan_only` is for the caller to act upon.

    Returns:
        The job to run.

    Raises:
        ConfigError: With every problem.
        TypeError: If there is no such argument.
    """
    gathered = gather(arguments, world_size, launcher)
    values = with_derived(gathered.values)
    problems = [*gathered.problems, *(problem for _, problem in findings(values) if problem)]
    if problems:
        raise ConfigError(problems)

    adapter = values["adapter"]
    tracking, export = values["tracking"], arguments["export_config"]
    if gathered.quantization.algorithm_name != CUSTOM:  # whose sizes are not known
        files = weight_files(values["model"], values["decoder"], gathered.quantization, export)
        if problem := space_problem(export.path, files, export.resume):
            raise ConfigError([problem])
    return Job(
        checkpoint=Path(values["checkpoint"]).expanduser().absolute(),
        metadata=values["model"],
        output=Path(export.path).expanduser().absolute(),
        quantization=gathered.quantization,
        export=export,
        decoder=values["decoder"],
        adapter=None if adapter is None else Path(adapter).expanduser().absolute(),
        calibration_state=gathered.state,
        fast_because=gathered.fast_because,
        tracking=tracking and absolute_address(tracking),
        **{name: values[name] for name in _AS_GIVEN},
    )
