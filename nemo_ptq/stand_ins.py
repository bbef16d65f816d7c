# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Imports of large packages without the parts that nothing here uses."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any


@contextmanager
def stand_ins(modules: Mapping[str, Mapping[str, Any] | None]) -> Iterator[None]:
    """Replaces modules that are imported within a ``with`` block by empty or small ones.

    Afterwards the real ones can be imported. Modules that were imported before are not replaced.

    Args:
        modules: Attributes of the replacement, by dotted name; None makes the import fail.
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
