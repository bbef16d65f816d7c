# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Which directories are checkpoints of Megatron-LM or Megatron-Bridge, and which iteration of one is meant."""

import re
from collections.abc import Iterator
from pathlib import Path

from nemo_ptq.errors import PtqError
from nemo_ptq.untrusted import read_json_object, read_text

RUN_CONFIG = "run_config.yaml"
"""Megatron-Bridge's description of a training job, of each iteration."""
COMMON = "common.pt"
"""The common state of a job's ranks; for Megatron-LM, its arguments. Up to Megatron-Core 0.18."""
COMMON_OBJECT = "common_state/shard_0_1"
"""The same from Megatron-Core 0.19 on: an object in the torch_dist files, by its name in their index."""
TOKENIZER = "tokenizer"
"""Where Megatron-Bridge keeps the tokenizer, of each iteration."""
LATEST = "latest_checkpointed_iteration.txt"
"""Megatron-LM's tracker, which names the iteration to take."""
RELEASE = "release"
"""The tracker's text, and the directory's name, for a checkpoint without an iteration."""
_LATEST_OF_BRIDGE = "latest_train_state.pt"
_INDEX, _FORMAT = ".metadata", "metadata.json"
_ITERATION = re.compile(r"iter_(\d+)")
# Of each rank, in the older format.
_LEGACY = re.compile(r"mp_rank_\d+(_\d+)*")
# Digits that a tracker may have, and some.
_MOST_BYTES = 64


def is_megatron(path: Path) -> bool:
    """Whether a directory is a checkpoint of Megatron-LM or Megatron-Bridge, or one iteration of one; whole or not."""
    if not path.is_dir() or (path / "context").is_dir() or (path / "weights").is_dir():
        return False
    if path.name == "weights" and (path.parent / "context").is_dir():
        return False  # of a NeMo checkpoint
    marks = (LATEST, _LATEST_OF_BRIDGE, RUN_CONFIG, COMMON, _INDEX)
    return any((path / name).is_file() for name in marks) or any(_iterations(path)) or any(_legacy(path))


def iteration_of(path: Path) -> Path:
    """Finds the iteration that a directory means.

    Args:
        path: A directory for which :func:`is_megatron` is true: the iteration itself, or the root with several.

    Returns:
        The directory with the torch_dist files.

    Raises:
        PtqError: If the iteration is missing, was not written to its end, or is in another format.
    """
    directory = path if _is_iteration(path) else _latest(path)
    if legacy := next(_legacy(directory), None):
        raise PtqError(
            f"{directory} is in Megatron-LM's legacy format (it has {legacy.name}/): save it with --ckpt-format "
            "torch_dist, or convert it with Megatron-LM's tools/checkpoint/convert.py"
        )
    if (directory / _FORMAT).is_file():
        backend = read_json_object(directory / _FORMAT).get("sharded_backend")
        if backend != "torch_dist":
            raise PtqError(f"{directory} is in format {backend}: save it with --ckpt-format torch_dist")
    missing = [name for name in (_INDEX, _FORMAT) if not (directory / name).is_file()]
    if missing == [_FORMAT]:
        raise PtqError(
            f"{directory} lacks {_FORMAT}: it is in fsdp_dtensor or torch_dcp format, or was not copied whole; save it "
            "with --ckpt-format torch_dist, or copy it again"
        )
    if missing:
        others = ", ".join(entry.name for entry in _iterations(directory.parent) if entry != directory)
        raise PtqError(
            f"{directory} lacks {', '.join(missing)}: it was not saved to its end, or not copied whole; copy it again, "
            f"or give another iteration (found beside it: {others or 'none'})"
        )
    return directory


def _is_iteration(path: Path) -> bool:
    names = (_INDEX, COMMON, RUN_CONFIG)
    return any((path / name).is_file() for name in names) or any(_legacy(path)) or bool(_ITERATION.fullmatch(path.name))


def _iterations(path: Path) -> Iterator[Path]:
    if path.is_dir():
        names = (entry for entry in sorted(path.iterdir()) if _ITERATION.fullmatch(entry.name))
        yield from (entry for entry in names if entry.is_dir())


def _legacy(path: Path) -> Iterator[Path]:
    return (entry for entry in sorted(path.iterdir()) if _LEGACY.fullmatch(entry.name) and entry.is_dir())


def _latest(root: Path) -> Path:
    """The iteration that the tracker names, without a text the last one: Bridge's tracker is a pickle."""
    found = list(_iterations(root))
    if not (root / LATEST).is_file():
        if not found:
            raise PtqError(f"{root} has a tracker and no iter_XXXXXXX/: give the root that the iterations are in")
        return found[-1]
    text = read_text(root / LATEST, _MOST_BYTES).strip()
    if text == RELEASE and (root / RELEASE).is_dir():
        return root / RELEASE
    match = next((entry for entry in found if text.isdigit() and int(entry.name[len("iter_") :]) == int(text)), None)
    if match is None:
        raise PtqError(
            f"{root / LATEST} names iteration {text!r}, and found are {', '.join(map(_name, found)) or 'none'}: give "
            "the directory of one of them, or copy the one that is missing"
        )
    return match


def _name(path: Path) -> str:
    return path.name
