# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Finished directories that tests copy and damage."""

import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from .qnemo_writer import Recipe, write_directory
from .reference import build, to_model

Pristine = Callable[[str, Recipe], Path]
Copy = Callable[[str, Recipe], Path]


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Pristine:
    """A directory for a family and a recipe, written once; not to be changed."""

    @cache
    def write(family: str, recipe: Recipe) -> Path:
        return write_directory(tmp_path_factory.mktemp("pristine") / "qnemo", to_model(family, build(family)), recipe)

    return write


@pytest.fixture
def copy(pristine: Pristine, tmp_path: Path) -> Copy:
    """A copy of such a directory to damage. Files are hard links: replace them, do not write into them."""

    def copy_of(family: str, recipe: Recipe) -> Path:
        target = tmp_path / f"copy{len(list(tmp_path.iterdir()))}"
        shutil.copytree(pristine(family, recipe), target, copy_function=os.link)
        return target

    return copy_of
