# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The job on one rank: a walk through the model's blocks that calibrates, exports and measures, then verification.

What was planned is in the :class:`~nemo_ptq.job.Job`.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from nemo_ptq.calibration.batches import JobSamples, calibration_batches, data_loop, read_job_samples
from nemo_ptq.calibration.fingerprint import Fingerprint
from nemo_ptq.calibration.methods import method_for
from nemo_ptq.calibration.pipeline import BlockVisitor, Learner, State, TokenCounts, walk
from nemo_ptq.calibration.streams import BlockRunner, Stream
from nemo_ptq.checkpoint.blocks import Block, parameters_of
from nemo_ptq.checkpoint.loading import LoadedModel, open_model
from nemo_ptq.checkpoint.parts import is_linear
from nemo_ptq.config import NO_QUANT
from nemo_ptq.console.quiet import quiet_libraries
from nemo_ptq.console.reporter import Reporter
from nemo_ptq.engine.evaluation import sample
from nemo_ptq.engine.finish import finish
from nemo_ptq.export.calibrated import CalibratedLayers, WeightAmaxes, algorithm_scheme
from nemo_ptq.export.exports import Exports
from nemo_ptq.export.formats import FORMATS
from nemo_ptq.export.publish import discard, prepare, sha256_of, staging_path
from nemo_ptq.export.shard_map import gather_shard_map
from nemo_ptq.export.source import Source
from nemo_ptq.job import Job
from nemo_ptq.modelopt.experts import gather_counts
from nemo_ptq.models.registry import family_of
from nemo_ptq.models.spec import shape_of
from nemo_ptq.parallel.environment import read_launch
from nemo_ptq.parallel.memory import fits_in_memory
from nemo_ptq.parallel.process_groups import pick_device, process_groups
from nemo_ptq.quantization.algorithms import amax_floor
from nemo_ptq.quantization.presets import preset_config
from nemo_ptq.quantization.schemes import Scheme
from nemo_ptq.quantization.state import CalibrationState, check_fits, load_state, of_block, save_state
from nemo_ptq.quantization.state_header import IN_EXPORT, StateHeader
from nemo_ptq.report.compose import Observations, describe
from nemo_ptq.report.measure import Measurement, evaluation_batches
from nemo_ptq.report.observe import gather_steps, observe, report_of
from nemo_ptq.report.records import Report
from nemo_ptq.versions import producer

# Steps whose parts take turns block by block.
_WALK = ("load", "calibrate", "export", "measure")


@dataclass(frozen=True)
class _Quantization:
    """How this rank's layers are quantized, as far as it is known before the walk.

    Attributes:
        schemes: Of each quantized linear layer.
        caches: Core attention modules whose KV cache is quantized.
        given: The calibration state's entries, where there is one already; None where the walk calibrates.
        saved: The state that is written with the export, where there is one already.
        weight_amaxes: Those that do not follow from the weights.
        is_smoothed: Whether the checkpoint's weights are divided by the pre-quantization scales already.
        expert_tokens: Calibration tokens by (layer, expert), where they are known already.
    """

    schemes: Mapping[str, Scheme]
    caches: Iterable[str] = ()
    given: State | None = None
    saved: CalibrationState | None = None
    weight_amaxes: Mapping[str, WeightAmaxes] = field(default_factory=dict)
    is_smoothed: bool = False
    expert_tokens: TokenCounts = field(default_factory=Counter)


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
        # Before the model: data that is not available is better known in seconds.
        samples = read_job_samples(job, reporter)
        try:
            _BlockJob(job, samples, device, reporter).run()
        finally:
            if launch.is_first:
                discard(job.output)
    reporter.say(f"{job.output} is ready")


def check_exportable(model: LoadedModel, job: Job) -> None:
    """Refuses a model that the readers of a format would load wrongly, before it is calibrated.

    Raises:
        PtqError: If there is such a format among those asked for.
    """
    shape = shape_of(model.config, model.vocab_size)
    family = family_of(type(model.config).__name__, job.export.decoder_type)
    for name in job.export.formats:
        FORMATS[name].check_model(shape, family, model.tokenizer)


class _Timed:
    """A visitor whose visits are a part of a step."""

    def __init__(self, step: str, visitor: BlockVisitor, reporter: Reporter) -> None:
        self._step, self._visitor, self._reporter = step, visitor, reporter

    def visit(self, index: int, block: Block | None, state: State) -> None:
        """See :meth:`BlockVisitor.visit`."""
        with self._reporter.part(self._step):
            self._visitor.visit(index, block, state)


class _BlockJob:
    """A job while it runs.

    Args:
        job: What was asked for.
        samples: Its text.
        device: Where this rank computes.
        reporter: Follows it.
    """

    def __init__(self, job: Job, samples: JobSamples, device: torch.device, reporter: Reporter) -> None:
        self.job, self.samples, self.device, self.reporter = job, samples, device, reporter
        self.is_first = dist.get_rank() == 0
        self.directories = job.directories(staging_path(job.output))

    def run(self) -> None:
        """Walks through the model, and finishes the directories."""
        if self.is_first:
            prepare(self.job.output)
            for directory in self.directories.values():
                directory.mkdir(exist_ok=True)
        dist.barrier()
        calibrated = self._calibrate_with_modelopt()
        with self.reporter.part("load"):
            model = open_model(self.job.checkpoint, self.device, **self.job.loading_options)
            check_exportable(model, self.job)
        quantization = calibrated or self._quantization(model)
        state, observations, files = self._walk(model, quantization)
        size = model.size
        del model
        if calibrated is None:
            for name in self._unpacked:
                with self.reporter.part("export"):
                    files[name] = self._write_model(name, state)
        self.reporter.say_steps(_WALK)
        if observations.quality is not None:
            self.reporter.say(describe(observations.quality))
        self._finish(files, state, partial(report_of, size, self.job, observations))

    # --- what is quantized, and how -----------------------------------------------------------------------------------

    @property
    def _quantizes(self) -> bool:
        return self.job.quantization.algorithm_name != NO_QUANT

    def _calibrate_with_modelopt(self) -> _Quantization | None:
        """Has ModelOpt calibrate what the block pipeline does not; None where it does."""
        job = self.job
        if not (job.metadata.is_quantized or job.forward_loop is not None or job.is_custom):
            return None
        from nemo_ptq.modelopt.job import calibrate_with_modelopt

        with self.reporter.step("calibrate with ModelOpt"):
            found = calibrate_with_modelopt(
                job,
                self.device,
                lambda model: data_loop(model, job.quantization, self.samples.calibration, self.reporter),
                {name: self.directories[name] for name in self._unpacked},
            )
        return _Quantization(
            found.schemes,
            _caches_in(found.entries),
            found.entries,
            found.saved,
            found.weight_amaxes,
            found.is_smoothed,
            found.expert_tokens,
        )

    def _quantization(self, model: LoadedModel) -> _Quantization:
        """How one of our own algorithms quantizes the model."""
        job = self.job
        if not self._quantizes:
            return _Quantization({}, given={})
        scheme = algorithm_scheme(job.quantization)
        names = [name for block in model.blocks for name in block.modules]
        schemes = {name: scheme for name in names if is_linear(name)}
        if job.calibration_state is not None:
            saved = load_state(job.calibration_state)
            return _Quantization(schemes, _caches_in(saved.tensors), saved.tensors, saved)
        caches = [name for name in names if name.endswith("core_attention")] if job.quantizes_kv_cache else []
        return _Quantization(schemes, caches)

    # --- the walk -----------------------------------------------------------------------------------------------------

    def _walk(
        self, model: LoadedModel, quantization: _Quantization
    ) -> tuple[CalibrationState | None, Observations, dict[str, list[Path]]]:
        """Calibrates, writes and measures; returns the state, the figures, and this rank's files by format."""
        job, parallelism = self.job, model.parallelism
        layerwise = self._is_layerwise(model)
        runner = BlockRunner(model.module, self.device, parallelism, torch.device("cpu") if layerwise else self.device)
        learner = self._learner(model, runner) if quantization.given is None else None
        layers = CalibratedLayers(
            parameters_of(model.blocks),
            {},
            quantization.schemes,
            bool(model.config.layernorm_zero_centered_gamma),
            quantization.is_smoothed,
            parallelism.tensor,
            parallelism.expert_tensor,
            dict(quantization.weight_amaxes),
        )
        shard_map = gather_shard_map(
            [name for block in model.blocks for name in block.modules],
            parallelism.tensor.rank,
            quantization.schemes,
            quantization.caches,
        )
        texts = evaluation_batches(model, self.samples.evaluation)
        reference, quantized = (Stream(texts), Stream(texts)) if texts else (None, None)
        measurement = Measurement(model, runner, layers, reference, quantized, job.export.generate_sample)
        fingerprint = Fingerprint(parallelism.tensor.rank)
        fixed_by = quantization.saved.header.method if quantization.weight_amaxes and quantization.saved else None
        if quantization.saved is not None and quantization.saved.header.is_repeatable:
            fixed_by = None
        source = Source(
            layers=layers,
            rank=dist.get_rank(),
            tensor_rank=parallelism.tensor.rank,
            tensor_ranks=parallelism.tensor.size,
            shard_map=shard_map,
            shape=shape_of(model.config, model.vocab_size),
            family=family_of(type(model.config).__name__, job.export.decoder_type),
            config=model.config,
            has_vocab_size=model.has_vocab_size,
            tokenizer=model.tokenizer,
            tokenizer_is_replaced=job.tokenizer_path is not None,
            checkpoint=job.checkpoint,
            settings=job.export,
        )
        floor = amax_floor(job.quantization, job.decoder)
        with Exports(source, self.directories, floor, fixed_by) as exports:
            found = walk(
                model,
                runner,
                learner,
                [*([learner.stream] if learner else []), *([reference, quantized] if reference and quantized else [])],
                [fingerprint, _Timed("export", exports, self.reporter), _Timed("measure", measurement, self.reporter)],
                drop=layerwise,
                reporter=self.reporter,
                given=None if quantization.given is None else partial(of_block, quantization.given),
            )
        if self.is_first:
            with self.reporter.part("export"):
                exports.write_documents(self.directories)
        state = quantization.saved
        if learner is not None:
            state = self._gather_state(found, fingerprint.whole())
        elif job.calibration_state is not None and not job.metadata.is_quantized:
            assert state is not None
            check_fits(state, fingerprint.whole())
        expert_tokens = gather_counts(learner.counts) if learner is not None else quantization.expert_tokens
        self._warn_of_idle_experts(expert_tokens)
        observations = observe(job, self.samples, measurement.gather(shard_map), expert_tokens)
        if job.export.generate_sample:
            self.reporter.say(f"sample after quantization: {sample(model)}")
        return state, observations, exports.files()

    def _is_layerwise(self, model: LoadedModel) -> bool:
        """Whether one block of weights is in memory at a time: what the user says, else whether all of them fit."""
        wanted = self.job.quantization.layerwise
        if wanted is not None:
            return wanted
        fits = fits_in_memory(model.local_bytes, self.device)
        alike: list[bool] = [fits] * dist.get_world_size()
        dist.all_gather_object(alike, fits)
        if not all(alike):
            self.reporter.say(
                f"layer-wise: {model.local_bytes / 1e9:.1f} GB of weights do not fit into the memory that is free, so "
                "one block of them is in memory at a time"
            )
        return not all(alike)

    def _learner(self, model: LoadedModel, runner: BlockRunner) -> Learner:
        job = self.job
        batches = calibration_batches(model.tokenizer, job.quantization, self.samples.calibration, model.parallelism)
        method = method_for(job.quantization, job.decoder)
        return Learner(runner, model.parallelism, Stream(batches), method, job.quantizes_kv_cache)

    def _gather_state(self, mine: State, weights: str) -> CalibrationState:
        """Puts the ranks' parts of the calibration state together; every rank calls it."""
        job = self.job
        everyones: list[State] = [mine] * dist.get_world_size()
        dist.all_gather_object(everyones, mine)
        header = StateHeader(
            checkpoint=str(job.checkpoint),
            weights=weights,
            model=asdict(job.metadata),
            decoder=job.decoder,
            quantization=job.quantization,
            modelopt_config=preset_config(job.quantization, job.decoder),
            producer=producer(),
        )
        tensors = {name: value for part in everyones for name, value in part.items()}
        return CalibrationState(header, {name: tensors[name].contiguous() for name in sorted(tensors)})

    def _warn_of_idle_experts(self, counts: TokenCounts) -> None:
        idle = sum(tokens == 0 for tokens in counts.values())
        if idle:
            self.reporter.warn(
                f"{idle} of {len(counts)} experts saw no token during calibration: their activation amaxes are those "
                "of the other experts of their layer; give more samples, or more varied ones"
            )

    # --- after the walk -----------------------------------------------------------------------------------------------

    @property
    def _unpacked(self) -> list[str]:
        """The formats that hold the whole model with ModelOpt's quantizers."""
        return [name for name in self.directories if not FORMATS[name].is_packed]

    def _write_model(self, format: str, state: CalibrationState | None) -> list[Path]:
        """Writes a format that holds the whole model with ModelOpt's quantizers: weights are read again."""
        from nemo_ptq.checkpoint.loading import load_model
        from nemo_ptq.modelopt.transfer import apply_state

        model = load_model(self.job.checkpoint, self.device, **self.job.loading_options)
        if state is not None:
            apply_state(model.module, state)
        return FORMATS[format].write_model(model, self.job, self.directories[format])

    def _finish(
        self, files: Mapping[str, list[Path]], state: CalibrationState | None, report: Callable[..., Report]
    ) -> None:
        """Completes, verifies and publishes the directories; a fresh calibration is kept beside them if that fails."""
        digests = {}
        with self.reporter.part("export"):
            for name, directory in self.directories.items():
                mine = {file.relative_to(directory).as_posix(): sha256_of(file) for file in files.get(name, ())}
                everyones: list[dict[str, str]] = [mine] * dist.get_world_size()
                dist.all_gather_object(everyones, mine)
                digests[name] = {file: digest for part in everyones for file, digest in part.items()}
                if self.is_first and state is not None:
                    save_state(directory / IN_EXPORT, state)
        steps = gather_steps(self.reporter.steps)
        with self._calibration_kept(state), self.reporter.step("verify"):
            if self.is_first:
                finish(self.job, digests, partial(report, steps), self.reporter)
            dist.barrier()

    @contextmanager
    def _calibration_kept(self, state: CalibrationState | None) -> Iterator[None]:
        """Keeps a fresh calibration in a file beside the output until the ``with`` block ends without an error.

        The file is named ``OUT.calibration.safetensors``. A process that is killed leaves it as well.
        """
        output = self.job.output
        if not self.is_first or state is None or self.job.calibration_state is not None:
            yield
            return
        kept = output.with_name(f"{output.name}.calibration.safetensors")
        try:
            save_state(kept, state)
        except OSError as error:
            self.reporter.warn(f"the calibration cannot be kept in {kept}: {error.strerror}")
        try:
            yield
        except BaseException:
            if kept.exists():
                self.reporter.warn(
                    f"the calibration is kept in {kept}: `nemo-ptq export {kept} {output}` exports it without "
                    f"calibrating again, and so does calibration_state={kept} on several ranks"
                )
            raise
        kept.unlink(missing_ok=True)


def _caches_in(entries: Iterable[str]) -> list[str]:
    """Names of the core attention modules whose KV cache a calibration state quantizes."""
    return [name.partition(".k_bmm_quantizer")[0] for name in entries if ".k_bmm_quantizer" in name]
