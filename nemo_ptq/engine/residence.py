# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Whether the ranks of a job keep all of their weights in memory: one decision for all of them."""

import torch
import torch.distributed as dist

from nemo_ptq.console.reporter import Reporter
from nemo_ptq.job import Job
from nemo_ptq.parallel.machine_memory import usable_memory
from nemo_ptq.plan.memory import without_data, worst_memory
from nemo_ptq.plan.residence import runs_layerwise, whole_model_needs
from nemo_ptq.plan.sharding import Parallelism


def is_layerwise(job: Job, device: torch.device, reporter: Reporter) -> bool:
    """Decides whether one block of weights is in memory at a time; every rank calls it.

    The user's setting decides. If there is none, the job is layer-wise as soon as one rank lacks the memory for all of
    its weights, and says so.

    Args:
        job: The job.
        device: This rank's device.
        reporter: Told the decision.
    """
    asked = job.quantization.layerwise
    whole = whole_model_needs(
        job.export.generate_sample,
        job.quantization.algorithm,
        job.forward_loop is not None,
        job.metadata.is_quantized,
        job.export.formats,
    )
    needed = _resident_bytes(job, device)
    mine = runs_layerwise(asked, bool(whole), needed, usable_memory(device))
    everyones: list[bool] = [mine] * dist.get_world_size()
    dist.all_gather_object(everyones, mine)
    if asked is None:
        need = f"with all weights in memory a rank needs {needed / 2**30:.1f} GiB"
        reporter.say(
            f"layer-wise: {need}, more than is free, so it holds one block of weights at a time"
            if any(everyones)
            else f"resident: {need}, which fits"
        )
    return any(everyones)


def _resident_bytes(job: Job, device: torch.device) -> int:
    """The peak memory of a rank that keeps all of its weights, as `nemo-ptq plan` counts it, in bytes."""
    reads_text = job.calibration_state is None and not job.metadata.is_quantized
    steps = worst_memory(
        job.metadata,
        job.quantization if reads_text else without_data(job.quantization),
        Parallelism(
            job.calibration_tp,
            job.calibration_pp,
            job.calibration_ep,
            dist.get_world_size(),
            job.num_layers_in_first_pipeline_stage,
            job.num_layers_in_last_pipeline_stage,
        ),
        layerwise=False,
        inference_tp=job.export.inference_tp,
        is_cpu=device.type == "cpu",
    )
    return max(step.device for step in steps)
