# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""`nemo-ptq evaluate` on exports of the demo model: its figures, its gate, and the report that it updates."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nemo_ptq.cli.app import app
from nemo_ptq.errors import PtqError
from nemo_ptq.report.records import read_report
from nemo_ptq.report.write import REPORT
from nemo_ptq.verify.checks import verify
from tests.conftest import Demo
from tests.engine.test_run import arguments, run_task
from tests.matrix import quick_first
from tests.ranks import run_ranks

SAME_TEXT = ("--documents", "8", "--seq-len", "256")


@pytest.fixture(scope="module")
def exported(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Exports the demo model with an algorithm, once."""

    @cache
    def make(algorithm: str) -> Path:
        output = tmp_path_factory.mktemp("exports") / algorithm
        run_ranks(run_task, 1, arguments(demo, output, algorithm=algorithm))
        return output

    return make


def run_command(*words: Any) -> dict[str, Any]:
    """Runs the command in this process; errors are raised."""
    ended = CliRunner().invoke(app, ["evaluate", *map(str, words), "--json"])
    if ended.exception is not None:
        raise ended.exception
    return json.loads(ended.stdout)


@pytest.mark.parametrize(
    "algorithm", quick_first(["fp8", "int8_sq", "int4_awq", "w4a8_awq", "nvfp4"], ("fp8", "w4a8_awq"))
)
def test_the_jobs_figures_are_those_of_its_files(algorithm: str, demo: Demo, exported: Callable[[str], Path]) -> None:
    """The same documents in the calibrated Megatron model and in the files: equal but for bfloat16 arithmetic."""
    directory = exported(algorithm)
    job = read_report(directory / REPORT)
    found = run_command(directory, "--baseline", demo.checkpoint, *SAME_TEXT, "--sample", 4)
    assert found["held_out"] is True
    assert job.quality is not None
    assert (job.quality.documents, job.quality.tokens) == (found["documents"], found["tokens"])
    # What bfloat16 changes of an activation lets it fall to another of FP4's few codes.
    near = 1.5e-2 if algorithm == "nvfp4" else 3e-3
    for name in ("perplexity", "baseline_perplexity", "recovery"):
        assert getattr(job.quality, name).value == pytest.approx(found[name]["value"], rel=near)
    assert job.quality.top1_agreement is not None
    assert job.quality.top1_agreement.value == pytest.approx(found["top1_agreement"]["value"], abs=0.03)
    # The report has the files' figures now, in all of its documents, and the directory is as sound as before.
    updated = read_report(directory / REPORT)
    assert updated.quality is not None
    assert updated.quality.source == "evaluate"
    assert updated.summary.perplexity == found["perplexity"]["value"]
    assert updated.summary.passed is (found["recovery"]["value"] >= (updated.summary.required_recovery or 0))
    assert updated.layers == job.layers
    assert f"| perplexity | {found['perplexity']['value']:.3f} |" in (directory / "ptq/README.md").read_text()
    assert f"{found['perplexity']['value']:.2f}" in (directory / "ptq/report.html").read_text()
    assert all(check.ok for check in verify(directory))
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]


@pytest.fixture(scope="module")
def every_format(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Exports the demo model with an algorithm in all formats that hold it, once."""
    formats = {
        "fp8": "[trtllm,hf,compressed_tensors,nemo,megatron]",
        "int8_sq": "[trtllm,compressed_tensors,nemo,megatron]",
    }

    @cache
    def make(algorithm: str) -> Path:
        output = tmp_path_factory.mktemp("formats") / algorithm
        export = {"export_format": formats[algorithm]}
        run_ranks(run_task, 1, arguments(demo, output, algorithm=algorithm, export=export))
        return output

    return make


@pytest.mark.parametrize("algorithm", quick_first(["fp8", "int8_sq"], ("int8_sq",)))
def test_every_format(algorithm: str, demo: Demo, every_format: Callable[[str], Path]) -> None:
    """The same figures of one calibration, within what folding changes; the report has them, and stays sound."""
    directory = every_format(algorithm)
    expected = run_command(directory / "trtllm", "--baseline", demo.checkpoint, *SAME_TEXT, "--sample", 2)
    for format in sorted({path.name for path in directory.iterdir()} - {"trtllm"}):
        baseline = demo.hf if format == "hf" else demo.checkpoint
        found = run_command(directory / format, "--baseline", baseline, *SAME_TEXT, "--sample", 2)
        assert found.keys() == expected.keys()
        assert (found["documents"], found["tokens"]) == (expected["documents"], expected["tokens"])
        assert found["held_out"] is True
        assert found["baseline_perplexity"]["value"] == pytest.approx(expected["baseline_perplexity"]["value"])
        assert found["perplexity"]["value"] == pytest.approx(expected["perplexity"]["value"], rel=2e-3)
        assert found["samples"]["unquantized"] == expected["samples"]["unquantized"]
        assert found["kl_divergence"]["value"] > 0
        updated = read_report(directory / format / REPORT)
        assert updated.quality is not None and updated.quality.source == "evaluate"
        assert updated.summary.perplexity == found["perplexity"]["value"]
        assert [check for check in verify(directory / format, load_tokenizer=True) if not check.ok] == []


def test_another_model_is_no_baseline(exported: Callable[[str], Path], checkpoint_of: Callable[[str], Path]) -> None:
    with pytest.raises(
        PtqError, match="the baseline is another model than the exported one: its num_hidden_layers is 2, not 4"
    ):
        run_command(exported("fp8"), "--baseline", checkpoint_of("llama31"))


def test_the_gate(demo: Demo, exported: Callable[[str], Path]) -> None:
    words = (exported("fp8"), "--baseline", demo.checkpoint, "--text", demo.heldout, "--documents", 4, "--seq-len", 64)
    figures = run_command(*words, "--min-recovery", "0.9", "--sample", 0)
    assert figures["held_out"] is None
    assert figures["samples"] == {}
    with pytest.raises(PtqError, match=r"recovery \d\.\d+ is less than --min-recovery 1.5"):
        run_command(*words, "--min-recovery", "1.5", "--sample", 0)


def test_a_gate_that_nothing_can_miss_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PtqError, match="--min-recovery nan is not a finite number"):
        run_command(tmp_path, "--baseline", tmp_path, "--min-recovery", "nan")


def test_one_of_several_exports_must_be_named(tmp_path: Path) -> None:
    for name in ("hf", "trtllm"):
        (tmp_path / name / "ptq").mkdir(parents=True)
        (tmp_path / name / "ptq" / "manifest.json").write_text("{}")
    with pytest.raises(PtqError, match=f"{tmp_path} is not an export itself: give one of those in it, {tmp_path}/hf, "):
        run_command(tmp_path)
    with pytest.raises(PtqError, match=f"{tmp_path}/hf holds no model: give an exported directory or a checkpoint"):
        run_command(tmp_path / "hf")
    ended = CliRunner().invoke(app, ["verify", str(tmp_path)])
    assert ended.exit_code == 1
    assert [line.split(": ")[0] for line in ended.stdout.splitlines() if "manifest:" in line] == [
        "FAIL  hf",
        "FAIL  trtllm",
    ]


def test_without_a_baseline_there_is_a_perplexity(demo: Demo, exported: Callable[[str], Path]) -> None:
    words = (exported("fp8"), "--text", demo.heldout, "--documents", 2, "--seq-len", 64)
    before = (exported("fp8") / REPORT).read_bytes()
    figures = run_command(*words, "--no-update-report", "--sample", 3)
    assert figures["perplexity"]["low"] <= figures["perplexity"]["value"]
    assert figures["recovery"] is None
    assert figures["samples"].keys() == {"quantized"}
    assert (exported("fp8") / REPORT).read_bytes() == before
    with pytest.raises(PtqError, match="name it with --baseline"):
        run_command(*words, "--min-recovery", "0.9")


def test_text_must_be_had(demo: Demo, exported: Callable[[str], Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", exported("fp8"), copy], check=True)
    manifest = copy / "ptq/manifest.json"
    manifest.write_text(manifest.read_text().replace(str(demo.calibration), "/nowhere/text.jsonl"))
    with pytest.raises(PtqError, match="name documents with --text"):
        run_command(copy)


def test_a_device_that_is_not_there(exported: Callable[[str], Path]) -> None:
    with pytest.raises(PtqError, match="--device cuda:99 is not available here"):
        run_command(exported("fp8"), "--device", "cuda:99")


def test_as_a_user_types_it(demo: Demo, exported: Callable[[str], Path]) -> None:
    """Figures on standard output, progress on the other; plain where nobody watches a terminal."""
    command = ["evaluate", str(exported("fp8")), "--baseline", str(demo.checkpoint), "--documents", "4"]
    ended = subprocess.run(
        [sys.executable, "-c", "from nemo_ptq.cli.app import main; main()", *command, "--sample", "4"],
        env={**os.environ, "NO_COLOR": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert "perplexity of the baseline" in ended.stdout
    assert "unquantized: " in ended.stdout
    assert "evaluate: 8/8 layers" in ended.stderr
    assert "tokens/s" in ended.stderr
    assert "\x1b" not in ended.stdout + ended.stderr
    assert "evaluate:" not in ended.stdout
