# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Calibration by ModelOpt: configurations of the user's own, the user's own loop, and checkpoints with quantizers.

ModelOpt calibrates the whole model at once. What it has found becomes a record that the block pipeline walks with.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nemo_ptq.calibration.observing import TokenCounts
from nemo_ptq.checkpoint.loading import LoadedModel, load_model
from nemo_ptq.checkpoint.metadata import read_metadata
from nemo_ptq.errors import PtqError
from nemo_ptq.export.calibrated import WeightAmaxes
from nemo_ptq.export.formats import FORMATS, schemes_problem
from nemo_ptq.job import Job
from nemo_ptq.modelopt.experts import with_idle_experts_covered
from nemo_ptq.modelopt.megatron_layers import global_modules, linear_of
from nemo_ptq.modelopt.quantizers import as_json, calibrate, modelopt_config
from nemo_ptq.modelopt.restore import restore_quantizers
from nemo_ptq.modelopt.transfer import apply_state, fingerprint, gather_state
from nemo_ptq.quantization.schemes import UNQUANTIZED, Scheme
from nemo_ptq.quantization.state import CalibrationState, load_state
from nemo_ptq.quantization.state_header import StateHeader
from nemo_ptq.versions import producer


@dataclass(frozen=True)
class Calibrated:
    """Result of a calibration by ModelOpt.

    Attributes:
        entries: The calibration state's entries, of the whole model.
        saved: The state that later exports can be made from, if there is one.
        schemes: Scheme of this rank's quantized linear layers.
        weight_amaxes: Weight amaxes of this rank's quantized linear layers.
        is_smoothed: Whether the checkpoint's weights are already divided by the pre-quantization scales.
        expert_tokens: Calibration tokens by (layer, expert), over all ranks.
        fixed_by: The algorithm that has computed weight amaxes from data, if one has.
    """

    entries: Mapping[str, torch.Tensor]
    saved: CalibrationState | None
    schemes: dict[str, Scheme]
    weight_amaxes: dict[str, WeightAmaxes]
    is_smoothed: bool = False
    expert_tokens: TokenCounts = field(default_factory=TokenCounts)
    fixed_by: str | None = None


def calibrate_with_modelopt(
    job: Job,
    device: torch.device,
    loop: Callable[[LoadedModel], Callable[[Any], Any]],
    directories: Mapping[str, Path],
) -> Calibrated:
    """Calibrates a job's whole model; every rank calls it.

    Args:
        job: The job.
        device: This rank's device.
        loop: Returns the loop that runs the calibration data through Megatron's model.
        directories: Directory of each format that holds the whole model with its quantizers.

    Raises:
        PtqError: If the configuration quantizes a layer as no export can hold it.
    """
    model = load_model(job.checkpoint, device, **job.loading_options)
    if job.metadata.is_quantized:
        restore_quantizers(model.module, job.checkpoint)
        found = _of_quantized(model, job)
    else:
        found = _of_unquantized(model, job, loop)
    for name, directory in directories.items():
        FORMATS[name].write_model(model, job, directory)
    return found


def _of_unquantized(model: LoadedModel, job: Job, loop: Callable[[LoadedModel], Callable[[Any], Any]]) -> Calibrated:
    if job.calibration_state is not None:
        state = load_state(job.calibration_state)
        apply_state(model.module, state, job.unquantized)
        return Calibrated(state.tensors, state, *_as_quantized(model))
    counts: TokenCounts = TokenCounts()
    header = StateHeader(
        checkpoint=str(model.checkpoint),
        weights=fingerprint(model.module),
        model=read_metadata(model.checkpoint).identity,
        decoder=job.decoder,
        quantization=job.quantization,
        modelopt_config=as_json(modelopt_config(job.quantization, job.decoder, job.metadata)),
        producer=producer(),
        adapter=None if job.adapter is None else str(job.adapter),
    )
    run = job.forward_loop or loop(model)
    if model.config.num_moe_experts:
        run = with_idle_experts_covered(run, counts.update)
    check = partial(_check_formats, job)
    calibrate(model.module, job.quantization, job.decoder, run, job.unquantized, check, job.metadata)
    state = gather_state(model.module, header)
    fixed_by = None if header.is_repeatable else str(header.method)
    return Calibrated(state.tensors, state, *_as_quantized(model), expert_tokens=counts, fixed_by=fixed_by)


def _check_formats(job: Job, schemes: Collection[str]) -> None:
    """Refuses a configuration that a format cannot hold, while nothing is lost yet."""
    if problem := schemes_problem(schemes, job.export.formats):
        raise PtqError(f"quantization_config.algorithm={job.quantization.algorithm} {problem}")


def _of_quantized(model: LoadedModel, job: Job) -> Calibrated:
    header = StateHeader(
        str(model.checkpoint), "", job.metadata.identity, job.decoder, job.quantization, {}, producer()
    )
    entries = gather_state(model.module, header).tensors
    saved = None if job.calibration_state is None else load_state(job.calibration_state)
    return Calibrated(entries, saved, *_as_quantized(model), is_smoothed=True)


def _as_quantized(model: LoadedModel) -> tuple[dict[str, Scheme], dict[str, WeightAmaxes]]:
    linears = {name: linear_of(module) for name, module in global_modules(model.module).items() if ".linear_" in name}
    quantized = {name: linear for name, linear in linears.items() if linear.scheme != UNQUANTIZED}
    amaxes: dict[str, WeightAmaxes] = {}
    for name, linear in quantized.items():
        if linear.weight_amax is None:
            raise PtqError(f"ModelOpt's configuration leaves {name} without weight scales: enable its calibration")
        amaxes[name] = (
            linear.weight_amax.clone(),
            None if linear.weight_amax_2 is None else linear.weight_amax_2.clone(),
        )
    return {name: linear.scheme for name, linear in quantized.items()}, amaxes
