# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What the verification of one format is: how a directory in it is known, and the checks that it gets.

The formats of the exporter have a table of their own: nothing is shared with it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What was looked at, unique within one run.
        ok: Whether it is as it must be.
        detail: One line: what was found, or what is wrong.
    """

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Reader:
    """How the directories of a format are verified.

    Attributes:
        name: What the format is called in a failed check.
        recognises: Whether a directory is in this format.
        checks: Yields the checks of a directory, and is told whether to load its tokenizer. The manifest is looked at
            before. What it raises is a failed check.
    """

    name: str
    recognises: Callable[[Path], bool]
    checks: Callable[[Path, bool], Iterator[Check]]


REGISTERED: list[Reader] = []
"""Those from outside the package, which are asked before our own."""


def register(reader: Reader) -> None:
    """Adds the verification of a format; a plugin calls it when it is imported."""
    REGISTERED.append(reader)
