# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The job on one rank: a walk through the model's blocks that calibrates, exports and measures, then verification.

The plan is in the :class:`~nemo_ptq.job.Job`.
"""

import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nemo_ptq.calibration.batches import JobSamples, calibration_batches, read_job_samples
from nemo_ptq.calibration.fingerprint import Fingerprint
from nemo_ptq.calibration.methods import method_for
from nemo_ptq.calibration.nearest_learner import NearestLearner
from nemo_ptq.calibration.observing import State, TokenCounts
from nemo_ptq.calibration.pipeline import Learner, ScaleLearner, gather_counts
from nemo_ptq.calibration.rounders import rounder_for, warming_up
from nemo_ptq.calibration.rounding_learner import RoundingLearner
from nemo_ptq.calibration.streams import BlockRunner, Stream
from nemo_ptq.checkpoint.blocks import parameters_of
from nemo_ptq.checkpoint.loading import LoadedModel, open_model
from nemo_ptq.checkpoint.staging import Staging, stamp_of
from nemo_ptq.config import NO_QUANT, QuantizationConfig
from nemo_ptq.console.interrupts import tidying_up
from nemo_ptq.console.quiet import quiet_libraries
from nemo_ptq.console.reporter import Reporter
from nemo_ptq.engine.choosing import Choice, choose_again, choose_algorithms, keep_choice, kept_choice
from nemo_ptq.engine.evaluation import sample
from nemo_ptq.engine.finish import calibration_kept, finish, say_conclusion
from nemo_ptq.engine.journal import Journal, flattened
from nemo_ptq.engine.quantization import Quantization, by_algorithm, by_modelopt
from nemo_ptq.engine.reservation import reserve_for_all
from nemo_ptq.engine.residence import is_layerwise
from nemo_ptq.engine.walk import WALK_STEPS, JobWalk
from nemo_ptq.export.calibrated import CalibratedLayers
from nemo_ptq.export.exports import Exports
from nemo_ptq.export.folding import foldable_scale
from nemo_ptq.export.formats import FORMATS
from nemo_ptq.export.leftover import PROGRESS
from nemo_ptq.export.manifest_writer import checksums_of
from nemo_ptq.export.rounded_weights import RoundedWeights, check_unchanged, place_in_all
from nemo_ptq.export.shard_map import gather_shard_map
from nemo_ptq.export.source import Source
from nemo_ptq.job import Job
from nemo_ptq.models.registry import family_of
from nemo_ptq.parallel.environment import read_launch
from nemo_ptq.parallel.process_groups import pick_device, process_groups
from nemo_ptq.quantization.algorithms import algorithm_of, amax_floor, moves_weights, quantization_of_layer
from nemo_ptq.quantization.presets import preset_config
from nemo_ptq.quantization.rounded_weight import RoundedWeight
from nemo_ptq.quantization.state import CalibrationState, check_fits, of_block, save_state
from nemo_ptq.quantization.state_header import IN_EXPORT, WEIGHTS_IN_EXPORT, StateHeader, read_header, weights_file
from nemo_ptq.report.compose import Observations, describe
from nemo_ptq.report.measure import Measurement, evaluation_batches
from nemo_ptq.report.metrics import with_rounding
from nemo_ptq.report.observe import gather_steps, observe, report_of
from nemo_ptq.report.records import Report
from nemo_ptq.report.serving import server_warnings
from nemo_ptq.versions import producer

_RECOVERY = "export_config.min_recovery"
# Arguments that change how a job runs, and not what comes out.
_NOT_OF_THE_RESULT = (
    *("export_config.overwrite", _RECOVERY, "export_config.keep_failed"),
    "quantization_config.layerwise",
)


# The calibration state, the figures, and this rank's files by format.
_Walked = tuple[CalibrationState | None, Observations, dict[str, list[Path]]]


def run_job(job: Job) -> None:
    """Runs a job on this rank; all ranks of the job call it.

    Raises:
        PtqError: If the data or the calibrated model do not allow the export, the files do not pass verification, or
            the recovery is below the user's limit.
    """
    quiet_libraries()
    launch = read_launch()
    reporter = Reporter(launch.is_first)
    device = pick_device(launch)
    groups = process_groups(
        launch,
        device,
        tensor_parallel=job.calibration_tp,
        pipeline_parallel=job.calibration_pp,
        expert_parallel=job.calibration_ep,
    )
    warming = warming_up(device, job.quantization, job.decoder) if job.reads_data else nullcontext()
    with tidying_up(launch.world_size == 1), groups, reserve_for_all(job, reporter) as (staging, resumes), warming:
        if job.fast_because is not None:
            reporter.say(f"quality fast, since {job.fast_because}")
        # Before the model: data that is not available is better known in seconds.
        samples = read_job_samples(job, reporter)
        for line in server_warnings(job):
            reporter.warn(line)
        report = _BlockJob(job, samples, device, reporter, staging, resumes).run()
    say_conclusion(job, report, reporter)


def check_exportable(model: LoadedModel, job: Job) -> None:
    """Refuses a model that the readers of a format would load wrongly, before it is calibrated.

    Raises:
        PtqError: If there is such a format among those asked for.
    """
    family = family_of(_class_name(model), job.export.decoder_type)
    for name in job.export.formats:
        FORMATS[name].check_model(model.spec, family, model.tokenizer)


def _class_name(model: LoadedModel) -> str:
    """NeMo's class of the model's configuration, without its module."""
    return model.config_class.rpartition(".")[2]


class _BlockJob:
    """One run of a job on this rank.

    Args:
        job: The job.
        samples: The job's text.
        device: This rank's device.
        reporter: Shows progress.
        staging: The job's staging directory.
        resumes: Whether it continues from finished blocks of an earlier run.
    """

    def __init__(
        self,
        job: Job,
        samples: JobSamples,
        device: torch.device,
        reporter: Reporter,
        staging: Staging,
        resumes: bool,
    ) -> None:
        self.job, self.samples, self.device, self.reporter = job, samples, device, reporter
        self.is_first = dist.get_rank() == 0
        self.directories = job.directories(staging.files)
        self._staging, self._resumes = staging, resumes
        self._calibration_batches: list[torch.Tensor] | None = None
        # Of this rank's files, those that were read as they became complete.
        self._checksums: dict[Path, str] = {}

    def run(self) -> Report | None:
        """Walks through the model, and finishes the directories; returns the report on the first rank."""
        if self._resumes:
            # Opening the files for another layout would write its header over the blocks in them.
            Journal(self._staging.journal, self._identity()).check()
        dist.barrier()
        if self.is_first:
            self._prepare()
        dist.barrier()
        unpacked = {name: self.directories[name] for name in self._unpacked}
        calibrated = by_modelopt(self.job, self.samples, self.device, unpacked, self.reporter)
        with self.reporter.part("load"):
            stored = getattr(torch, self.job.export.torch_dtype_name)
            model = open_model(
                self.job.checkpoint, self.device, dtype=self._dtype, stored=stored, **self.job.loading_options
            )
            check_exportable(model, self.job)
        layerwise = is_layerwise(self.job, self.device, self.reporter)
        waiting = torch.device("cpu") if layerwise else self.device
        runner = BlockRunner(model.module, self.device, model.parallelism, waiting)
        choice = None if calibrated else self._choice(model, runner, layerwise)
        state, observations, files = self._quantize(model, runner, layerwise, calibrated, choice)
        while choice is not None and (choice := self._choose_again(choice, observations)) is not None:
            state, observations, files = self._quantize(model, runner, layerwise, None, choice)
        size = model.size
        for block in model.blocks:
            # Now, and not when Python finds the model's circles: another one may be loaded in a moment.
            model.loader.drop(block)
        del model
        if calibrated is None:
            for name in self._unpacked:
                with self.reporter.part("export"):
                    files[name] = self._write_model(name, state)
        self.reporter.say_steps(WALK_STEPS)
        if observations.quality is not None:
            self.reporter.say(describe(observations.quality))
        return self._finish(files, state, partial(report_of, size, self.job, observations))

    @property
    def _dtype(self) -> torch.dtype:
        """Data type of weights in memory: bfloat16 for algorithms, the export's type if nothing is quantized."""
        is_quantized = self.job.quantization.algorithm_name != NO_QUANT
        return torch.bfloat16 if is_quantized else getattr(torch, self.job.export.torch_dtype_name)

    def _prepare(self) -> None:
        """Makes the directories to write to; of an earlier run only the files with packed blocks are left."""
        for name, directory in self.directories.items():
            rounded = directory / WEIGHTS_IN_EXPORT
            if self._keeps_rounded:
                rounded.parent.mkdir(parents=True, exist_ok=True)
            directory.mkdir(exist_ok=True)
            for entry in directory.iterdir():
                if entry.is_dir():
                    if entry != rounded.parent or not self._keeps_rounded:
                        shutil.rmtree(entry)
                elif not FORMATS[name].is_packed or entry.suffix != ".safetensors":
                    entry.unlink()

    def _quantize(
        self,
        model: LoadedModel,
        runner: BlockRunner,
        layerwise: bool,
        calibrated: Quantization | None,
        choice: Choice | None,
    ) -> _Walked:
        """Walks through the model, as ModelOpt has calibrated it or by our own algorithms."""
        quantization = calibrated or by_algorithm(self.job, model, {} if choice is None else choice.algorithms)
        learner = self._learner(model, runner, quantization, choice) if quantization.given is None else None
        return self._walk(model, runner, layerwise, quantization, choice, learner)

    def _walk(
        self,
        model: LoadedModel,
        runner: BlockRunner,
        layerwise: bool,
        quantization: Quantization,
        choice: Choice | None,
        learner: Learner | None,
    ) -> _Walked:
        """Calibrates, writes and measures; returns the state, the figures, and this rank's files by format."""
        job, parallelism = self.job, model.parallelism
        source = self._source(model, quantization, self._rounded(model, quantization, learner))
        texts = evaluation_batches(model, self.samples.evaluation)
        reference, quantized = (Stream(texts), Stream(texts)) if texts else (None, None)
        with Exports(
            source,
            self.directories,
            amax_floor(job.quantization, job.decoder),
            quantization.fixed_by,
            self._resumes,
            self._first_rounded if isinstance(learner, RoundingLearner | NearestLearner) else None,
        ) as exports:
            walk = JobWalk(
                model,
                runner,
                learner,
                exports,
                Measurement(
                    model,
                    runner,
                    source.layers,
                    reference,
                    quantized,
                    job.export.generate_sample,
                    job.quantization.kv_cache_qformat,
                ),
                Fingerprint(parallelism.tensor.rank),
                Journal(
                    self._staging.journal,
                    self._identity(),
                    quantization.is_resumable and not job.export.generate_sample,
                ),
                self.reporter,
            )
            walk.run(
                layerwise,
                None if quantization.given is None else partial(of_block, quantization.given),
                self._resumes,
            )
            with self.reporter.part("export"):
                self._checksums = exports.finish()
        if (nearest := self._nearest_instead(walk)) is not None:
            self._begin_anew()
            unresumable = replace(quantization, is_resumable=False)  # the journal has no word for it
            return self._walk(model, runner, layerwise, unresumable, choice, nearest)
        if self.is_first:
            with self.reporter.part("export"):
                exports.write_documents(self.directories)
        state = quantization.saved
        if quantization.is_new:
            state = self._gather_state(walk.state, walk.fingerprint.whole(), choice)
        elif job.calibration_state is not None and not job.metadata.is_quantized:
            assert state is not None
            check_fits(state, walk.fingerprint.whole())
        counts = quantization.expert_tokens if walk.learner is None else gather_counts(walk.expert_tokens, parallelism)
        self._warn_of_idle_experts(counts)
        measured = walk.measurement.gather(source.shard_map)
        rounding = with_rounding(measured.layers, self._keeps_rounded, self._nearest(walk))
        measured = replace(measured, layers=rounding)
        observations = observe(job, self.samples, measured, counts)
        observations = replace(observations, mixed_precision=None if choice is None else choice.record)
        if job.export.generate_sample:
            self.reporter.say(f"sample after quantization: {sample(model)}")
        return state, observations, self._with_rounded(exports)

    @property
    def _keeps_rounded(self) -> bool:
        """Whether the job's weights are rounded by the data, and kept."""
        return self.job.quantization.is_balanced

    @property
    def _first_rounded(self) -> Path:
        """The file with the rounded weights in the first of the directories."""
        return next(iter(self.directories.values())) / WEIGHTS_IN_EXPORT

    def _with_rounded(self, exports: Exports) -> dict[str, list[Path]]:
        """This rank's files by format, with the rounded weights, which are the same in every directory."""
        files = exports.files()
        given = self.job.calibration_state
        if not self._keeps_rounded or not (exports.writes_rounded if given is None else self.is_first):
            return files
        place_in_all(None if given is None else weights_file(given), self.directories, files)
        return files

    def _rounded(
        self, model: LoadedModel, quantization: Quantization, learner: Learner | None
    ) -> Callable[[str], RoundedWeight | None]:
        """Returns a function that looks up a layer's rounded weight, None if the job keeps none."""
        if isinstance(learner, RoundingLearner | NearestLearner):
            return learner.rounded.get
        if not self._keeps_rounded or self.job.calibration_state is None:
            return lambda name: None
        file = weights_file(self.job.calibration_state)
        if self.is_first:
            check_unchanged(file)
        return RoundedWeights(
            file,
            quantization.schemes,
            model.spec,
            model.parallelism.sharing,
        )

    def _source(
        self, model: LoadedModel, quantization: Quantization, rounded: Callable[[str], RoundedWeight | None]
    ) -> Source:
        """The model as the formats see it; every rank calls it."""
        parallelism = model.parallelism
        layers = CalibratedLayers(
            parameters_of(model.blocks),
            {},
            quantization.schemes,
            bool(model.config.layernorm_zero_centered_gamma),
            quantization.is_smoothed,
            parallelism.tensor,
            parallelism.expert_tensor,
            dict(quantization.weight_amaxes),
            rounded,
        )
        shard_map = gather_shard_map(
            [name for block in model.blocks for name in block.modules],
            parallelism.tensor.rank,
            quantization.schemes,
            quantization.caches,
        )
        return Source(
            layers=layers,
            rank=dist.get_rank(),
            tensor_rank=parallelism.tensor.rank,
            tensor_ranks=parallelism.tensor.size,
            shard_map=shard_map,
            shape=model.spec,
            family=family_of(_class_name(model), self.job.export.decoder_type),
            config=model.config,
            has_vocab_size=model.has_vocab_size,
            tokenizer=model.tokenizer,
            tokenizer_is_replaced=self.job.tokenizer_path is not None,
            checkpoint=self.job.checkpoint,
            settings=self.job.export,
            cache_format=self.job.quantization.kv_cache_qformat,
        )

    def _identity(self) -> dict[str, Any]:
        """Values that must be the same when the run is continued."""
        job = self.job
        arguments = flattened(job.arguments)
        chooses = algorithm_of(job.quantization).chooses  # the recovery may be what it aims at
        return {
            **{name: value for name, value in arguments.items() if name not in _NOT_OF_THE_RESULT},
            **({_RECOVERY: job.export.min_recovery} if chooses else {}),
            "checkpoint files": stamp_of(job.checkpoint),
            **({} if job.adapter is None else {"adapter files": stamp_of(job.adapter)}),
            # What reads no text can go without the files.
            "calibration data": [stamp_of(file) for file in job.quantization.data_files if file.exists()],
            "versions": producer(),
            "processes": dist.get_world_size(),
        }

    def _batches(self, model: LoadedModel) -> list[torch.Tensor]:
        """The calibration batches of this data-parallel rank; the texts are tokenized once."""
        if self._calibration_batches is None:
            quantization, texts = self.job.quantization, self.samples.calibration
            self._calibration_batches = calibration_batches(model, quantization, texts, self.reporter)
        return self._calibration_batches

    def _choice(self, model: LoadedModel, runner: BlockRunner, layerwise: bool) -> Choice | None:
        """The algorithm chosen for each layer, None if all have the same; every rank calls it."""
        job, directory = self.job, self._staging.journal
        if not algorithm_of(job.quantization).chooses:
            return None
        if job.calibration_state is not None:
            return Choice(read_header(job.calibration_state).choice, None)
        if self._resumes:
            return kept_choice(directory)
        choice = choose_algorithms(job, model, runner, self._batches(model), layerwise, self.reporter)
        if self.is_first:
            keep_choice(directory, choice)
        return choice

    def _choose_again(self, choice: Choice, observations: Observations) -> Choice | None:
        """What each layer is quantized with, where a choice has missed the recovery; every rank calls it."""
        # The first rank has measured it.
        quality = observations.quality
        found = [None if quality is None or quality.recovery is None else quality.recovery.value]
        dist.broadcast_object_list(found, src=0)
        further = None if found[0] is None else choose_again(self.job, choice, found[0], self.reporter)
        if further is not None:
            self._begin_anew()
            if self.is_first:
                keep_choice(self._staging.journal, further)
        return further

    def _learner(
        self, model: LoadedModel, runner: BlockRunner, quantization: Quantization, choice: Choice | None
    ) -> Learner:
        job, batches = self.job, self._batches(model)
        if not job.quantization.is_balanced:
            method = method_for(job.quantization, job.decoder)
            return ScaleLearner(
                runner, model.parallelism, Stream(batches), method, job.quantizes_kv_cache, job.unquantized
            )
        shape = model.spec
        own = self._quantizations(quantization, choice)
        return RoundingLearner(
            runner,
            model.parallelism,
            Stream(batches),
            Stream(batches) if moves_weights(job.quantization) else None,
            {name: rounder_for(its, job.decoder) for name, its in own.items()},
            {name for name, its in own.items() if moves_weights(its)},
            quantization.schemes,
            lambda name, scale: foldable_scale(name, scale, shape, job.quantizes_kv_cache),
            job.quantizes_kv_cache,
            job.quantization.is_max,
            job.quantization.kv_cache_qformat,
        )

    def _quantizations(self, quantization: Quantization, choice: Choice | None) -> dict[str, QuantizationConfig]:
        """Returns the configuration of each quantized layer."""
        asked = self.job.quantization
        if choice is None:
            return dict.fromkeys(quantization.schemes, asked)
        return {name: quantization_of_layer(asked, choice.algorithms[name]) for name in quantization.schemes}

    def _gather_state(self, mine: State, weights: str, choice: Choice | None) -> CalibrationState:
        """Puts the ranks' parts of the calibration state together; every rank calls it."""
        job = self.job
        everyones: list[State] = [mine] * dist.get_world_size()
        dist.all_gather_object(everyones, mine)
        bits = job.quantization.effective_bits
        if choice is not None and choice.record is not None and bits is None:
            bits = choice.record.effective_bits  # those that the recovery has taken
        header = StateHeader(
            checkpoint=str(job.checkpoint),
            weights=weights,
            model=job.metadata.identity,
            decoder=job.decoder,
            quantization=job.quantization if bits is None else replace(job.quantization, effective_bits=bits),
            modelopt_config=preset_config(job.quantization, job.decoder),
            producer=producer(),
            choice={} if choice is None else choice.algorithms,
            adapter=None if job.adapter is None else str(job.adapter),
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

    def _nearest(self, walk: JobWalk) -> list[int] | None:
        """The layers for which quality "max" found nothing better than rounding to nearest; every rank calls it.

        Returns:
            None where a saved calibration does not tell.
        """
        if walk.learner is None and self.job.quantization.is_max:
            return None
        everyones = [walk.nearest] * dist.get_world_size()
        dist.all_gather_object(everyones, walk.nearest)
        layers = sorted({block - 1 for part in everyones for block in part})
        if layers:
            self.reporter.say(
                f"layers {', '.join(map(str, layers))} are rounded to nearest, which was better on held-out samples"
            )
        return layers

    def _nearest_instead(self, walk: JobWalk) -> NearestLearner | None:
        """Compares quality "max" with rounding to nearest on the samples that are held out; every rank calls it.

        Returns:
            What rounds the whole model to nearest, where that is better; else None.
        """
        learner = walk.learner
        if not (isinstance(learner, RoundingLearner) and learner.is_max):
            return None
        everyones = [learner.found] * dist.get_world_size()
        dist.all_gather_object(everyones, learner.found)
        found = next(filter(None, everyones), None)
        if found is None:
            return None
        ours, plain = found
        line = f"KL divergence on held-out samples: {ours}; rounded to nearest throughout: {plain}"
        if not plain.is_less(ours):
            self.reporter.say(line)
            return None
        self.reporter.warn(f"{line}, which is better: all layers are rounded to nearest; more samples may help")
        return NearestLearner(learner.parallelism, learner.rounders, walk.state, learner.counts)

    def _begin_anew(self) -> None:
        """Removes what was written, since another walk writes it in another way; every rank calls it."""
        self._resumes = False
        dist.barrier()
        if self.is_first:
            # First the journal: a run that is killed from now on has nothing to go on from.
            (self._staging.journal / PROGRESS).unlink(missing_ok=True)
            for directory in self.directories.values():
                shutil.rmtree(directory)
            self._prepare()
        dist.barrier()

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
            apply_state(model.module, state, self.job.unquantized)
        return FORMATS[format].write_model(model, self.job, self.directories[format])

    def _finish(
        self, files: Mapping[str, list[Path]], state: CalibrationState | None, report: Callable[..., Report]
    ) -> Report | None:
        """Completes, verifies and publishes the directories; a fresh calibration is kept beside them if that fails."""
        checksums = {}
        with self.reporter.part("export"):
            for name, directory in self.directories.items():
                written = files.get(name, [])
                names = [file.relative_to(directory).as_posix() for file in written]
                mine = dict(zip(names, checksums_of(written, self._checksums), strict=True))
                everyones: list[dict[str, str]] = [mine] * dist.get_world_size()
                dist.all_gather_object(everyones, mine)
                checksums[name] = {file: checksum for part in everyones for file, checksum in part.items()}
                if self.is_first and state is not None:
                    save_state(directory / IN_EXPORT, state)
        steps = gather_steps(self.reporter.steps)
        with (
            calibration_kept(self.job, state, next(iter(self.directories.values())), self.reporter),
            self.reporter.step("verify"),
        ):
            finished = None
            if self.is_first:
                finished = finish(self.job, self._staging, checksums, partial(report, steps), self.reporter)
            dist.barrier()
        return finished
