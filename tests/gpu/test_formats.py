# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Every format from a GPU, and again from its saved calibration without one: the same bytes."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from nemo_ptq.config import ExportConfig, QuantizationConfig
from nemo_ptq.report.write import FILES
from nemo_ptq.verify.checks import verify
from tests.conftest import Demo

pytestmark = pytest.mark.gpu

FORMATS = {
    "fp8": ["trtllm", "hf", "compressed_tensors", "nemo"],
    "int8_sq": ["trtllm", "compressed_tensors", "nemo"],
    "int4_awq": ["trtllm", "hf", "compressed_tensors", "nemo"],
    "w4a8_awq": ["trtllm", "hf", "nemo"],
    "nvfp4": ["trtllm", "hf", "nemo"],
}


def run_task(tasks: list[dict[str, Any]]) -> None:
    from nemo_ptq.task import ptq

    for task in tasks:
        ptq(**task)


def apart(*tasks: dict[str, Any]) -> None:
    """Runs jobs in a process of their own that is started, not forked: CUDA does not survive a fork."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(run_task, list(tasks)).result()


@pytest.fixture(scope="module")
def exported(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All algorithms in all formats, and each again: from the calibration, and from the checkpoint of format nemo."""
    root = tmp_path_factory.mktemp("formats")
    tasks: list[dict[str, Any]] = []
    for algorithm, formats in FORMATS.items():
        output, packed = root / algorithm, [name for name in formats if name != "nemo"]
        quantization = QuantizationConfig(
            algorithm, quality="fast", calibration_dataset=str(demo.calibration), calibration_dataset_size=64
        )
        tasks += [
            {
                "nemo_checkpoint": str(demo.checkpoint),
                "quantization_config": quantization,
                "export_config": ExportConfig(str(output), export_format=formats),
            },
            {
                "calibration_state": str(output / "trtllm"),
                "export_config": ExportConfig(str(root / f"{algorithm}-again"), export_format=packed),
            },
            {
                "nemo_checkpoint": str(output / "nemo"),
                "export_config": ExportConfig(str(root / f"{algorithm}-restored"), export_format=["trtllm"]),
            },
        ]
    apart(*tasks)
    return root


def contents(directory: Path) -> dict[str, bytes]:
    """The files of a directory that do not tell of the job."""
    names = {"ptq/manifest.json", *map(str, FILES)}
    files = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name not in names}


@pytest.mark.parametrize("algorithm", FORMATS)
def test_every_format_verifies(exported: Path, algorithm: str) -> None:
    for name in FORMATS[algorithm]:
        assert [check for check in verify(exported / algorithm / name, load_tokenizer=True) if not check.ok] == []


@pytest.mark.parametrize("algorithm", FORMATS)
def test_the_same_bytes_without_a_gpu(exported: Path, algorithm: str) -> None:
    for name in FORMATS[algorithm]:
        if name != "nemo":
            again = contents(exported / f"{algorithm}-again" / name)
            direct = contents(exported / algorithm / name)
            assert {file for file in again.keys() | direct.keys() if again.get(file) != direct.get(file)} == set()


@pytest.mark.parametrize("algorithm", FORMATS)
def test_the_nemo_checkpoint_exports_the_same_bytes(exported: Path, algorithm: str) -> None:
    name = "rank0.safetensors"
    restored = exported / f"{algorithm}-restored" / "trtllm" / name
    assert restored.read_bytes() == (exported / algorithm / "trtllm" / name).read_bytes()
