# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Whether the files that a torch_dist index names are there, and as long as it says. Needs no torch."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nemo_ptq.checkpoint.index import weights_of
from nemo_ptq.errors import ConfigError

# A message names this many files and counts the others.
_NAMES_SHOWN = 6


def check_shards(checkpoint: Path, parts: Iterable[Any], option: str = "nemo_checkpoint") -> None:
    """Checks for the files of a checkpoint's tensors.

    Args:
        checkpoint: Directory with ``weights/``, or with the files themselves.
        parts: The places that the index names.
        option: The option that named the directory, for messages.

    Raises:
        ConfigError: If files are missing, or cut short.
    """
    weights = weights_of(checkpoint)
    inside = "" if weights == checkpoint else f"{weights.name}/"
    needed: dict[str, int] = {}
    for part in parts:
        needed[part.relative_path] = max(needed.get(part.relative_path, 0), part.offset + part.length)
    sizes = {path.name: path.stat().st_size for path in weights.iterdir() if path.is_file()}
    missing = sorted(needed.keys() - sizes.keys())
    short = sorted(name for name, size in needed.items() if sizes.get(name, size) < size)
    problems = []
    if missing:
        found = f"{len(needed) - len(missing)} of {len(needed)} shards"
        lacks = f"{inside or checkpoint.name + '/'} lacks {listed(missing)}"
        problems.append(f"{option}={checkpoint} is incomplete: {lacks}; found {found}")
    if short:
        problems.append(f"{option}={checkpoint} is damaged: {listed(short)} cut short; copy it again")
    if problems:
        raise ConfigError(problems)


def listed(names: Sequence[str]) -> str:
    """Names the first of some files, and counts the others."""
    if not names:
        return "nothing"
    shown = ", ".join(names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"
