# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A model larger than the memory at hand is quantized layer-wise, in memory that its depth does not show in.

The limit is one of private memory (RLIMIT_DATA): what a process allocates, thread stacks included, and not the files
and libraries that it maps, which the kernel can drop. It is set when everything that a job imports has been imported,
so that all of it is for the job.
"""

import ctypes
import resource
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest

from nemo_ptq.checkpoint.index import read_index
from nemo_ptq.config import QuantizationConfig
from nemo_ptq.verify.checks import verify
from tests.plan.synthetic import make_llama
from tests.plan.test_memory import run_job_on_cpu, settings, write_texts
from tests.ranks import run_ranks

# Of a thread: process groups start dozens, and each counts with all that it might ever use, which is 8 MiB by default.
STACK = 512 * 1024

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def private_bytes() -> int:
    """What counts towards RLIMIT_DATA."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData:")]
    return int(line.split()[1]) * 1024


def shrink_stacks() -> None:
    """Has threads that are started from now on take less address space."""
    libc, attributes = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    assert libc.pthread_attr_init(attributes) == 0
    assert libc.pthread_attr_setstacksize(attributes, ctypes.c_size_t(STACK)) == 0
    assert libc.pthread_setattr_default_np(attributes) == 0


def weight_bytes(checkpoint: Path) -> int:
    stored = read_index(checkpoint).state_dict_metadata.values()
    return 2 * sum(prod(tensor.size) for tensor in stored if hasattr(tensor, "size"))


def run_both(
    few: Path, many: Path, directory: Path, quantization: QuantizationConfig, allowed: int
) -> tuple[int, int, str]:
    """Quantizes the small model freely, and then the large one with what is allowed beyond what the process has.

    Returns:
        The peaks of both, and how the large one ends with all of its weights in memory.
    """
    shrink_stacks()
    peaks = [run_job_on_cpu(few, directory / "few", replace(quantization, layerwise=True))]
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (private_bytes() + allowed, hard))
    # That the weights do not fit is for the job to find out.
    peaks.append(run_job_on_cpu(many, directory / "many", quantization))
    try:
        run_job_on_cpu(many, directory / "resident", replace(quantization, layerwise=False))
    except (MemoryError, RuntimeError) as error:
        return *peaks, str(error)
    return *peaks, "succeeded"


def test_a_model_four_times_larger_than_memory_takes_what_a_shallow_one_does(tmp_path: Path) -> None:
    few, many = (run_ranks(make_llama, 1, f"{layers} layers", tmp_path / f"{layers}")[0] for layers in (4, 64))
    quantization = replace(
        settings("fp8", write_texts(tmp_path / "texts.jsonl")),
        calibration_dataset_size=8,
        calibration_batch_size=4,
        evaluation_dataset_size=2,
    )
    allowed = weight_bytes(many) // 4
    ((shallow, deep, resident),) = run_ranks(run_both, 1, few, many, tmp_path, quantization, allowed, timeout=3000)
    print(f"weights {4 * allowed / 2**20:.0f} MiB, allowed {allowed / 2**20:.0f} MiB")
    print(f"peak of 4 layers {shallow / 2**20:.0f} MiB, of 64 layers {deep / 2**20:.0f} MiB")
    assert deep == pytest.approx(shallow, rel=0.1)
    assert "can't allocate memory" in resident or "Cannot allocate memory" in resident
    assert all(check.ok for check in verify(tmp_path / "many"))
