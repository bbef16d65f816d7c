# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The text of a job: which samples it reads, and the loop that runs them through the model."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nemo_ptq.calibration.chats import Sample
from nemo_ptq.calibration.datasets import read_samples, split_samples
from nemo_ptq.calibration.forward import run_batches
from nemo_ptq.calibration.tokens import check_in_vocabulary, make_batches, share, tokenize_all
from nemo_ptq.checkpoint.loading import LoadedModel
from nemo_ptq.config import QuantizationConfig
from nemo_ptq.console.reporter import Reporter
from nemo_ptq.errors import PtqError
from nemo_ptq.job import Job
from nemo_ptq.quantization.algorithms import algorithm_of


@dataclass(frozen=True)
class JobSamples:
    """The text of a job.

    Attributes:
        calibration: Samples that the model is calibrated on.
        evaluation: Samples on which it is compared with the unquantized model.
        held_out: Whether the evaluation samples are separate from the calibration samples.
    """

    calibration: Sequence[Sample] = ()
    evaluation: Sequence[Sample] = ()
    held_out: bool = True


def read_job_samples(job: Job, reporter: Reporter) -> JobSamples:
    """Reads the samples of a job; none if it quantizes nothing, is calibrated, or has a loop of its own.

    Raises:
        PtqError: If the data set is needed for calibration and cannot be read.
    """
    if not job.reads_data:
        return JobSamples()
    if not algorithm_of(job.quantization).needs_data:
        return _evaluation_samples(job, reporter)
    dataset, wanted = job.quantization.calibration_dataset, job.quantization.calibration_dataset_size
    further = job.quantization.evaluation_dataset_size
    calibration, rest = split_samples(dataset, read_samples(dataset, wanted + further), wanted)
    if job.quantization.has_built_in_data and len(calibration) < wanted:
        reporter.say(f"{dataset}: calibrating on its {len(calibration)} passages")
    elif len(calibration) < wanted:
        reporter.warn(f"{dataset} has {len(calibration)} samples, fewer than the {wanted} asked")
    return JobSamples(calibration, rest[:further] or calibration[:further], bool(rest))


def _evaluation_samples(job: Job, reporter: Reporter) -> JobSamples:
    """Returns the samples to compare a model on that is quantized without text; none if they cannot be read."""
    try:
        samples = read_samples(job.quantization.calibration_dataset, job.quantization.evaluation_dataset_size)
    except PtqError as error:
        reporter.warn(f"the report will not compare with the unquantized model: {error}")
        return JobSamples()
    return JobSamples((), samples)


def calibration_batches(
    model: LoadedModel, quantization: QuantizationConfig, samples: Iterable[Sample], reporter: Reporter
) -> list[torch.Tensor]:
    """Tokenizes this data-parallel rank's share of the calibration samples.

    Returns:
        int64 (batch, sequence) each, without padding.

    Raises:
        PtqError: If no sample gives a token, one cannot be tokenized, or the model has no row for a token.
    """
    dataset, parallelism = quantization.calibration_dataset, model.parallelism
    sequences = tokenize_all(model.tokenizer, samples, quantization.calibration_seq_len, dataset)
    tally(sequences, dataset, reporter)
    sequences = [sequence for sequence in sequences if sequence]
    if not sequences:
        raise PtqError(f"no sample of calibration_dataset={dataset} gives any token")
    check_in_vocabulary(sequences, model.vocab_size, dataset)
    # The ranks that share a layer's experts exchange tokens in step, so they read the same samples.
    readers = parallelism.data.size // parallelism.expert.size
    mine = share(sequences, parallelism.data.rank // parallelism.expert.size, readers)
    return make_batches(mine, quantization.calibration_batch_size)


def tally(sequences: Sequence[Sequence[int]], dataset: str, reporter: Reporter) -> None:
    """Says how many samples give nothing, or too little, to calibrate on."""
    empty, single = (sum(len(sequence) == size for sequence in sequences) for size in (0, 1))
    found = [f"{empty} give no token and are left out"] if empty else []
    found += [f"{single} give a single token"] if single else []
    if found:
        reporter.warn(f"of the {len(sequences)} samples of {dataset}, {' and '.join(found)}: give longer texts")


def data_loop(
    model: LoadedModel, quantization: QuantizationConfig, samples: Iterable[Sample], reporter: Reporter
) -> Callable[[Any], None]:
    """Returns the loop that runs this data-parallel rank's share of the samples through a whole model.

    Raises:
        PtqError: When the loop runs, if no sample gives a token.
    """

    def loop(module: Any) -> None:
        batches = calibration_batches(model, quantization, samples, reporter)
        with reporter.progress("calibration", sum(map(len, batches))) as progress:
            for tokens, _ in zip(batches, run_batches(module, batches), strict=True):
                progress.advance(len(tokens), tokens.numel())

    return loop
