# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""check_job(): from the arguments that the user gave to a job that can run, or all that is wrong with them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_ptq.checkpoint.metadata import CheckpointMetadata
from nemo_ptq.config import ExportConfig, QuantizationConfig
from nemo_ptq.errors import ConfigError
from nemo_ptq.job import Job
from nemo_ptq.preflight.gathering import gather, with_derived
from nemo_ptq.preflight.rules import findings
from nemo_ptq.tracking.trackers import absolute_address


def check_job(
    *,
    world_size: int | None,
    launcher: str | None = None,
    nemo_checkpoint: str | os.PathLike[str] | None = None,
    export_config: ExportConfig | None = None,
    calibration_tp: int = 1,
    calibration_pp: int = 1,
    calibration_ep: int = 1,
    num_layers_in_first_pipeline_stage: int | None = None,
    num_layers_in_last_pipeline_stage: int | None = None,
    devices: int | None = None,
    num_nodes: int | None = None,
    quantization_config: QuantizationConfig | None = None,
    forward_loop: Callable[[Any], Any] | None = None,
    tokenizer_path: str | None = None,
    calibration_state: str | os.PathLike[str] | None = None,
    legacy_ckpt: bool = False,
    tracking: str | None = None,
    model_path: str | os.PathLike[str] | None = None,
    plan_only: bool = False,
) -> Job:
    """Checks all arguments of the main job against each other, the checkpoint, the data and the launcher.

    Args:
        world_size: Processes that run the job, or will; None where that is not known.
        launcher: What starts them, for a fix to name: "torchrun", "srun", "nemo-ptq run", "run.executor=torchrun",
            "run.executor=slurm"; None for something else.
        nemo_checkpoint: See :func:`nemo_ptq.task.ptq`, for this and all others.
        export_config: What to write.
        calibration_tp: Tensor parallelism during calibration.
        calibration_pp: Pipeline parallelism during calibration.
        calibration_ep: Expert parallelism during calibration.
        num_layers_in_first_pipeline_stage: Layers of the first stage.
        num_layers_in_last_pipeline_stage: Layers of the last stage.
        devices: Processes on each node, as the user sees it.
        num_nodes: Nodes, as the user sees it.
        quantization_config: How to quantize.
        forward_loop: The user's calibration loop.
        tokenizer_path: Another tokenizer.
        calibration_state: A calibration to export again from.
        legacy_ckpt: Whether the checkpoint may come from another Transformer Engine.
        tracking: Where the figures go.
        model_path: Another name for `nemo_checkpoint`.
        plan_only: Whether the job is only planned, which is for the caller to do: see :mod:`nemo_ptq.plan`.

    Returns:
        The job to run.

    Raises:
        ConfigError: With every problem.
    """
    task = {
        "nemo_checkpoint": nemo_checkpoint,
        "model_path": model_path,
        "calibration_tp": calibration_tp,
        "calibration_pp": calibration_pp,
        "calibration_ep": calibration_ep,
        "num_layers_in_first_pipeline_stage": num_layers_in_first_pipeline_stage,
        "num_layers_in_last_pipeline_stage": num_layers_in_last_pipeline_stage,
        "devices": devices,
        "num_nodes": num_nodes,
        "forward_loop": forward_loop,
        "tokenizer_path": tokenizer_path,
        "calibration_state": calibration_state,
        "legacy_ckpt": legacy_ckpt,
        "tracking": tracking,
        "plan_only": plan_only,
    }
    gathered = gather(task, quantization_config, export_config, world_size, launcher)
    problems = [*gathered.problems, *(problem for _, problem in findings(gathered.values) if problem)]
    if problems:
        raise ConfigError(problems)

    model: CheckpointMetadata = gathered.values["model"]
    assert export_config is not None
    return Job(
        checkpoint=Path(gathered.values["checkpoint"]).expanduser().absolute(),
        metadata=model,
        output=Path(export_config.path).expanduser().absolute(),
        quantization=gathered.quantization,
        export=export_config,
        decoder=with_derived(gathered.values)["decoder"],
        calibration_tp=calibration_tp,
        calibration_pp=calibration_pp,
        calibration_ep=calibration_ep,
        num_layers_in_first_pipeline_stage=num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=num_layers_in_last_pipeline_stage,
        forward_loop=forward_loop,
        tokenizer_path=tokenizer_path,
        calibration_state=gathered.state,
        legacy_ckpt=legacy_ckpt,
        tracking=tracking and absolute_address(tracking),
    )
