# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Python's module path without the working directory, which ``python -m`` puts first: a model's may hold a typer.py.

Imports nothing that ``python -m`` has not imported already.
"""

import os
import sys

VARIABLE = "PYTHONSAFEPATH"
"""Set to 1, it keeps the working directory off the path of Python 3.11 and later, and of what such a process starts."""


def leave_working_directory() -> None:
    """Takes the working directory off the path, where ``python -m`` has put it; what PYTHONPATH names stays."""
    if not getattr(sys.flags, "safe_path", False) and sys.path[:1] in ([""], [os.getcwd()]):
        del sys.path[0]
