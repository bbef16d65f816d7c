# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Another export from a saved calibration, straight from the checkpoint's files.

One process goes through the layers: each is read, quantized as the calibration says, packed and written, so there is
never more than one in memory. Neither Megatron nor NeMo nor ModelOpt is imported. The bytes are those of the engine,
which does what is not possible here.
"""

from dataclasses import replace
from functools import cached_property, partial
from typing import Any

from nemo_ptq.checkpoint.metadata import is_hugging_face
from nemo_ptq.checkpoint.parts import WeightsSize
from nemo_ptq.checkpoint.settings import Context, read_context
from nemo_ptq.checkpoint.staging import discard, prepare, staging_path
from nemo_ptq.checkpoint.torch_dist import checkpoint_parts
from nemo_ptq.config import ALGORITHMS
from nemo_ptq.console.reporter import Reporter
from nemo_ptq.engine.finish import finish
from nemo_ptq.export.manifest_writer import sha256_of
from nemo_ptq.export.source import Source
from nemo_ptq.export.stored import StoredLayers
from nemo_ptq.export.writers import ADAPTERS, CHECKS, WRITERS
from nemo_ptq.job import Job
from nemo_ptq.models.registry import family_of
from nemo_ptq.models.spec import shape_of
from nemo_ptq.quantization.state import CalibrationState, check_fits, load_state, save_state
from nemo_ptq.quantization.state_header import IN_EXPORT
from nemo_ptq.report.compose import Observations
from nemo_ptq.report.observe import FROM_A_FILE, report_of
from nemo_ptq.report.weight_errors import measure_weights


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
        and job.quantization.algorithm_name in ALGORITHMS
        and "nemo" not in job.export.formats
        and not job.metadata.is_quantized
        and not job.legacy_ckpt
        and job.tokenizer_path is None
        and not job.export.generate_sample
        and not is_hugging_face(job.checkpoint)
        and read_context(job.checkpoint).is_known
    )


def run_reexport(job: Job) -> None:
    """Runs a job that :func:`is_possible`.

    Raises:
        PtqError: If the calibration is of other weights, a format cannot hold the model, or what was written does not
            verify.
    """
    assert job.calibration_state is not None
    reporter = Reporter(True)
    with reporter.step("load"):
        calibration = load_state(job.calibration_state)
        source, size = _open(job, calibration, reporter)
        for name in job.export.formats:
            CHECKS[name](source.shape, source.family, source.tokenizer)
    with reporter.step("measure"):
        missing = {"quality": FROM_A_FILE, "activations": FROM_A_FILE}
        observations = Observations(measure_weights(source.layers, source.shard_map), missing=missing)
    directories = job.directories(staging_path(job.output))
    try:
        with reporter.step("export"):
            prepare(job.output)
            digests = {}
            for name, path in directories.items():
                path.mkdir(exist_ok=True)
                files = WRITERS[name](_adapted(name, source), path)
                digests[name] = {file.relative_to(path).as_posix(): sha256_of(file) for file in files}
                save_state(path / IN_EXPORT, calibration)
        with reporter.step("verify"):
            finish(job, digests, partial(report_of, size, job, observations, reporter.steps), reporter)
    finally:
        discard(job.output)
    reporter.say(f"{job.output} is ready")


def _open(job: Job, calibration: CalibrationState, reporter: Reporter) -> tuple[Source, WeightsSize]:
    context, parts = read_context(job.checkpoint), checkpoint_parts(job.checkpoint)
    if any(name != "trtllm" for name in job.export.formats):
        # Only a Hugging Face directory has one, and only transformers can read it.
        context.config.generation_config = context.load_generation_config()
    by_name = {part.live_name: part for part in parts}
    layers = StoredLayers(by_name, calibration, context.config.layernorm_zero_centered_gamma)
    check_fits(calibration, layers.fingerprint())
    source = Source(
        layers=layers,
        rank=0,
        tensor_rank=0,
        tensor_ranks=1,
        shard_map=layers.shard_map,
        shape=shape_of(context.config, job.metadata.vocab_size),
        family=family_of(context.config_class, job.export.decoder_type),
        config=context.config,
        has_vocab_size=context.has_vocab_size,
        tokenizer=_Tokenizer(context),
        tokenizer_is_replaced=False,
        calibration=calibration,
        checkpoint=job.checkpoint,
        settings=job.export,
        reporter=reporter,
    )
    return source, WeightsSize.of((part.shape, part.dtype) for part in parts)


def _adapted(name: str, source: Source) -> Source:
    """The model as a format can hold it."""
    if name not in ADAPTERS:
        return source
    assert source.calibration is not None and isinstance(source.layers, StoredLayers)
    state = ADAPTERS[name](source.calibration, source.shape)
    return replace(source, calibration=state, layers=replace(source.layers, state=state))
