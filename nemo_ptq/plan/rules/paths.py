# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Names and places: the checkpoint, the tokenizer, the tracker, the directory to make."""

import os
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from nemo_ptq.calibration.hub import why_no_tokenizer
from nemo_ptq.checkpoint.links import links_out_of
from nemo_ptq.checkpoint.output_lock import owner_of
from nemo_ptq.checkpoint.staging import place_problem
from nemo_ptq.checkpoint.tokenizer_files import tokenizer_problem
from nemo_ptq.errors import PtqError
from nemo_ptq.models.spec import ModelSpec
from nemo_ptq.parallel.environment import read_launch
from nemo_ptq.tracking.trackers import check_address
from nemo_ptq.verify.manifest import MANIFEST, read_manifest

# Files that a message names.
_NAMES_SHOWN = 3


def checkpoint_is_named(nemo_checkpoint: Any, model_path: Any, calibration_state: Any) -> str | None:
    """The checkpoint is named; a saved calibration names its own."""
    if nemo_checkpoint is None and model_path is None and calibration_state is None:
        return "nemo_checkpoint is missing: name a NeMo, Hugging Face or Megatron-LM directory"
    if None not in (nemo_checkpoint, model_path) and str(nemo_checkpoint) != str(model_path):
        return f"nemo_checkpoint={nemo_checkpoint} and model_path={model_path} mean the same option: give one of them"
    return None


def checkpoint_is_self_contained(checkpoint: Any, model: ModelSpec) -> str | None:
    """No symbolic link among the files that the export copies leads out of the checkpoint."""
    link = next(links_out_of(Path(checkpoint).expanduser()), None)
    if link is None:
        return None
    return (
        f"nemo_checkpoint={checkpoint}: the link {link} leads out of the checkpoint, to {os.path.realpath(link)}, "
        "which would be copied into the export: put the file itself in its place, or remove the link"
    )


def tokenizer_exists(tokenizer_path: Any) -> str | None:
    """What tokenizer_path names is a complete tokenizer here, or a model in the cache or on the hub."""
    if tokenizer_path is None:
        return None
    path = Path(str(tokenizer_path)).expanduser()
    if path.exists():
        problem = tokenizer_problem(path) if path.is_dir() else None
        return None if problem is None else f"tokenizer_path={tokenizer_path} is not complete: {problem}"
    if str(tokenizer_path).startswith(("/", ".", "~")):
        return f"tokenizer_path={tokenizer_path} does not exist: give a tokenizer's directory or file"
    reason = why_no_tokenizer(str(tokenizer_path))
    return reason and (
        f"tokenizer_path={tokenizer_path} is no file or directory here, and {reason}: give a tokenizer's directory"
    )


def tracker_is_known(tracking: str | None) -> str | None:
    """The tracker is one of those that are known, and its package is installed."""
    return None if tracking is None else check_address(tracking)


def output_can_be_renamed(path: Any) -> str | None:
    """The output directory can be put in its place by one rename."""
    problem = place_problem(Path(path).expanduser().absolute())
    return None if problem is None else f"export_config.path={path} {problem}"


def output_is_apart(path: Any, checkpoint: Any) -> str | None:
    """The export neither touches the checkpoint nor replaces a directory that holds it."""
    output, source = (Path(os.path.realpath(Path(item).expanduser())) for item in (path, checkpoint))
    if output == source or source in output.parents or output in source.parents:
        return (
            f"export_config.path={path} and the checkpoint {checkpoint} must not contain one another: choose another "
            "directory"
        )
    return None


def output_is_not_in_use(path: Any) -> str | None:
    """No other job is writing the output directory."""
    if not read_launch().is_first:
        return None  # rank 0 of this very job may have begun
    owner = owner_of(Path(path).expanduser().absolute())
    if owner is None:
        return None
    return (
        f"export_config.path={path} is being written by {owner}: wait until it has ended, or choose another directory"
    )


def output_is_free(path: Any, overwrite: bool) -> str | None:
    """The output path is free, or holds an earlier export and nothing else, which may be replaced."""
    output = Path(path).expanduser().absolute()
    if not os.path.lexists(output) or place_problem(output) is not None:
        return None
    if not overwrite:
        return f"export_config.path={path} exists: choose another, or set export_config.overwrite=true to replace it"
    if not output.is_dir():
        return f"export_config.path={path} is not a directory, so it is not overwritten: choose another"
    names = [str(file.relative_to(output)) for file in islice(_foreign_files(output), _NAMES_SHOWN + 1)]
    if names:
        shown = ", ".join(names[:_NAMES_SHOWN]) + (" and others" if len(names) > _NAMES_SHOWN else "")
        return (
            f"export_config.path={path} holds what no manifest of an export lists ({shown}), so it is not overwritten: "
            "move that away, or choose another directory"
        )
    return None


def output_is_writable(path: Any) -> str | None:
    """The directory that the output goes into can be written to."""
    output = Path(path).expanduser().absolute()
    parent = next(directory for directory in (*output.parents, output) if os.path.exists(directory))
    if not parent.is_dir():
        return f"export_config.path={path} cannot be made: {parent} is not a directory"
    if not os.access(parent, os.W_OK | os.X_OK):
        return f"export_config.path={path} cannot be made: {parent} is not writable; choose another"
    return None


def _foreign_files(output: Path) -> Iterator[Path]:
    """Yields the files below a directory that belong to no export, neither its own nor one in a subdirectory."""
    directories = [output] if (output / MANIFEST).is_file() else [entry for entry in output.iterdir() if entry.is_dir()]
    listed = {file for directory in directories for file in _listed_files(directory)}
    for parent, subdirectories, files in os.walk(output):
        links = [name for name in subdirectories if (Path(parent) / name).is_symlink()]
        yield from (file for name in sorted([*files, *links]) if (file := Path(parent) / name) not in listed)


def _listed_files(directory: Path) -> Iterator[Path]:
    """Yields the files that a directory's manifest lists, and the manifest; none if there is no sound one."""
    with suppress(PtqError):
        entries = read_manifest(directory)
        yield directory / MANIFEST
        yield from (directory / name for name in entries)
