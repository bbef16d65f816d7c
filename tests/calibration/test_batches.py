# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Which samples a job reads: those to calibrate on, then those to compare on."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from nemo_ptq.calibration.batches import JobSamples, read_job_samples, tally
from nemo_ptq.config import ExportConfig, QuantizationConfig
from nemo_ptq.console.reporter import Reporter
from nemo_ptq.errors import PtqError
from nemo_ptq.job import Job
from tests.plan.models import LLAMA_8B

Read = Callable[..., tuple[JobSamples, str]]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Reads the samples of a job on a file of five, "0" to "4", and returns what was said as well."""

    def read(size: int, further: int, algorithm: str = "fp8", **options: Any) -> tuple[JobSamples, str]:
        file = tmp_path / "five.txt"
        file.write_text("".join(f"{number}\n" for number in range(5)))
        job = Job(
            checkpoint=tmp_path,
            metadata=LLAMA_8B,
            output=tmp_path / "out",
            quantization=QuantizationConfig(
                algorithm,
                calibration_dataset=str(file),
                calibration_dataset_size=size,
                evaluation_dataset_size=further,
            ),
            export=ExportConfig(str(tmp_path / "out")),
            decoder="llama",
            **options,
        )
        said = io.StringIO()
        return read_job_samples(job, Reporter(True, Console(file=said, width=200))), said.getvalue()

    return read


def test_what_is_compared_on_was_not_calibrated_on(read: Read) -> None:
    assert read(3, 2) == (JobSamples(["0", "1", "2"], ["3", "4"], held_out=True), "")
    assert read(4, 2) == (JobSamples(["0", "1", "2", "3"], ["4"], held_out=True), "")


def test_a_data_set_with_nothing_left_is_compared_on_again(read: Read) -> None:
    assert read(5, 2) == (JobSamples(["0", "1", "2", "3", "4"], ["0", "1"], held_out=False), "")
    samples, said = read(6, 1)
    assert (len(samples.calibration), samples.evaluation, samples.held_out) == (5, ["0"], False)
    assert "has 5 samples, fewer than the 6 asked" in said


def test_poor_samples_are_counted() -> None:
    said = io.StringIO()
    reporter = Reporter(True, Console(file=said, width=200))
    tally([[1, 2], [3]], "DATA", reporter)
    tally([[], [1], [], [2, 3]], "DATA", reporter)
    assert said.getvalue().splitlines() == [
        "warning: of the 2 samples of DATA, 1 give a single token: give longer texts",
        "warning: of the 4 samples of DATA, 2 give no token and are left out and 1 give a single token: "
        "give longer texts",
    ]


def test_a_job_that_does_not_calibrate_on_data_reads_none(read: Read, tmp_path: Path) -> None:
    assert read(3, 2, "no_quant") == read(3, 2, forward_loop=print) == (JobSamples(), "")
    assert read(3, 2, calibration_state=tmp_path) == (JobSamples(), "")


def test_an_algorithm_without_calibration_reads_what_is_compared_on_alone(read: Read) -> None:
    assert read(3, 2, "fp8_dynamic") == (JobSamples((), ["0", "1"], held_out=True), "")
    assert read(3, 0, "fp8_dynamic")[0].evaluation == []


def test_without_text_it_goes_on_and_says_so(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(dataset: str, size: int) -> list[str]:
        raise PtqError("no network")

    monkeypatch.setattr("nemo_ptq.calibration.batches.read_samples", refuse)
    samples, said = read(3, 2, "int8_dynamic")
    assert samples == JobSamples()
    assert "the report will not compare with the unquantized model: no network" in said
    with pytest.raises(PtqError, match="no network"):
        read(3, 2, "fp8")
