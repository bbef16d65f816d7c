# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Imports of large packages without what they would bring along and nobody here uses."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any


@contextmanager
def stand_ins(modules: Mapping[str, Mapping[str, Any] | None]) -> Iterator[None]:
    """Puts others in the place of modules that are imported in a ``with`` block.

    Afterwards they can be imported as they are. Those that have been imported before stay.

    Args:
        modules: By dotted name, what the other one has in it; None where the import is to fail.
    """
    added: dict[str, Any] = {}
    for name, content in modules.items():
        if name not in sys.modules:
            added[name] = None if content is None else ModuleType(name)
            if content is not None:
                vars(added[name]).update(content)
    sys.modules.update(added)
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]
