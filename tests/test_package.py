# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Importing the package is cheap, and its names are there."""

import subprocess
import sys
from pathlib import Path

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


def test_the_wheel_has_every_file_that_is_no_module() -> None:
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    root = Path(__file__).parents[1]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    places = [f"{package.replace('.', '/')}/{name}" for package, names in patterns.items() for name in names]
    packed = {file for place in places for file in root.glob(place)}
    links = [path for path in (root / "nemo_ptq").rglob("*") if path.is_symlink()]
    files = [path for place in (root / "nemo_ptq", *links) for path in place.rglob("*") if path.is_file()]
    data = {path for path in files if path.suffix not in (".py", ".pyc")}
    assert len(data) > len(links)
    assert data - packed == set()
