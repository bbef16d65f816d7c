# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Planned peaks are what real jobs reach, within 15 %.

On a CPU anonymous memory is what is compared: what the process has allocated beyond its imports, sampled every few
milliseconds. glibc keeps freed blocks of up to 32 MiB for later, which says nothing about what a job needs; the jobs
here have it give back whatever is larger than a page or so. Mapped files, the checks' view of what was written, can be
dropped by the kernel at any time and do not count. On a GPU it is what torch's allocator has handed out.
"""

import ctypes
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

from nemo_ptq.checkpoint.metadata import read_metadata
from nemo_ptq.config import ExportConfig, QuantizationConfig
from nemo_ptq.plan import Plan, make_plan
from nemo_ptq.plan.sharding import model_parameters
from tests.plan.models import LLAMA_8B
from tests.plan.synthetic import make_llama
from tests.ranks import run_ranks

TOLERANCE = 0.15
SAMPLES, SEQ_LEN, BATCH = 32, 128, 16
# glibc's mallopt.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

Checkpoint = Callable[[str], Path]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory = tmp_path_factory.mktemp("synthetic")
    return cache(lambda name: run_ranks(make_llama, 1, name, directory / name)[0])


def write_texts(path: Path) -> Path:
    text = "the quick brown fox jumps over the lazy dog " * 40
    path.write_text("".join(json.dumps({"text": f"{index} {text}"}) + "\n" for index in range(SAMPLES)))
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts") / "texts.jsonl")


def settings(algorithm: str, texts: Path | str = "cnn_dailymail", layerwise: bool | None = None) -> QuantizationConfig:
    return QuantizationConfig(
        algorithm,
        quality="fast",
        calibration_dataset=str(texts),
        calibration_dataset_size=SAMPLES,
        calibration_seq_len=SEQ_LEN,
        calibration_batch_size=BATCH,
        layerwise=layerwise,
    )


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


@contextmanager
def watched(peaks: list[int]) -> Iterator[None]:
    """Adds the peak of a block, over what there was before it."""
    before, ended = anonymous_bytes(), threading.Event()
    samples = [before]

    def watch() -> None:
        while not ended.wait(0.003):
            samples.append(anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    yield
    ended.set()
    thread.join()
    peaks.append(max(samples) - before)


def run_job_on_cpu(checkpoint: Path, output: Path, quantization: QuantizationConfig) -> int:
    from nemo_ptq.engine.run import run_job
    from nemo_ptq.plan.rules import check_job

    libc = ctypes.CDLL(None)
    for parameter in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
        assert libc.mallopt(parameter, 1 << 16) == 1
    job = check_job(
        world_size=1,
        nemo_checkpoint=str(checkpoint),
        quantization_config=quantization,
        export_config=ExportConfig(str(output)),
    )
    peaks: list[int] = []
    with watched(peaks):
        run_job(job)
    return peaks[0]


def planned_peak(plan: Plan) -> int:
    return max(step.device for step in plan.memory)


@pytest.mark.parametrize(
    ("size", "algorithm", "layerwise"),
    [
        pytest.param("38M", "int4_awq", False, marks=pytest.mark.slow),
        ("38M", "int8_sq", True),
        pytest.param("147M", "fp8", False, marks=pytest.mark.slow),
        pytest.param("147M", "int8_sq", True, marks=pytest.mark.slow),
        pytest.param("147M", "fp8", True, marks=pytest.mark.slow),
        pytest.param("147M", "int8_sq", False, marks=pytest.mark.slow),
        pytest.param("147M", "int4_awq", False, marks=pytest.mark.slow),
        pytest.param("147M", "int4_awq", True, marks=pytest.mark.slow),
        pytest.param("433M", "fp8", False, marks=pytest.mark.slow),
        pytest.param("433M", "fp8", True, marks=pytest.mark.slow),
        pytest.param("433M", "int8_sq", False, marks=pytest.mark.slow),
    ],
)
def test_a_jobs_peak_is_the_planned_one(
    checkpoint: Checkpoint, texts: Path, tmp_path: Path, size: str, algorithm: str, layerwise: bool
) -> None:
    source, output = checkpoint(size), tmp_path / "out"
    metadata = read_metadata(source)
    assert f"{model_parameters(metadata) / 1e6:.0f}M" == size
    quantization = settings(algorithm, texts, layerwise)
    plan = make_plan(metadata, quantization, ExportConfig("OUT"), device="CPU")
    (measured,) = run_ranks(run_job_on_cpu, 1, source, output, quantization, timeout=900)
    planned = planned_peak(plan)
    print(f"{size} {algorithm} {plan.mode}: planned {planned / 2**20:.0f} MiB, measured {measured / 2**20:.0f} MiB")
    assert planned == pytest.approx(measured, rel=TOLERANCE)
    for file in plan.files:
        assert (output / file.name).stat().st_size == file.bytes


@pytest.mark.parametrize("algorithm", ["fp8", "int8_sq"])
def test_peaks_that_were_measured_on_an_h100(algorithm: str) -> None:
    """Of Llama-3-8B with the default data: 16.4 GiB for both, see docs/benchmarks.md."""
    assert planned_peak(make_plan(LLAMA_8B, QuantizationConfig(algorithm, "fast"))) == pytest.approx(
        16.4 * 2**30, rel=0.05
    )
