# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A plan on a terminal, in a pipe, and as JSON."""

import io
import json
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from nemo_ptq.cli import app
from nemo_ptq.config import ExportConfig, QuantizationConfig
from nemo_ptq.plan import Plan, make_plan, show_plan
from tests.conftest import Demo
from tests.plan.models import LLAMA_8B, LLAMA_70B


def printed(plan: Plan, *, terminal: bool = False) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100, soft_wrap=True, highlight=False)
    show_plan(plan, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_every_rule_and_step_is_a_line_with_a_tick() -> None:
    plan = make_plan(LLAMA_8B, QuantizationConfig("int4_awq", quality="fast"), ExportConfig("OUT", inference_tp=2))
    lines = printed(plan).splitlines()
    assert [line for line in lines if line.startswith("✓ rules: ")] == [f"✓ rules: {rule.says}" for rule in plan.rules]
    assert "✓ memory of a rank: calibrate" in "\n".join(lines)
    assert f"  files: rank1.safetensors: {plan.files[1].bytes:,} bytes" in lines
    assert lines[0] == "  model: Llama3Config8B: 8.030 billion parameters, 32 layers"
    assert lines[-1] == "✓ the job fits and keeps every rule"


def test_what_is_wrong_has_a_cross_and_a_way_out() -> None:
    plan = make_plan(
        LLAMA_70B, QuantizationConfig(quality="fast", layerwise=False), ExportConfig("OUT", inference_tp=3)
    )
    lines = printed(plan).splitlines()
    crosses = [line for line in lines if line.startswith("✗")]
    assert crosses[0].startswith("✗ rules: export_config.inference_tp=3 does not divide")
    assert sum("memory of a rank" in line for line in crosses) == sum(step.weights > 0 for step in plan.memory) + 1
    assert crosses[-1] == "✗ the job cannot run like this"
    assert any(line.startswith("suggestion: calibration_tp=2 calibration_pp=1 is the smallest") for line in lines)


def test_the_quality_is_shown_and_why_it_is_fast() -> None:
    assert "  model: quality: balanced" in printed(make_plan(LLAMA_8B)).splitlines()
    fast = make_plan(LLAMA_8B, export=ExportConfig("OUT", export_format="nemo"))
    line = "  model: quality: fast, since export_format=nemo holds weights that are not rounded yet"
    assert line in printed(fast).splitlines()


def test_both_modes_are_shown_and_the_one_that_the_job_takes() -> None:
    lines = printed(make_plan(LLAMA_70B)).splitlines()
    assert any(line.startswith("  memory of a rank: the largest step, were it resident: ") for line in lines)
    assert any(line.startswith("✓ memory of a rank: the largest step, layer-wise: ") for line in lines)
    assert sum("reading 141 GB of weights" in line for line in lines) == 2
    assert any(line.startswith("suggestion: layer-wise: ") for line in lines)
    assert lines[-1] == "✓ the job fits and keeps every rule"


def test_a_pipe_gets_no_colours_and_a_terminal_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(LLAMA_8B)
    assert "\x1b" not in printed(plan)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    on_terminal = printed(plan, terminal=True)
    assert "\x1b[32m" in on_terminal
    assert all(len(line) < 160 for line in on_terminal.splitlines())
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[32m" not in printed(plan, terminal=True)


def test_a_word_between_colons_is_no_picture(capsys: pytest.CaptureFixture[str]) -> None:
    show_plan(replace(make_plan(LLAMA_8B), suggestions=("owner/name:train: is large",)))
    assert "suggestion: owner/name:train: is large\n" in capsys.readouterr().out


def test_many_files_are_one_line() -> None:
    plan = make_plan(LLAMA_70B, export=ExportConfig("OUT", inference_tp=8, inference_pp=2), calibration_tp=4)
    (line,) = [line for line in printed(plan).splitlines() if "rank0.safetensors" in line]
    assert line.startswith("  files: rank0.safetensors to rank15.safetensors: 16 files of ")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["nemo-ptq", "plan", *arguments])
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize(
    "spelling",
    [
        ("{checkpoint}", "quantization_config.algorithm=int4_awq", "calibration_tp=2", "export_config.inference_tp=2"),
        ("nemo_checkpoint={checkpoint}", "--algorithm", "int4_awq", "--calibration_tp=2", "--inference_tp", "2"),
        ("-nc", "{checkpoint}", "-algo=int4_awq", "-ctp", "2", "-itp=2", "run.executor=torchrun"),
    ],
)
def test_the_command_takes_every_spelling_of_the_options(
    demo: Demo,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    spelling: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [argument.format(checkpoint=demo.checkpoint) for argument in spelling]
    assert run(monkeypatch, *arguments, "--device", "l40s", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["algorithm"], plan["device"]["name"], plan["ok"]) == ("int4_awq", "L40S", True)
    assert plan["parallelism"]["tp"] == 2
    weights, *others = [file["name"] for file in plan["files"]]
    assert weights == "ptq/calibration.weights.safetensors"  # of quality balanced, which is the default
    assert others == ["rank0.safetensors", "rank1.safetensors", "nemo_context/"]


def test_the_command_fails_where_the_job_would(
    demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, str(demo.checkpoint), "calibration_tp=3") == 1
    assert "✗ rules" in capsys.readouterr().out
    assert run(monkeypatch, "nowhere") == 2
    assert capsys.readouterr().err.startswith("Error: nemo_checkpoint=nowhere does not exist")
    assert run(monkeypatch, str(demo.checkpoint), "calib_tp=2") == 2
    assert capsys.readouterr().err == "Error: calib_tp is not an option: did you mean calibration_tp?\n"
    assert run(monkeypatch, "calibration_tp=2") == 2
    assert capsys.readouterr().err.startswith("Error: nemo_checkpoint is missing")


def test_a_plan_takes_seconds_and_no_heavy_library(demo: Demo, tmp_path: Path) -> None:
    code = (
        "import sys; from contextlib import suppress; from nemo_ptq.cli.app import main\n"
        "with suppress(SystemExit): main()\n"
        "print(*{'torch', 'nemo', 'megatron', 'transformers'} & sys.modules.keys())"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    arguments = [sys.executable, "-c", code, "plan", str(demo.checkpoint)]
    ended = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ended.stdout.splitlines()[-2:] == ["✓ the job fits and keeps every rule", ""]
    # Of the processor, since others may be at work on the machine.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5
