# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A directory appears whole or not at all: it is written beside its place, hidden, and renamed at the end."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def staging_path(output: Path) -> Path:
    """Where a directory is written before it gets its name.

    One place for each output, so that a run takes away what a killed one has left.
    """
    return output.with_name(f".{output.name}.partial")


def prepare(output: Path) -> Path:
    """Makes an empty staging directory for ``output``, and returns it."""
    staging = staging_path(output)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def discard(output: Path) -> None:
    """Removes what has been written for ``output`` so far."""
    shutil.rmtree(staging_path(output), ignore_errors=True)


def _sync(path: Path) -> None:
    """Has the operating system put a file or a directory's entries on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(output: Path) -> None:
    """Gives a finished staging directory its name, replacing what has that name now."""
    staging = staging_path(output)
    for path in (*staging.rglob("*"), staging):
        _sync(path)
    retired = output.with_name(f".{output.name}.replaced")
    shutil.rmtree(retired, ignore_errors=True)
    if output.exists():
        output.rename(retired)
    staging.rename(output)
    _sync(output.parent)
    shutil.rmtree(retired, ignore_errors=True)


@contextmanager
def atomic_directory(output: Path) -> Iterator[Path]:
    """Publishes a directory when the ``with`` block ends, and discards it when the block fails.

    Args:
        output: Where the directory will appear; one that stands there is replaced.

    Yields:
        The empty staging directory to fill.
    """
    staging = prepare(output)
    try:
        yield staging
        publish(output)
    except BaseException:
        discard(output)
        raise
