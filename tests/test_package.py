# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Importing the package is cheap, and its names are there."""

import subprocess
import sys

import pytest

import nemo_ptq


def test_import_is_light() -> None:
    code = (
        "import sys, nemo_ptq; print(*sorted({'torch', 'nemo', 'nemo_run', 'megatron', 'modelopt'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


@pytest.mark.parametrize("name", nemo_ptq.__all__)
def test_public_names_exist(name: str) -> None:
    assert getattr(nemo_ptq, name)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'quantize'"):
        nemo_ptq.quantize  # noqa: B018
