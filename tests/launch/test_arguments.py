# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The names on a `nemo llm ptq` command line are checked, and a wrong one gets the nearest that exists."""

import subprocess
import sys
from pathlib import Path

import pytest

from nemo_ptq.launch.arguments import CommandLine, read_command_line


def read(*arguments: str) -> CommandLine:
    return read_command_line(arguments, ("executor", "plugins", "dryrun"))


def test_arguments_are_sorted() -> None:
    line = read(
        "nemo_checkpoint=/a=b",
        "run.executor=torchrun",
        "run.executor.env_vars.X=run.1",
        "quantization_config.sq_alpha=0.5",
        "export_config.path=OUT",
    )
    assert line.task == ["nemo_checkpoint=/a=b", "quantization_config.sq_alpha=0.5", "export_config.path=OUT"]
    assert line.run == ["executor=torchrun", "executor.env_vars.X=run.1"]
    assert not line.literal
    assert not line.problems
    assert not line.run_problems


def test_what_only_nemo_run_can_read_is_left_to_it() -> None:
    arguments = ["quantization_config=my_factory", "export_config=@export.yaml", "calibration_tp*=2", "devices=@d.yaml"]
    assert read(*arguments).task == arguments


@pytest.mark.parametrize(
    ("argument", "problem"),
    [
        ("nemo_chekpoint=x", "nemo_chekpoint is not an option: did you mean nemo_checkpoint?"),
        ("calibration_tpp=2", "calibration_tpp is not an option: did you mean calibration_tp?"),
        ("algorithm=fp8", "algorithm is not an option: did you mean quantization_config.algorithm?"),
        ("export_config.inferense_tp=2", "did you mean export_config.inference_tp?"),
        ("quantization_config.inference_tp=2", "did you mean export_config.inference_tp?"),
        ("runner=x", "runner is not an option"),
        ("--calibration_tp=2", "--calibration_tp=2 is not an option: write calibration_tp=2, without dashes"),
        ("--calibration-tp", "--calibration-tp is not an option: did you mean calibration_tp?"),
        ("/ckpt", "'/ckpt' is not an argument: write name=value, for example nemo_checkpoint=/ckpt"),
        ("calibration_tp", "'calibration_tp' is not an argument: write name=value, for example calibration_tp=VALUE"),
        ("calibration_tp 2", "write name=value, for example calibration_tp=2"),
        ("xyzzy=1", "xyzzy is not an option"),
    ],
)
def test_a_name_that_does_not_exist(argument: str, problem: str) -> None:
    line = read("nemo_checkpoint=a", argument)
    assert len(line.problems) == 1
    assert problem in line.problems[0]
    assert line.task == ["nemo_checkpoint=a"]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("calibration_tp=two", "two"),
        ("calibration_tp=0", 0),
        ("calibration_tp=2.5", "2.5"),
        ("quantization_config.enable_kv_cache=maybe", "maybe"),
        ("export_config.path=", ""),
    ],
)
def test_a_value_of_the_wrong_type_is_kept_for_the_checks(argument: str, value: object) -> None:
    line = read(argument)
    assert line.literal == {argument.partition("=")[0]: value}
    assert not line.task
    assert not line.problems


@pytest.mark.parametrize("value", ["os.getcwd", "os.getcwd,my_models.Mine", "@trusted.yaml", "os.getcwd()"])
def test_nemo_run_never_sees_a_name_that_it_would_call(value: str) -> None:
    line = read(f"trust_checkpoint={value}")
    assert line.literal == {"trust_checkpoint": value}
    assert not line.task


def test_settings_of_no_executor() -> None:
    line = read("run.executor.ntasks_per_node=2", "run.dryrun=true")
    assert line.run_problems == ["run.executor.ntasks_per_node=2 needs an executor: add run.executor=torchrun"]
    assert line.run == ["dryrun=true"]


def test_a_run_option_that_does_not_exist() -> None:
    line = read("run.exekutor=torchrun")
    assert line.run_problems == ["run.exekutor=torchrun is not an option: did you mean run.executor?"]


@pytest.mark.parametrize(
    "module",
    ["config", "cli.app", "launch.executors", "launch.front", "errors", "models.registry", "options", "script", "job"],
)
def test_the_front_door_is_light(module: str) -> None:
    program = (
        f"import sys, nemo_ptq.{module};"
        "print(*{'torch', 'nemo', 'nemo_run', 'megatron', 'modelopt', 'transformers'} & sys.modules.keys())"
    )
    root = Path(__file__).parents[2]
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root)
    assert output.stdout.split() == []
