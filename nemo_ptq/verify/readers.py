# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The verification of one format: how its directories are recognised, and their checks.

The formats of the exporter have a table of their own: nothing is shared with it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: Name of the check, unique within one run.
        ok: Whether it passed.
        detail: One line: what was found, or what is wrong.
    """

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Reader:
    """How the directories of a format are verified.

    Attributes:
        name: Name of the format in a failed check.
        recognises: Whether a directory is in this format.
        checks: Yields the checks of a directory, and is told whether to load its tokenizer. The manifest is looked at
            before. What it raises is a failed check.
    """

    name: str
    recognises: Callable[[Path], bool]
    checks: Callable[[Path, bool], Iterator[Check]]


REGISTERED: list[Reader] = []
"""Readers from outside the package, which are tried before our own."""


def register(reader: Reader) -> None:
    """Adds the verification of a format; a plugin calls it when it is imported."""
    REGISTERED.append(reader)
