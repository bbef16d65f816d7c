# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Settings and fixtures for all tests."""

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest

from demo import build
from tests.families import make_nemo
from tests.ranks import run_ranks

# Before PyTorch is imported, here or in a process that a test starts. The tests of several ranks share a few cores.
_ENVIRONMENT = dict(os.environ)
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
# Records of runs would end up in the user's home; tests that look at them set another place.
os.environ["NEMO_PTQ_RECORD"] = "0"
# A process that has asked CUDA for its devices cannot fork ranks that use them; asking NVML does no harm.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

LONG_FILES = (
    "tests/test_launches.py",
    "tests/plan/test_memory.py",
    "tests/engine/test_run.py",
    "tests/launch/test_nemo_cli.py",
    "tests/export/nemo/test_nemo_writer.py",
)
"""Files with few tests that take long: of the others, those with most tests start first. See `make test`."""


@dataclass(frozen=True)
class Demo:
    """The demo's files: a NeMo checkpoint, the Hugging Face directory that it comes from, and .jsonl texts."""

    checkpoint: Path = build.CHECKPOINT
    hf: Path = build.HF
    calibration: Path = build.CALIBRATION
    heldout: Path = build.HELDOUT


@pytest.fixture(autouse=True)
def large_file_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that are planned for need not fit where tests write."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10**13, used=0, free=10**13))


@pytest.fixture(scope="session")
def demo() -> Demo:
    """The demo's model, trained first if it is missing."""
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-m", "demo.build"], cwd=root, env=_ENVIRONMENT, check=True)
    return Demo()


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes the NeMo checkpoint of a model of tests/families.py, once; not to be changed."""
    directory = tmp_path_factory.mktemp("families")

    @cache
    def make(name: str) -> Path:
        run_ranks(make_nemo, 1, name, directory / name)
        return directory / name

    return make


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips the tests marked `gpu` where there is no CUDA device; on several workers, has the longest files start."""
    if hasattr(config, "workerinput"):
        tests = Counter(item.path for item in items)
        items.sort(key=lambda item: (_start_of(item.path.relative_to(config.rootpath)), -tests[item.path]))
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items and not _has_cuda():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def _start_of(file: Path) -> int:
    return LONG_FILES.index(str(file)) if str(file) in LONG_FILES else len(LONG_FILES)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
