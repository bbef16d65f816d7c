# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The real `nemo llm ptq` is ours, wherever NeMo's own stands on the path, and refuses a wrong command line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_ptq.options import OPTIONS
from tests.conftest import Demo

_ROOT = Path(__file__).parents[2]
# The `nemo` command, with a directory put first or last on the path.
_NEMO = (
    "import sys; place, directory, *sys.argv[1:] = sys.argv[1:];"
    "sys.path.insert(0 if place == 'first' else len(sys.path), directory);"
    "from nemo_run.__main__ import app; app()"
)


@pytest.fixture
def distribution(tmp_path: Path) -> Path:
    """A directory in which nemo_ptq is installed, as far as its entry points go."""
    info = tmp_path / "site" / "nemo_ptq-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nemo_ptq\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[nemo_run.cli]\nllm = nemo_ptq.launch.nemo_cli\n")
    return info.parent


def nemo(place: str, distribution: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NEMORUN_HOME": str(distribution.parent / "nemo_run"), "COLUMNS": "200"}
    command = [sys.executable, "-c", _NEMO, place, str(distribution), "llm", "ptq", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=_ROOT, env=environment, stdin=subprocess.DEVNULL)


def test_a_wrong_command_line_starts_nothing(demo: Demo, distribution: Path) -> None:
    arguments = [
        f"nemo_checkpoint={demo.checkpoint}",
        "calibration_tp=3",
        "export_config.path=/",
        "run.executor=torchrun",
    ]
    result = nemo("first", distribution, *arguments)
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert [error.partition(" ")[2].partition("=")[0] for error in errors] == [
        "calibration_tp",
        "export_config.path",
        "export_config.path",
    ]
    assert "Traceback" not in result.stderr
    assert result.returncode == 2
    assert not (distribution.parent / "nemo_run" / "experiments").exists()


@pytest.mark.slow
def test_the_help_lists_every_option(distribution: Path) -> None:
    result = nemo("last", distribution, "--help")
    assert result.returncode == 0
    assert [name for name in OPTIONS if f"{name}: " not in result.stdout] == []


def test_the_project_registers_it() -> None:
    lines = (_ROOT / "pyproject.toml").read_text().splitlines()
    group = lines.index('[project.entry-points."nemo_run.cli"]')
    assert lines[group + 1] == 'llm = "nemo_ptq.launch.nemo_cli"'
