# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Model families, algorithms, formats and data sets from outside the package.

A plugin is a module that registers what it adds when it is imported. Modules are named by the entry points of the
group ``nemo_ptq.plugins``, for what is installed, and by the environment variable ``NEMO_PTQ_PLUGINS``, comma
separated, for a file on ``PYTHONPATH``. Launchers hand the variable to every rank, and every rank imports the modules.
"""

import os
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from nemo_ptq.errors import PtqError

GROUP = "nemo_ptq.plugins"
VARIABLE = "NEMO_PTQ_PLUGINS"


@cache
def load_plugins() -> None:
    """Imports all plugins, once per process; each command and each rank calls it before it looks at an argument.

    Raises:
        PtqError: If a plugin cannot be imported.
    """
    modules = {point.value: f"the entry point {point.name} of {GROUP}" for point in entry_points(group=GROUP)}
    named = [name.strip() for name in os.environ.get(VARIABLE, "").split(",")]
    modules |= {name: VARIABLE for name in named if name}
    for module, source in modules.items():
        try:
            import_module(module)
        except Exception as error:  # a plugin may raise anything
            raise PtqError(
                f"the plugin {module}, named by {source}, cannot be imported ({type(error).__name__}: {error}): "
                "correct it, or do not name it"
            ) from error


def locate(path: str) -> Any:
    """Returns what a dotted path names, so that a record can name code that takes seconds to import.

    Args:
        path: "package.module:name".
    """
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)
