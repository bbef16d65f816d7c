# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The text of a job: which samples it reads, and the loop that runs them through the model."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nemo_ptq.calibration.datasets import read_samples
from nemo_ptq.calibration.forward import run_batches
from nemo_ptq.calibration.text_files import Sample
from nemo_ptq.calibration.tokens import make_batches, share, tokenize
from nemo_ptq.checkpoint.loading import LoadedModel
from nemo_ptq.config import NO_QUANT, QuantizationConfig
from nemo_ptq.console.reporter import Reporter
from nemo_ptq.errors import PtqError
from nemo_ptq.job import Job
from nemo_ptq.parallel.ranks import Parallelism
from nemo_ptq.quantization.algorithms import algorithm_of


@dataclass(frozen=True)
class JobSamples:
    """The text of a job.

    Attributes:
        calibration: What the model is calibrated on.
        evaluation: What it is compared with the unquantized model on.
        held_out: Whether the latter are other samples than the former.
    """

    calibration: Sequence[Sample] = ()
    evaluation: Sequence[Sample] = ()
    held_out: bool = True


def read_job_samples(job: Job, reporter: Reporter) -> JobSamples:
    """Reads the samples of a job; none if it quantizes nothing, is calibrated, or has a loop of its own.

    Raises:
        PtqError: If the data set cannot be read, and is calibrated on.
    """
    is_calibrated = job.calibration_state is not None or job.metadata.is_quantized
    if job.quantization.algorithm_name == NO_QUANT or job.forward_loop is not None or is_calibrated:
        return JobSamples()
    if not algorithm_of(job.quantization).needs_data:
        return _evaluation_samples(job, reporter)
    dataset, wanted = job.quantization.calibration_dataset, job.quantization.calibration_dataset_size
    further = job.quantization.evaluation_dataset_size
    samples = read_samples(dataset, wanted + further)
    if len(samples) < wanted:
        reporter.warn(f"{dataset} has {len(samples)} samples, fewer than the {wanted} asked")
    held_out = len(samples) > wanted
    return JobSamples(samples[:wanted], samples[wanted:] if held_out else samples[:further], held_out)


def _evaluation_samples(job: Job, reporter: Reporter) -> JobSamples:
    """What a model is compared on that needs no text to be quantized: nothing where there is none."""
    try:
        samples = read_samples(job.quantization.calibration_dataset, job.quantization.evaluation_dataset_size)
    except PtqError as error:
        reporter.warn(f"the report will not compare with the unquantized model: {error}")
        return JobSamples()
    return JobSamples((), samples)


def calibration_batches(
    tokenizer: Any, quantization: QuantizationConfig, samples: Iterable[Sample], parallelism: Parallelism
) -> list[torch.Tensor]:
    """Tokenizes this data-parallel rank's share of the calibration samples.

    Returns:
        int64 (batch, sequence) each, without padding.

    Raises:
        PtqError: If no sample gives a token.
    """
    sequences = [tokenize(tokenizer, sample, quantization.calibration_seq_len) for sample in samples]
    sequences = [sequence for sequence in sequences if sequence]
    if not sequences:
        raise PtqError(f"no sample of calibration_dataset={quantization.calibration_dataset} gives any token")
    # The ranks that share a layer's experts exchange tokens in step, so they read the same samples.
    readers = parallelism.data.size // parallelism.expert.size
    mine = share(sequences, parallelism.data.rank // parallelism.expert.size, readers)
    return make_batches(mine, quantization.calibration_batch_size)


def data_loop(
    model: LoadedModel, quantization: QuantizationConfig, samples: Iterable[Sample], reporter: Reporter
) -> Callable[[Any], None]:
    """Returns the loop that runs this data-parallel rank's share of the samples through a whole model.

    Raises:
        PtqError: When the loop runs, if no sample gives a token.
    """

    def loop(module: Any) -> None:
        batches = calibration_batches(model.tokenizer, quantization, samples, model.parallelism)
        with reporter.progress("calibration", sum(map(len, batches))) as progress:
            for tokens, _ in zip(batches, run_batches(module, batches), strict=True):
                progress.advance(len(tokens), tokens.numel())

    return loop
