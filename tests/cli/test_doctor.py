# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""`nemo-ptq doctor` finds what is broken, quickly, and names the command that fixes it."""

import json
import os
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_ptq.cli import app, doctor
from nemo_ptq.cli.doctor import TESTED, Finding, examine

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only directory on PATH."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", str(directory))
    return directory


def command(path: Path, name: str, script: str) -> None:
    (path / name).write_text(f"#!/bin/sh\n{script}\n")
    (path / name).chmod(0o755)


def found(name: str, directory: Path = Path(".")) -> Finding:
    (finding,) = [finding for finding in examine(directory) if finding.name == name]
    return finding


def test_the_tested_versions_are_those_of_the_constraints() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.partition(" ")[0].split("==") for line in lines if "==" in line)
    assert {name: pinned[name] for name in TESTED} == TESTED


def test_it_takes_a_second_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, pathlib, nemo_ptq.cli.doctor as doctor; doctor._PATIENCE = 0.2; doctor.examine(pathlib.Path('.'));"
        "print(*{'torch', 'nemo', 'nemo_run', 'megatron', 'transformers', 'datasets'} & sys.modules.keys())"
    )
    start = time.perf_counter()
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
    assert time.perf_counter() - start < 10


def test_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", f"{BIN}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("NEMORUN_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["nemo-ptq", "doctor", "--json", str(tmp_path)])
    with pytest.raises(SystemExit):
        app.main()
    findings = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}
    for name in ("Python", *TESTED, "torchrun", "exports", "NeMo-Run's experiments"):
        assert findings[name]["ok"], findings[name]


def test_a_cross_has_its_command_and_fails(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["nemo-ptq", "doctor"])
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert ended.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    cross = lines.index("✗ nemo llm ptq: the nemo command is not on PATH")
    assert lines[cross + 1] == f'    export PATH="{BIN}:$PATH"'
    crosses = [index for index, line in enumerate(lines) if line.startswith("✗")]
    assert all(lines[index + 1].startswith("    ") for index in crosses)


def test_a_version_out_of_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version
    versions = {"transformers": "5.0.0", "megatron-core": "0.16.0", "leptonai": "0.47.1"}
    monkeypatch.setattr(metadata, "version", lambda name: versions.get(name) or real(name))
    needs = ["transformers>=4.57,<5", "megatron-core>=0.15,<0.17", "leptonai<0.47", "pytest; extra == 'dev'"]
    monkeypatch.setattr(metadata, "requires", lambda _: needs)
    bad = found("transformers")
    assert (bad.ok, bad.needed, bad.fix) == (False, True, "pip install 'transformers==4.57.6'")
    other = found("megatron-core")
    assert (other.ok, other.detail) == (True, "0.16.0 (tested: 0.16.1)")
    assert found("leptonai").fix == "pip install 'leptonai<0.47'"


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    assert found("torch").detail == "not installed (tested: 2.13.0)"
    assert found("torch").ok is False


def test_no_gpu_is_no_fault(path: Path) -> None:
    assert found("GPU") == Finding("GPU", None, "none: jobs run on the CPU")


@pytest.mark.parametrize(("cuda", "ok"), [("12.8", True), (None, False)])
def test_a_gpu_needs_a_torch_for_it(
    cuda: str | None, ok: bool, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command(path, "nvidia-smi", "echo 'NVIDIA H100 80GB HBM3, 81559 MiB'")
    (tmp_path / "version.py").write_text(f"from typing import Optional\ncuda: Optional[str] = {cuda!r}\n")
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(doctor.util, "find_spec", lambda _: spec)
    finding = found("GPU")
    assert finding.ok is ok
    assert "NVIDIA H100 80GB HBM3" in finding.detail


def test_torchrun_of_another_environment(path: Path) -> None:
    command(path, "torchrun", "true")
    finding = found("torchrun")
    assert (finding.ok, finding.needed) == (False, False)
    assert "another environment" in finding.detail


@pytest.mark.parametrize(
    ("values", "ok", "detail"),
    [
        (["nemo_ptq.launch.nemo_cli", "nemo.collections.llm"], True, "nemo_ptq's, "),
        (["nemo.collections.llm"], False, "another's would run: nemo.collections.llm"),
        ([], False, "another's would run: none"),
        (["nemo_ptq.launch.nemo_cli", "fork.llm"], False, "nemo_ptq's or that of fork.llm, whichever is loaded last"),
    ],
)
def test_which_nemo_llm_ptq_would_run(
    values: list[str], ok: bool, detail: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command(path, "nemo", "true")
    points = [metadata.EntryPoint("llm", value, "nemo_run.cli") for value in values]
    real = metadata.entry_points
    monkeypatch.setattr(
        metadata, "entry_points", lambda **which: points if which == {"group": "nemo_run.cli"} else real(**which)
    )
    finding = found("nemo llm ptq")
    assert finding.ok is ok
    assert finding.detail.startswith(detail)


@pytest.mark.parametrize(
    ("sinfo", "sacct", "expected"),
    [
        (None, None, {"Slurm": None}),
        ("exit 1", "exit 1", {"Slurm": False}),
        ("sleep 5", "true", {"Slurm": False}),
        ("echo batch*", "exit 1", {"Slurm": True, "Slurm accounting": False}),
        ("echo batch*", "true", {"Slurm": True, "Slurm accounting": True}),
    ],
)
def test_slurm(
    sinfo: str | None, sacct: str | None, expected: dict[str, Any], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_PATIENCE", 1.0)
    for name, script in (("sinfo", sinfo), ("sacct", sacct)):
        if script:
            command(path, name, f"PATH=/usr/bin:/bin; {script}")
    findings = {finding.name: finding for finding in examine(Path("."))}
    assert {name: finding.ok for name, finding in findings.items() if name.startswith("Slurm")} == expected


def test_a_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NEMORUN_HOME", str(tmp_path / "file" / "home"))
    assert found("exports", tmp_path / "file" / "out").ok is False
    home = found("NeMo-Run's experiments")
    assert (home.ok, home.fix) == (False, "export NEMORUN_HOME=DIR")
    assert found("exports", tmp_path / "not" / "yet").ok


def test_little_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=3e9))
    assert re.match("3 GB free", found("disk space").detail)
    assert found("disk space").ok is False


def test_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "Salesforce___wikitext").mkdir()
    missing = found("data sets")
    assert missing.ok is False
    assert missing.detail.startswith(f"cnn_dailymail not in {tmp_path}, and HF_HUB_OFFLINE is set")
    (tmp_path / "abisee___cnn_dailymail").mkdir()
    assert found("data sets").ok
