# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A report that lacks figures says why."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemo_ptq.calibration.batches import JobSamples
from nemo_ptq.config import ExportConfig, QuantizationConfig
from nemo_ptq.job import Job
from nemo_ptq.report.measure import Measured
from nemo_ptq.report.observe import observe
from nemo_ptq.verify.evaluate import DocumentScore
from tests.plan.models import LLAMA_8B

SAMPLES = JobSamples(("a", "b"), ("c",))


def job(algorithm: str = "fp8", evaluation: int = 8, is_quantized: bool = False, **options: Any) -> Job:
    return Job(
        checkpoint=Path("/checkpoint"),
        metadata=replace(LLAMA_8B, is_quantized=is_quantized),
        output=Path("/out"),
        quantization=QuantizationConfig(algorithm, evaluation_dataset_size=evaluation),
        export=ExportConfig("/out"),
        decoder="llama",
        **options,
    )


@pytest.mark.parametrize(
    ("asked", "samples", "reason"),
    [
        (job("no_quant"), JobSamples(), "nothing is quantized"),
        (job(is_quantized=True, calibration_state=Path("/state")), JobSamples(), "quantized already"),
        (job(forward_loop=print), JobSamples(), "your own (forward_loop)"),
        (job(calibration_state=Path("/state")), JobSamples(), "came from a file (calibration_state)"),
        (job(evaluation=0), JobSamples(("a",), ()), "evaluation_dataset_size=0"),
        (job(), JobSamples(("a",), ()), "cnn_dailymail holds no sample of two tokens or more"),
    ],
)
def test_what_was_not_compared_has_a_reason(asked: Job, samples: JobSamples, reason: str) -> None:
    observed = observe(asked, samples, Measured(), {})
    assert observed.quality is None
    assert observed.missing.keys() == {"quality", "activations"}
    assert all(reason in text for text in observed.missing.values())


def test_what_was_compared_is_summed_up() -> None:
    score = DocumentScore(tokens=10, nll=20.0, baseline_nll=19.0, kl_divergence=0.5, agreements=9)
    quality = observe(job(), replace(SAMPLES, held_out=False), Measured(scores=(score,)), {}).quality
    assert quality is not None
    assert (quality.text, quality.held_out, quality.documents, quality.tokens) == ("cnn_dailymail", False, 1, 10)
