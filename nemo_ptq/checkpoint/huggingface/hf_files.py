# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Which files a Hugging Face directory has, and whether any is missing. Needs no torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_ptq.errors import PtqError
from nemo_ptq.untrusted import read_json_object

# In order of preference; each may be split into parts that `<name>.index.json` lists.
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# Python's libraries write a missing upper limit as infinity.
_INFINITE = ("time_step_limit",)
# A message names this many files and counts the others.
_NAMES_SHOWN = 10


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        PtqError: The file is missing or does not hold a JSON object.
    """
    if not file.is_file():
        raise PtqError(f"{file.parent} lacks {file.name}; {found_in(file.parent)}")
    return read_json_object(file, infinite=_INFINITE)


def weight_files(directory: Path) -> Sequence[Path]:
    """Returns the files that hold the weights, whole or in parts.

    Raises:
        PtqError: If there are none, one that the index lists is missing, or there is a whole model beside an index.
    """
    for name in _WEIGHTS:
        index, whole = directory / f"{name}.index.json", directory / name
        files = _indexed_files(index) if index.is_file() else [whole] if whole.is_file() else []
        if files and whole.is_file() and whole not in files:
            raise PtqError(
                f"{directory} has {name} and {index.name}, which lists other files, and readers differ in which they "
                "take: remove those that are not the model's"
            )
        if files:
            return files
    raise PtqError(f"{directory} has no weights ({' or '.join(_WEIGHTS)}, or their index); {found_in(directory)}")


def _indexed_files(index: Path) -> Sequence[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise PtqError(f"{index} has no weight_map")
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise PtqError(f"{index} has a weight_map of something else than file names")
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise PtqError(f"{index} names files outside its directory: {', '.join(outside)}")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise PtqError(f"{index.parent} lacks {', '.join(missing)}, which {index.name} lists; {found_in(index.parent)}")
    return [index.parent / name for name in names]


def found_in(directory: Path) -> str:
    """Says what a directory holds, for messages."""
    names = sorted(entry.name for entry in directory.iterdir()) if directory.is_dir() else []
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return f"found there: {', '.join(names[:_NAMES_SHOWN]) or 'nothing'}{more}"
