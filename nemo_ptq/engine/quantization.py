# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""How a job's layers are quantized: by one of our algorithms, by a calibration state, or by ModelOpt."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nemo_ptq.calibration.batches import JobSamples, data_loop
from nemo_ptq.calibration.observing import State, TokenCounts
from nemo_ptq.checkpoint.loading import LoadedModel
from nemo_ptq.checkpoint.parts import is_linear
from nemo_ptq.config import NO_QUANT
from nemo_ptq.console.reporter import Reporter
from nemo_ptq.export.calibrated import WeightAmaxes, layer_schemes
from nemo_ptq.job import Job
from nemo_ptq.quantization.algorithms import algorithm_of
from nemo_ptq.quantization.schemes import Scheme
from nemo_ptq.quantization.state import CalibrationState, load_state


@dataclass(frozen=True)
class Quantization:
    """How this rank's layers are quantized, as far as known before the walk.

    Attributes:
        schemes: Scheme of each quantized linear layer.
        caches: Core attention modules whose KV cache is quantized.
        given: Entries of an existing calibration state; None if the walk calibrates.
        saved: An existing state, to be written with the export.
        weight_amaxes: Weight amaxes that do not follow from the weights.
        is_smoothed: Whether the checkpoint's weights are already divided by the pre-quantization scales.
        expert_tokens: Calibration tokens by (layer, expert), if already known.
        fixed_by: The algorithm that computed weight amaxes from data, if any.
        is_resumable: Whether another process can continue the walk.
        is_new: Whether the walk makes the calibration state.
    """

    schemes: Mapping[str, Scheme]
    caches: Iterable[str] = ()
    given: State | None = None
    saved: CalibrationState | None = None
    weight_amaxes: Mapping[str, WeightAmaxes] = field(default_factory=dict)
    is_smoothed: bool = False
    expert_tokens: TokenCounts = field(default_factory=Counter)
    fixed_by: str | None = None
    is_resumable: bool = True
    is_new: bool = False


def by_algorithm(job: Job, model: LoadedModel, choice: Mapping[str, str]) -> Quantization:
    """How one of our algorithms, or an existing calibration state, quantizes a model.

    Args:
        job: The job.
        model: This rank's part of the model.
        choice: Name of the algorithm chosen for each linear layer; empty if all have the same.
    """
    if job.quantization.algorithm_name == NO_QUANT:
        return Quantization({}, given={})
    names = [name for block in model.blocks for name in block.modules]
    linears = [name for name in names if is_linear(name) and name not in job.unquantized]
    schemes = layer_schemes(job.quantization, choice, linears)
    if job.calibration_state is not None:
        saved = load_state(job.calibration_state)
        return Quantization(schemes, _caches_in(saved.tensors), saved.tensors, saved)
    caches = [name for name in names if name.endswith("core_attention")] if job.quantizes_kv_cache else []
    given: State | None = None if algorithm_of(job.quantization).needs_data else {}
    return Quantization(schemes, caches, given, is_new=True)


def by_modelopt(
    job: Job, samples: JobSamples, device: torch.device, directories: Mapping[str, Path], reporter: Reporter
) -> Quantization | None:
    """Calibrates with ModelOpt what the block pipeline cannot; every rank calls it.

    Args:
        job: The job.
        samples: The job's text.
        device: This rank's device.
        directories: Directory of each format that holds the whole model with its quantizers.
        reporter: Shows progress.

    Returns:
        None if the block pipeline calibrates.
    """
    if not (job.metadata.is_quantized or job.forward_loop is not None or job.is_custom):
        return None
    from nemo_ptq.modelopt.whole_model import calibrate_with_modelopt

    with reporter.step("calibrate with ModelOpt"):
        found = calibrate_with_modelopt(
            job,
            device,
            lambda model: data_loop(model, job.quantization, samples.calibration, reporter),
            directories,
        )
    return Quantization(
        found.schemes,
        _caches_in(found.entries),
        found.entries,
        found.saved,
        found.weight_amaxes,
        found.is_smoothed,
        found.expert_tokens,
        found.fixed_by,
        is_resumable=False,
    )


def _caches_in(entries: Iterable[str]) -> list[str]:
    """Names of the core attention modules whose KV cache a calibration state quantizes."""
    return [name.partition(".k_bmm_quantizer")[0] for name in entries if ".k_bmm_quantizer" in name]
