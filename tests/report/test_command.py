# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The command in the report is one that a shell and the command line's parser understand."""

import shlex
from dataclasses import asdict
from typing import Any

from nemo_ptq.config import ExportConfig, QuantizationConfig
from nemo_ptq.report.command import reproducing_command


def arguments(**quantization: Any) -> dict[str, Any]:
    return {
        "nemo_checkpoint": "/models/a b",
        "calibration_tp": 2,
        "calibration_pp": 1,
        "legacy_ckpt": True,
        "forward_loop": None,
        "quantization_config": asdict(QuantizationConfig(**quantization)),
        "export_config": asdict(ExportConfig("/out", overwrite=True)),
    }


def test_defaults_are_left_out_and_words_survive_the_shell() -> None:
    command = reproducing_command(arguments(algorithm="int8_sq", sq_alpha=0.25), 2)
    assert command is not None
    assert shlex.split(command.replace("\\\n", " ")) == [
        *("nemo", "llm", "ptq", "nemo_checkpoint=/models/a b", "calibration_tp=2", "legacy_ckpt=true"),
        *("quantization_config.algorithm=int8_sq", "quantization_config.sq_alpha=0.25", "export_config.path=/out"),
        *("run.executor=torchrun", "run.executor.ntasks_per_node=2", "--yes"),
    ]


def test_one_process_needs_no_executor() -> None:
    command = reproducing_command(arguments(), 1)
    assert command is not None
    assert "executor" not in command


def test_a_loop_of_ones_own_has_no_command() -> None:
    assert reproducing_command(arguments() | {"forward_loop": "my_loop"}, 1) is None
