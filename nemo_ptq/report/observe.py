# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What a running job tells its report: what was measured, why something was not, what was written and what it took."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from nemo_ptq.checkpoint.parts import WeightsSize
from nemo_ptq.config import NO_QUANT
from nemo_ptq.console.stopwatch import Step, slowest
from nemo_ptq.export.manifest_writer import file_entries
from nemo_ptq.home import without_home
from nemo_ptq.job import Job
from nemo_ptq.parallel.environment import read_launch
from nemo_ptq.report.compose import Observations, Sizes, compose, quality_of
from nemo_ptq.report.records import Report
from nemo_ptq.report.serving import serving_of
from nemo_ptq.versions import producer

if TYPE_CHECKING:  # they import Megatron, which an export from a saved calibration does without
    from nemo_ptq.calibration.batches import JobSamples
    from nemo_ptq.modelopt.experts import TokenCounts
    from nemo_ptq.report.measure import Measured

# Directories of an export that hold no weights.
_BESIDE_WEIGHTS = ("ptq/", "nemo_context/", "context/")


FROM_A_FILE = "the calibration came from a file (calibration_state), and no text was read"
"""Why an export from a saved calibration is not compared with the unquantized model."""


def observe(job: Job, samples: "JobSamples", measured: "Measured", expert_tokens: "TokenCounts") -> Observations:
    """Says what was measured, and of what was not, why.

    Args:
        job: The job.
        samples: The text of the job.
        measured: What was measured on the evaluation's part of it.
        expert_tokens: Calibration tokens by (layer, expert).
    """
    if not measured.scores:
        reason = _why_not_compared(job, samples)
        missing = {"quality": reason, "activations": reason}
        return Observations(measured.layers, None, missing, expert_tokens)
    text = without_home(job.quantization.calibration_dataset)
    quality = quality_of(measured.scores, "job", text, samples.held_out)
    return Observations(measured.layers, quality, {}, expert_tokens)


def _why_not_compared(job: Job, samples: "JobSamples") -> str:
    if job.quantization.algorithm_name == NO_QUANT:
        return "nothing is quantized, so nothing is lost"
    if job.metadata.is_quantized:
        return "the checkpoint was quantized already, and no text was read"
    if job.forward_loop is not None:
        return "the calibration loop is your own (forward_loop), and gives the report no text to compare on"
    if job.calibration_state is not None:
        return FROM_A_FILE
    if not job.quantization.evaluation_dataset_size:
        return "turned off: quantization_config.evaluation_dataset_size=0"
    dataset = without_home(job.quantization.calibration_dataset)
    if not samples.evaluation and not samples.calibration:
        return f"{dataset} could not be read, or is empty"
    return f"{dataset} holds no sample of two tokens or more"


def gather_steps(mine: list[Step]) -> list[Step]:
    """The job's steps so far, each as the slowest rank and the one with the largest peak had it; all ranks call it."""
    everyones = [mine] * dist.get_world_size()
    dist.all_gather_object(everyones, mine)
    return slowest(everyones)


def report_of(
    size: WeightsSize,
    job: Job,
    observations: Observations,
    steps: Sequence[Step],
    format: str,
    directory: Path,
    checksums: Mapping[str, str],
) -> Report:
    """Returns the report of one format's directory, which holds everything else but the manifest.

    Args:
        size: Size of the whole model in the checkpoint.
        job: The job.
        observations: The measurements.
        steps: Time and memory of the steps so far.
        format: The format.
        directory: Directory of its files.
        checksums: Checksums of files that have been read already, by relative path.
    """
    files = file_entries(directory, checksums)
    exported = sum(entry["size"] for name, entry in files.items() if not name.startswith(_BESIDE_WEIGHTS))
    sizes = Sizes(size.parameters, size.num_bytes, exported)
    servers = serving_of(job, format)
    return compose(job, observations, sizes, steps, producer(), files, read_launch().world_size, servers)
