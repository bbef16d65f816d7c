# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Another export from a saved calibration, straight from the checkpoint's files.

One process goes through the layers: each is read, quantized as the calibration says, packed and written, so there is
never more than one in memory. Neither Megatron nor NeMo nor ModelOpt is imported. The bytes are those of the engine,
which does what is not possible here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from nemo_ptq.checkpoint.adapters.merging import merged_parts
from nemo_ptq.checkpoint.adapters.nemo_adapter import read_nemo_adapter
from nemo_ptq.checkpoint.metadata import is_nemo
from nemo_ptq.checkpoint.parts import TensorPart, WeightsSize, is_linear
from nemo_ptq.checkpoint.settings import Context, read_context
from nemo_ptq.checkpoint.staging import Staging
from nemo_ptq.checkpoint.torch_dist import checkpoint_parts
from nemo_ptq.console.interrupts import tidying_up
from nemo_ptq.console.reporter import Reporter
from nemo_ptq.engine.finish import finish, say_conclusion
from nemo_ptq.engine.reservation import reserve
from nemo_ptq.export.calibrated import CalibratedLayers, layer_schemes
from nemo_ptq.export.exports import Exports
from nemo_ptq.export.formats import FORMATS
from nemo_ptq.export.manifest_writer import checksums_of
from nemo_ptq.export.rounded_weights import RoundedWeights, check_unchanged, place_in_all
from nemo_ptq.export.shard_map import on_one_rank
from nemo_ptq.export.source import Source
from nemo_ptq.job import Job
from nemo_ptq.models.registry import family_of
from nemo_ptq.parallel.ranks import ALONE
from nemo_ptq.quantization.algorithms import SELECTABLE, amax_floor
from nemo_ptq.quantization.state import (
    CalibrationState,
    check_fits,
    fingerprint_of,
    is_fingerprinted,
    load_state,
    of_block,
    save_state,
    sum_of_bits,
)
from nemo_ptq.quantization.state_header import IN_EXPORT, weights_file
from nemo_ptq.report.compose import Observations
from nemo_ptq.report.observe import FROM_A_FILE, report_of
from nemo_ptq.report.records import Report
from nemo_ptq.report.serving import server_warnings
from nemo_ptq.report.weight_errors import measure_weights

# The data type in which a checkpoint is loaded to be calibrated.
_LOADED = torch.bfloat16


class _Tokenizer:
    """What exports ask of NeMo's tokenizer: the one of Hugging Face's in it, loaded when it is asked for."""

    def __init__(self, context: Context) -> None:
        self._context = context

    @cached_property
    def tokenizer(self) -> Any:
        return self._context.load_tokenizer()


def is_possible(job: Job, world_size: int) -> bool:
    """Whether a job can be done here.

    That is an export from a saved calibration by one of our algorithms, in one process, in a format that is made of
    packed layers, from a NeMo checkpoint with its tokenizer inside.
    """
    return (
        job.calibration_state is not None
        and world_size == 1
        and job.quantization.algorithm_name in SELECTABLE
        and all(FORMATS[name].is_packed for name in job.export.formats)
        and not job.metadata.is_quantized
        and not job.legacy_ckpt
        and job.tokenizer_path is None
        and not job.export.generate_sample
        and is_nemo(job.checkpoint)
        and read_context(job.checkpoint).is_known
    )


def run_reexport(job: Job) -> None:
    """Runs a job that :func:`is_possible`.

    Raises:
        PtqError: If the calibration is of other weights, a format cannot hold the model, or what was written does not
            verify.
    """
    reporter = Reporter(True)
    for line in server_warnings(job):
        reporter.warn(line)
    with tidying_up(), reserve(job, reporter) as staging:
        report = _reexport(job, job.directories(staging.files), staging, reporter)
    say_conclusion(job, report, reporter)


def _reexport(job: Job, directories: Mapping[str, Path], staging: Staging, reporter: Reporter) -> Report:
    assert job.calibration_state is not None
    with reporter.step("load"):
        calibration = load_state(job.calibration_state)
        context, parts = read_context(job.checkpoint), _parts(job)
        source = _open(job, calibration, context, parts)
        for name in job.export.formats:
            FORMATS[name].check_model(source.shape, source.family, source.tokenizer)
        check_fits(calibration, _fingerprint(parts))
    with reporter.step("measure"):
        missing = {"quality": FROM_A_FILE, "activations": FROM_A_FILE}
        observations = Observations(measure_weights(source.layers, source.shard_map), missing=missing)
    size = WeightsSize.of((part.shape, part.dtype) for part in parts)
    with reporter.step("export"):
        for path in directories.values():
            path.mkdir(exist_ok=True)
        checksums = _export(job, source, calibration, directories, reporter)
    with reporter.step("verify"):
        report = partial(report_of, size, job, observations, reporter.steps)
        return finish(job, staging, checksums, report, reporter)


def _parts(job: Job) -> Sequence[TensorPart]:
    parts = checkpoint_parts(job.checkpoint)
    return parts if job.adapter is None else merged_parts(parts, read_nemo_adapter(job.adapter))


def _open(job: Job, calibration: CalibrationState, context: Context, parts: Sequence[TensorPart]) -> Source:
    if any(FORMATS[name].is_hugging_face for name in job.export.formats):
        # Only a Hugging Face directory has one, and only transformers can read it.
        context.config.generation_config = context.load_generation_config()
    by_name = {part.live_name: part for part in parts}
    modules = {name.rpartition(".")[0] for name in by_name}
    caches = {name.partition(".k_bmm_quantizer")[0] for name in calibration.tensors if ".k_bmm_quantizer" in name}
    linears = [name for name in sorted(modules) if is_linear(name) and name not in job.unquantized]
    schemes = layer_schemes(calibration.header.quantization, calibration.header.choice, linears)
    layers = CalibratedLayers(
        lambda name: by_name[name].read().to(_LOADED) if name in by_name else None,
        dict(calibration.tensors),
        schemes,
        context.config.layernorm_zero_centered_gamma,
    )
    if calibration.header.quantization.is_balanced:
        assert job.calibration_state is not None
        file = weights_file(job.calibration_state)
        check_unchanged(file)
        layers = replace(layers, rounded=RoundedWeights(file, schemes, job.metadata, lambda name: ALONE))
    return Source(
        layers=layers,
        rank=0,
        tensor_rank=0,
        tensor_ranks=1,
        shard_map=on_one_rank(modules | caches, schemes, frozenset(caches)),
        shape=job.metadata,
        family=family_of(context.config_class, job.export.decoder_type),
        config=context.config,
        has_vocab_size=context.has_vocab_size,
        tokenizer=_Tokenizer(context),
        tokenizer_is_replaced=False,
        checkpoint=job.checkpoint,
        settings=job.export,
        cache_format=job.quantization.kv_cache_qformat,
    )


def _fingerprint(parts: Sequence[TensorPart]) -> str:
    weights = {part.live_name.removesuffix(".weight"): part for part in parts if part.live_name.endswith(".weight")}
    fingerprinted = {module: part for module, part in weights.items() if is_fingerprinted(module)}
    return fingerprint_of({module: sum_of_bits(part.read().to(_LOADED)) for module, part in fingerprinted.items()})


def _export(
    job: Job, source: Source, calibration: CalibrationState, directories: Mapping[str, Path], reporter: Reporter
) -> dict[str, dict[str, str]]:
    """Writes the files, and returns the checksums of those with tensors, by format and relative path."""
    header, num_blocks = calibration.header, source.shape.num_layers + 2
    floor = amax_floor(header.quantization, header.decoder)
    with (
        Exports(source, directories, floor) as exports,
        reporter.progress("export", num_blocks, "blocks") as progress,
    ):
        for index in range(num_blocks):
            exports.visit(index, None, of_block(calibration.tensors, index))
            progress.advance(1)
        known = exports.finish()
    exports.write_documents(directories)
    written = exports.files()
    for path in directories.values():
        save_state(path / IN_EXPORT, calibration)
    if header.quantization.is_balanced:
        assert job.calibration_state is not None
        place_in_all(weights_file(job.calibration_state), directories, written)
    return {
        name: {
            file.relative_to(directories[name]).as_posix(): checksum
            for file, checksum in zip(files, checksums_of(files, known), strict=True)
        }
        for name, files in written.items()
    }
