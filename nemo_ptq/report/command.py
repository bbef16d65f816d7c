# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The command line that repeats a job."""

import shlex
from collections.abc import Mapping
from typing import Any

from nemo_ptq.options import OPTIONS

# They say where and how often a job runs, not what comes out.
_LEFT_OUT = ("model_path", "devices", "num_nodes", "forward_loop", "export_config.overwrite")


def reproducing_command(arguments: Mapping[str, Any], world_size: int) -> str | None:
    """Writes the `nemo llm ptq` command with these arguments, one on a line; defaults are left out.

    Args:
        arguments: Of the task, as :attr:`nemo_ptq.job.Job.arguments` has them.
        world_size: How many processes shared the work; however else they are started, the result is the same.

    Returns:
        The command, or None where a `forward_loop` was given, which only Python can give.
    """
    if arguments.get("forward_loop") is not None:
        return None
    words = ["nemo llm ptq"]
    for name, option in OPTIONS.items():
        value = _look_up(arguments, name)
        if name not in _LEFT_OUT and value not in (None, option.default):
            words.append(shlex.quote(f"{name}={str(value).lower() if isinstance(value, bool) else value}"))
    if world_size > 1:
        words += ["run.executor=torchrun", f"run.executor.ntasks_per_node={world_size}"]
    return " \\\n    ".join([*words, "--yes"])


def _look_up(arguments: Mapping[str, Any], name: str) -> Any:
    config, _, field = name.rpartition(".")
    return (arguments[config] if config else arguments).get(field)
