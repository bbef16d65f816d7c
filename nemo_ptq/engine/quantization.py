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
    """How this rank's layers are quantized, as far as it is known before the walk.

    Attributes:
        schemes: Of each quantized linear layer.
        caches: Core attention modules whose KV cache is quantized.
        given: The calibration state's entries, where there is one already; None where the walk calibrates.
        saved: The state that is written with the export, where there is one already.
        weight_amaxes: Those that do not follow from the weights.
        is_smoothed: Whether the checkpoint's weights are divided by the pre-quantization scales already.
        expert_tokens: Calibration tokens by (layer, expert), where they are known already.
        fixed_by: The algorithm that has computed weight amaxes from data, if one has.
        is_resumable: Whether a walk with it can be continued in another process.
        is_new: Whether its calibration state is put together by the walk.
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
    """How one of our own algorithms quantizes a model; where there is a calibration state, as that says.

    Args:
        job: What was asked for.
        model: This rank's part of the model.
        choice: Name of the algorithm of each linear layer, where one was chosen for each; otherwise empty.
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
    """Has ModelOpt calibrate what the block pipeline does not; every rank calls it.

    Args:
        job: What was asked for.
        samples: Its text.
        device: Where this rank computes.
        directories: Where to write each of the formats that hold the whole model with its quantizers.
        reporter: Follows it.

    Returns:
        None where the block pipeline calibrates.
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
