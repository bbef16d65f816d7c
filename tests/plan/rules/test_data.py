# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The rules about calibration data."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemo_ptq.plan.rules.data import data_is_readable, positions_suffice, recovery_is_measured
from tests.plan.models import LLAMA_8B
from tests.plan.rules.examples import STARCODER, expect


def test_learned_positions() -> None:
    assert positions_suffice(9000, LLAMA_8B) is None
    assert positions_suffice(8192, STARCODER) is None
    expect(positions_suffice(8193, STARCODER), "calibration_seq_len=8193 is longer than the model's 8192")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"min_recovery": None, "evaluation_dataset_size": 0}, None),
        ({"evaluation_dataset_size": 0}, "min_recovery=0.9 needs samples to compare on: give quantization_config.eval"),
        (
            {"algorithm": None},
            "is not measured, since algorithm=no_quant loses nothing: leave it out, and",
        ),
        ({"forward_loop": print}, "since a forward_loop gives no text"),
        ({"calibration_state": "OUT"}, "since a saved calibration leaves no text"),
        ({"model": replace(LLAMA_8B, is_quantized=True)}, "since a saved calibration leaves no text"),
    ],
)
def test_recovery_is_measured(changes: dict[str, Any], message: str | None) -> None:
    values = {"min_recovery": 0.9, "evaluation_dataset_size": 8, "algorithm": "fp8", "forward_loop": None}
    expect(recovery_is_measured(**{**values, "calibration_state": None, "model": LLAMA_8B, **changes}), message)


def test_every_file_is_read_as_far_as_its_weight_asks(tmp_path: Path) -> None:
    sound, broken = tmp_path / "sound.txt", tmp_path / "broken.jsonl"
    sound.write_text("a\nb\n")
    broken.write_text('{"text": "a"}\nbroken\n')
    assert data_is_readable(f"{sound},weight=3;{broken}", 4, 0, None) is None
    expect(data_is_readable(f"{sound},weight=3;{broken}", 5, 0, None), "line 2: not JSON")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n\n{"text": "b"}\n', None),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', None),
        ('{"text": "a"}\n{"text": "b"\n', "line 2: not JSON"),
        ('{"text": "a"}\n{"body": "b"}\n', 'line 2: needs a "text" string or a "messages" list'),
        ("", "holds no sample"),
        ('{"text": ""}\n{"messages": []}\n', "the samples that would be read have no text; give a file with texts"),
    ],
)
def test_data_file(content: str, message: str | None, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(content)
    problem = data_is_readable(str(file), 512, 8, None)
    expect(problem, message)
    assert problem is None or problem.startswith(f"quantization_config.calibration_dataset={file}")


def test_only_the_samples_that_will_be_used_are_read(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "a"}\n{"text": "b"}\nbroken\n')
    assert data_is_readable(str(file), 1, 1, None) is None
    expect(data_is_readable(str(file), 2, 1, None), "line 3")
    assert data_is_readable(str(file), 3, 0, lambda model: None) is None  # the user's loop has its own data
