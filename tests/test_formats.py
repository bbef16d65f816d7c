# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Which formats a value of `export_format` names."""

from typing import Any

import pytest

from nemo_ptq.config import ExportConfig
from nemo_ptq.formats import FORMATS, read_formats


@pytest.mark.parametrize(
    ("value", "names", "has_subdirectories"),
    [
        ("hf", ("hf",), False),
        (["hf"], ("hf",), True),
        ("[hf]", ("hf",), True),
        ("[trtllm, 'hf']", ("trtllm", "hf"), True),
        ("trtllm,hf", ("trtllm", "hf"), True),
        (["trtllm", "hf", "trtllm"], ("trtllm", "hf"), True),
    ],
)
def test_a_name_a_list_or_the_text_of_one(value: Any, names: tuple[str, ...], has_subdirectories: bool) -> None:
    config = ExportConfig("out", export_format=value)
    assert (config.formats, config.has_subdirectories) == (names, has_subdirectories)


@pytest.mark.parametrize("value", [None, 3, [3], {"hf": 1}])
def test_anything_else_names_none(value: Any) -> None:
    assert read_formats(value) == ()


def test_records_and_writers_go_together() -> None:
    from nemo_ptq.export.formats import CHECKS, WRITERS

    assert FORMATS.keys() == WRITERS.keys() == CHECKS.keys()
