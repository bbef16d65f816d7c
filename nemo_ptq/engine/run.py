# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The main job on one rank: load, calibrate, export, verify. What was planned is in the :class:`~nemo_ptq.job.Job`."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nemo_ptq.calibration.batches import data_loop, read_job_samples
from nemo_ptq.calibration.experts import TokenCounts, with_idle_experts_covered
from nemo_ptq.checkpoint.loading import LoadedModel, load_model
from nemo_ptq.checkpoint.metadata import read_metadata
from nemo_ptq.checkpoint.staging import discard, prepare, staging_path
from nemo_ptq.config import NO_QUANT, QuantizationConfig
from nemo_ptq.console.quiet import quiet_libraries
from nemo_ptq.console.reporter import Reporter
from nemo_ptq.engine.evaluation import sample
from nemo_ptq.engine.finish import finish
from nemo_ptq.errors import PtqError
from nemo_ptq.export.manifest_writer import sha256_of
from nemo_ptq.export.megatron import source_of
from nemo_ptq.export.source import Source
from nemo_ptq.export.writers import ADAPTERS, CHECKS, WRITERS
from nemo_ptq.job import Job
from nemo_ptq.models.registry import family_of
from nemo_ptq.models.spec import shape_of
from nemo_ptq.parallel.environment import read_launch
from nemo_ptq.parallel.process_groups import pick_device, process_groups
from nemo_ptq.quantization.modelopt import as_json, modelopt_config
from nemo_ptq.quantization.modelopt import calibrate as calibrate_module
from nemo_ptq.quantization.state import CalibrationState, check_fits, load_state, save_state
from nemo_ptq.quantization.state_header import IN_EXPORT, StateHeader
from nemo_ptq.quantization.transfer import apply_state, fingerprint, gather_state
from nemo_ptq.report.compose import Observations, describe
from nemo_ptq.report.measure import baseline_logits, evaluation_batches, measure
from nemo_ptq.report.observe import gather_steps, observe, report_of
from nemo_ptq.versions import producer


def run_job(job: Job) -> None:
    """Runs a job on this rank; all ranks of the job call it.

    Raises:
        PtqError: If the data or the calibrated model do not allow the export, or what was written does not verify.
    """
    quiet_libraries()
    launch = read_launch()
    reporter = Reporter(launch.is_first)
    device = pick_device(launch)
    with process_groups(
        launch,
        device,
        tensor_parallel=job.calibration_tp,
        pipeline_parallel=job.calibration_pp,
        expert_parallel=job.calibration_ep,
    ):
        # Before the model: data that is not to be had is better known in seconds.
        samples = read_job_samples(job, reporter)
        with reporter.step("load"):
            model = load(job, device)
            check_exportable(model, job)
        texts = evaluation_batches(model, samples.evaluation)
        baseline: list[torch.Tensor | None] = []
        if texts:
            with reporter.step("baseline"):
                baseline = baseline_logits(model, texts)
        expert_tokens: TokenCounts = Counter()
        if job.metadata.is_quantized:
            model.calibration = None if job.calibration_state is None else load_state(job.calibration_state)
        elif job.calibration_state is not None:
            with reporter.step("apply calibration"):
                apply_calibration(model, job.calibration_state)
        else:
            with reporter.step("calibrate"):
                loop = job.forward_loop or data_loop(model, job.quantization, samples.calibration, reporter)
                expert_tokens = calibrate(model, job.quantization, job.decoder, loop, reporter)
        with calibration_kept(model, job, reporter):
            with reporter.step("measure"):
                measured = measure(model, texts, baseline)
            observations = observe(job, samples, measured, expert_tokens)
            if observations.quality is not None:
                reporter.say(describe(observations.quality))
            if job.export.generate_sample:
                reporter.say(f"sample after quantization: {sample(model)}")
            export(model, job, reporter, observations)
    reporter.say(f"{job.output} is ready")


def load(job: Job, device: torch.device) -> LoadedModel:
    """Loads this rank's part of the job's model."""
    return load_model(
        job.checkpoint,
        device,
        tokenizer_path=job.tokenizer_path,
        num_layers_in_first_pipeline_stage=job.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=job.num_layers_in_last_pipeline_stage,
        legacy_ckpt=job.legacy_ckpt,
    )


def check_exportable(model: LoadedModel, job: Job) -> None:
    """Refuses a model that the readers of a format would load wrongly, before it is calibrated.

    Raises:
        PtqError: If there is such a format among those asked for.
    """
    shape = shape_of(model.config, model.vocab_size)
    family = family_of(type(model.config).__name__, job.export.decoder_type)
    for name in job.export.formats:
        CHECKS[name](shape, family, model.tokenizer)


def calibrate(
    model: LoadedModel,
    quantization: QuantizationConfig,
    decoder: str,
    forward_loop: Callable[[Any], Any],
    reporter: Reporter,
) -> TokenCounts:
    """Calibrates a model in place; what it learns is the model's ``calibration`` afterwards.

    Args:
        model: This rank's part of the model.
        quantization: How to quantize.
        decoder: TensorRT-LLM's decoder type.
        forward_loop: Called with Megatron's model, it runs it on data.
        reporter: Hears of experts that saw no data.

    Returns:
        How many tokens each expert saw; empty for dense models.
    """
    counts: TokenCounts = Counter()
    if quantization.algorithm_name == NO_QUANT:
        return counts
    header = StateHeader(
        checkpoint=str(model.checkpoint),
        weights=fingerprint(model.module),
        model=asdict(read_metadata(model.checkpoint)),
        decoder=decoder,
        quantization=quantization,
        modelopt_config=as_json(modelopt_config(quantization, decoder)),
        producer=producer(),
    )
    if model.config.num_moe_experts:
        forward_loop = with_idle_experts_covered(forward_loop, counts.update)
    calibrate_module(model.module, quantization, decoder, forward_loop)
    model.calibration = gather_state(model.module, header)
    _warn_of_idle_experts(counts, reporter)
    return counts


def apply_calibration(model: LoadedModel, path: Path) -> None:
    """Quantizes a model as a saved calibration did.

    Args:
        model: This rank's part of the model, unquantized.
        path: The calibration state.

    Raises:
        PtqError: If it is of other weights.
    """
    state = load_state(path)
    check_fits(state, fingerprint(model.module))
    apply_state(model.module, state)
    model.calibration = state


@contextmanager
def calibration_kept(model: LoadedModel, job: Job, reporter: Reporter) -> Iterator[None]:
    """Keeps a fresh calibration in a file beside the output until the ``with`` block ends without an error.

    The file is named ``OUT.calibration.safetensors``. A process that is killed leaves it as well.
    """
    if dist.get_rank() > 0 or model.calibration is None or job.calibration_state is not None:
        yield
        return
    kept = job.output.with_name(f"{job.output.name}.calibration.safetensors")
    try:
        save_state(kept, model.calibration)
    except OSError as error:
        reporter.warn(f"the calibration cannot be kept in {kept}: {error.strerror}")
    try:
        yield
    except BaseException:
        if kept.exists():
            reporter.warn(
                f"the calibration is kept in {kept}: `nemo-ptq export {kept} {job.output}` exports it without "
                f"calibrating again, and so does calibration_state={kept} on several ranks"
            )
        raise
    kept.unlink(missing_ok=True)


def _warn_of_idle_experts(counts: TokenCounts, reporter: Reporter) -> None:
    idle = sum(tokens == 0 for tokens in counts.values())
    if idle:
        reporter.warn(
            f"{idle} of {len(counts)} experts saw no token during calibration: their activation ranges are those of "
            "the other experts of their layer; give more samples, or more varied ones"
        )


def export(model: LoadedModel, job: Job, reporter: Reporter, observations: Observations | None = None) -> None:
    """Writes the job's output directory, which appears when it is complete and has passed its verification.

    Args:
        model: This rank's part of the model, calibrated.
        job: What to export, and where.
        reporter: Follows the steps.
        observations: What was measured of the model, for the report; of rank 0.

    Raises:
        PtqError: If the model cannot be told in a format, or what was written does not verify.
    """
    is_first = dist.get_rank() == 0
    staging = staging_path(job.output)
    try:
        with reporter.step("export"):
            if is_first:
                prepare(job.output)
            digests = {
                name: _write(name, source_of(adapted(name, model, job), job, reporter), model.calibration, path)
                for name, path in job.directories(staging).items()
            }
        steps = gather_steps(reporter.steps)
        with reporter.step("verify"):
            if is_first:
                report = partial(report_of, model.size, job, observations or Observations(), steps)
                finish(job, digests, report, reporter)
            dist.barrier()
    finally:
        if is_first:
            discard(job.output)


def adapted(name: str, model: LoadedModel, job: Job) -> LoadedModel:
    """Returns the model as a format can hold it: loaded and quantized again where that takes another calibration.

    Args:
        name: The format.
        model: This rank's part of the model, calibrated.
        job: The job that it is of.

    Raises:
        PtqError: If the calibration ranged the weights on data, which is not repeated.
    """
    if model.calibration is None or name not in ADAPTERS:
        return model
    state = ADAPTERS[name](model.calibration, shape_of(model.config, model.vocab_size))
    if all(torch.equal(value, model.calibration.tensors[key]) for key, value in state.tensors.items()):
        return model
    if not state.header.is_repeatable:
        raise PtqError(
            f"export_format={name} needs other pre-quantization scales than {state.header.method} has found, and that "
            "algorithm ranges weights on data: use another export_format or algorithm"
        )
    again = load(job, next(model.module.parameters()).device)
    apply_state(again.module, state)
    again.calibration = state
    return again


def _write(name: str, source: Source, calibration: CalibrationState | None, directory: Path) -> dict[str, str]:
    """Writes one format's files; returns the checksums of those that the ranks have read already, by relative path."""
    if dist.get_rank() == 0:
        directory.mkdir(exist_ok=True)
    dist.barrier()
    mine = {file.relative_to(directory).as_posix(): sha256_of(file) for file in WRITERS[name](source, directory)}
    everyones: list[dict[str, str]] = [mine] * dist.get_world_size()
    dist.all_gather_object(everyones, mine)
    if dist.get_rank() == 0 and calibration is not None:
        save_state(directory / IN_EXPORT, calibration)
    return {file: digest for digests in everyones for file, digest in digests.items()}
