# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The rules about calibration data."""

from pathlib import Path

import pytest

from nemo_ptq.plan.rules.data import data_is_readable, positions_suffice
from tests.plan.models import LLAMA_8B
from tests.plan.rules.examples import STARCODER, expect


def test_learned_positions() -> None:
    assert positions_suffice(9000, LLAMA_8B) is None
    assert positions_suffice(8192, STARCODER) is None
    expect(positions_suffice(8193, STARCODER), "calibration_seq_len=8193 is longer than the model's 8192")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n\n{"text": "b"}\n', None),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', None),
        ('{"text": "a"}\n{"text": "b"\n', "line 2: not JSON"),
        ('{"text": "a"}\n{"body": "b"}\n', 'line 2: needs a "text" string or a "messages" list'),
        ("", "holds no sample"),
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
