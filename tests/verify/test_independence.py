# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The reader shares no code with what writes exports: a mistake in one is then noticed by the other."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import nemo_ptq.verify

PACKAGE = Path(nemo_ptq.verify.__file__).parent
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def imported(source: str) -> Iterator[str]:
    """The modules that a file imports, at its top and inside its functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import does not say what it imports"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("file", FILES, ids=str)
def test_it_imports_what_knows_no_format(file: Path) -> None:
    ours = [name for name in imported((PACKAGE / file).read_text()) if name.partition(".")[0] == "nemo_ptq"]
    shared = ("verify", "errors", "untrusted", "untrusted_pickles", "pretrained")
    assert [name for name in ours if not name.startswith(tuple(f"nemo_ptq.{name}." for name in shared))] == []
