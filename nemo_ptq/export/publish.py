# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A directory appears whole or not at all: it is written beside its place, hidden, and renamed at the end."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MANIFEST = Path("ptq/manifest.json")
_CHUNK = 1 << 22


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


def sha256_of(path: Path) -> str:
    """Returns a file's SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def file_entries(directory: Path, digests: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file in a directory, by relative path.

    Args:
        directory: The directory.
        digests: SHA-256 of files that have been read already, by relative path; the others are read now.
    """
    entries = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            name = path.relative_to(directory).as_posix()
            entries[name] = {"size": path.stat().st_size, "sha256": digests.get(name) or sha256_of(path)}
    return entries


def write_manifest(directory: Path, digests: Mapping[str, str], about: Mapping[str, Any]) -> None:
    """Writes the manifest: sizes and checksums of every file, its own among them, and what made them.

    Its own SHA-256, under "sha256", is that of the manifest with zeros in the place of it.

    Args:
        directory: The directory, complete but for the manifest.
        digests: As in :func:`file_entries`.
        about: Free-form entries: versions, arguments.
    """
    files = file_entries(directory, digests)
    target = directory / MANIFEST
    target.parent.mkdir(exist_ok=True)
    zeros = "0" * 64
    text = json.dumps({"version": 1, "sha256": zeros, **about, "files": files}, indent=2) + "\n"
    target.write_text(text.replace(zeros, hashlib.sha256(text.encode()).hexdigest(), 1), encoding="utf-8")


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
